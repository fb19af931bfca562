"""Start `baton serve` for a test, wait until it is ready, and look at it from outside."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

READY_BUDGET_S = 90.0
STOP_BUDGET_S = 20.0


@dataclass(frozen=True, slots=True)
class Server:
    """A running `baton serve`.

    Attributes:
        url: base URL, without a trailing slash.
        process: the supervisor.
        log: what it has printed.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str) -> Any:
        """Return the JSON of a GET, whatever its status."""
        return json.loads(_read(f"{self.url}{path}"))

    def is_ready(self) -> bool:
        """Tell whether it answers /health; fails when it has ended."""
        assert self.process.poll() is None, f"baton serve ended:\n{self.log.read_text(errors='replace')[-3000:]}"
        try:
            _read(f"{self.url}/health")
        except OSError:
            return False
        return True

    def metrics(self) -> dict[str, float]:
        """Return every sample of /metrics by its name and labels as written there."""
        lines = _read(f"{self.url}/metrics").splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def total(self, name: str) -> float:
        """Return the sum of a metric over all its labels."""
        return sum(v for k, v in self.metrics().items() if re.fullmatch(rf"{name}(\{{.*\}})?", k))

    def workers(self) -> list[dict[str, Any]]:
        """Return the router's census of all workers."""
        workers: list[dict[str, Any]] = self.get("/census")["workers"]
        return workers

    def children(self) -> dict[str, int]:
        """Return the pid of each role's process, as `ps` would show them."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or _parent(entry) != self.process.pid:
                continue
            # A forked worker's command line is one string.
            command = (entry / "cmdline").read_bytes().replace(b" ", b"\0").split(b"\0")
            for role in ("router", "prefill", "decode", "colocated"):
                if role.encode() in command:
                    found[role] = int(entry.name)
        return found


def wait_until(condition: Any, budget_s: float, what: str) -> Any:
    """Poll until `condition()` is true and return its value; fail naming `what` after `budget_s`."""
    deadline_s = time.monotonic() + budget_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline_s, f"{what}: not within {budget_s} s"
        time.sleep(0.05)


@contextmanager
def serving(model: str, folder: Path, cache_dir: Path, *options: str) -> Iterator[Server]:
    """Run `baton serve MODEL`, yield it when ready, and end it; the log stays in `folder`."""
    port, log = free_port(), folder / "serve.log"
    command = [sys.executable, "-m", "baton", "serve", model, "--port", str(port), *options]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "BATON_CACHE": str(cache_dir)}
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        wait_until(server.is_ready, READY_BUDGET_S, "ready")
        yield server
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> int:
    """End a process with SIGTERM, and with SIGKILL if it does not; return its exit code."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_BUDGET_S)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        return str(response.read().decode())


def _parent(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError):
        return -1


def free_port() -> int:
    """Return a port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
