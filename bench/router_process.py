"""A router of this checkout as a process of its own, and its CPU clock.

    sockets bound ─► baton router MODEL (inherits them) ─► /health answers ─► … ─► SIGTERM ─► ended

The process can be started under `bench.router_profile` instead: then SIGUSR1 begins and ends what the profile covers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp

START_BUDGET_S: Final = 60.0
STOP_BUDGET_S: Final = 20.0
POLL_S: Final = 0.02
SERVED_NAME: Final = "bench"


@dataclass(frozen=True, slots=True)
class CpuTime:
    """CPU time of a process since its start, all threads. `all_s` is exact, the two others come in clock ticks."""

    all_s: float
    user_s: float
    system_s: float


def cpu_time(pid: int) -> CpuTime:
    """Read the CPU time of a process of this machine (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    # The number of another process's CPU clock, as clock_getcpuclockid(3) makes it.
    clock = (~pid << 3) | 2
    return CpuTime(time.clock_gettime(clock), int(fields[11]) * tick_s, int(fields[12]) * tick_s)


class RouterProcess:
    """A running router."""

    def __init__(self, process: asyncio.subprocess.Process, ports: tuple[int, int], secret: str) -> None:
        self.port, self.control_port = ports
        self.secret = secret
        self._process = process

    @property
    def url(self) -> str:
        """Base URL for clients."""
        return f"http://127.0.0.1:{self.port}"

    def cpu(self) -> CpuTime:
        """Return its CPU time up to now."""
        return cpu_time(self._process.pid)

    def toggle_profile(self) -> None:
        """Begin or end what its profile covers; only for a router started with one."""
        self._process.send_signal(signal.SIGUSR1)

    async def until(self, *statuses: int) -> None:
        """Wait until /health answers with one of these. Raises RuntimeError when it does not in time, or has ended."""
        deadline_s = time.monotonic() + START_BUDGET_S
        async with aiohttp.ClientSession() as session:
            while time.monotonic() < deadline_s:
                if self._process.returncode is not None:
                    raise RuntimeError(f"the router ended with exit code {self._process.returncode}")
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(f"{self.url}/health") as response:
                        if response.status in statuses:
                            return
                await asyncio.sleep(POLL_S)
        raise RuntimeError(f"the router did not become ready within {START_BUDGET_S:g} s")

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send JSON and return the answer. Raises aiohttp.ClientResponseError for an error status."""
        async with (
            aiohttp.ClientSession(raise_for_status=True) as session,
            session.post(f"{self.url}{path}", json=body) as response,
        ):
            found: dict[str, Any] = await response.json()
            return found


@contextlib.asynccontextmanager
async def router_process(model: str, folder: Path, profile: Path | None) -> AsyncIterator[RouterProcess]:
    """Run a router for the time of the context; `folder` takes its secret.

    Args:
        model: as `baton router` takes it.
        folder: a private folder.
        profile: the file that its profile goes to, or None to run it as it is.
    """
    secret, secret_file = secrets.token_hex(32), folder / "secret"
    secret_file.touch(mode=0o600)
    secret_file.write_text(secret)
    with _listening() as http, _listening() as control:
        fds = (http.fileno(), control.fileno())
        runner = ["-m", "baton"] if profile is None else ["-m", f"{__package__}.router_profile", str(profile)]
        command = [
            *(sys.executable, *runner, "router", model, f"--secret-file={secret_file}", "--log-level=error"),
            *(f"--served-model-name={SERVED_NAME}", f"--http-fd={fds[0]}", f"--control-fd={fds[1]}"),
        ]
        process = await asyncio.create_subprocess_exec(*command, pass_fds=fds)
        ports = (http.getsockname()[1], control.getsockname()[1])
        try:
            found = RouterProcess(process, ports, secret)
            await found.until(200, 503)
            yield found
        finally:
            await _end(process)


def _listening() -> socket.socket:
    """Return a socket with a free port, for the router to listen on."""
    found = socket.socket()
    found.bind(("127.0.0.1", 0))
    return found


async def _end(process: asyncio.subprocess.Process) -> None:
    """End the router, with SIGTERM if that suffices."""
    if process.returncode is None:
        process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_BUDGET_S):
                await process.wait()
        except TimeoutError:
            process.kill()
    await process.wait()
