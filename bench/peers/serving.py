"""Start a recipe's server on its cores, wait until it answers, and stop it with everything it started.

    start ──► starting ──ready──► serving ──stop──► stopping ──all gone──► stopped
                 │ ended, or not ready in time          │ grace over: SIGKILL to each that is left
                 └────────────► stopping ◄──────────────┘

A server writes to a log file, whose end an error quotes. Its processes are found again by a mark in their environment,
by their session and by descent, however they were forked; `stop_all` also ends what a killed run left behind.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.peers.layout import CHECKOUT
from bench.peers.processes import MARK, Process, command_line, family, memory_bytes, send_signal
from bench.peers.recipes import Recipe
from protocol.errors import BatonError

READY_BUDGET_S = 420.0
STOP_GRACE_S = 20.0
GONE_BUDGET_S = 10.0
_PROBE_BUDGET_S = 2.0
_POLL_S = 0.1
_SHOWN_LINES = 15
# A proxy that the environment names has no business with servers on this machine.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServingError(BatonError):
    """A server could not be started or did not end; says which and shows the end of its log."""


class Server:
    """One running server of a recipe; made by `start`.

    Attributes:
        shown_command: what it was started with, as one would type it.
        start_s: from starting the process until it answered.
    """

    def __init__(self, recipe: Recipe, port: int, log: Path) -> None:
        self.recipe, self.port, self.log = recipe, port, log
        self.url = f"http://127.0.0.1:{port}"
        self.start_s = 0.0
        self._seen: set[tuple[int, int]] = set()
        self._is_stopped = False
        self._mark = uuid.uuid4().hex
        self.shown_command = shown_command(recipe, port)
        command = start_command(recipe, port, self._mark)
        with log.open("wb") as out:
            out.write(f"$ {self.shown_command}\n".encode())
            out.flush()
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def has_ended(self) -> bool:
        """Whether the process that was started is gone."""
        return self._process.poll() is not None

    def processes(self) -> list[Process]:
        """List every live process of this server."""
        if self._is_stopped:
            return []
        found = family(self._mark, self._process.pid, self._seen)
        self._seen |= {process.identity for process in found}
        return found

    def cpu_s(self) -> float:
        """Return the CPU time that its live processes have used so far."""
        return sum(p.cpu_s for p in self.processes())

    def router_cpu_s(self) -> float | None:
        """Return the CPU time of Baton's router among its processes, or None if there is none."""
        found = [p.cpu_s for p in self.processes() if _is_router(command_line(p))]
        return sum(found) if found else None

    def memory_bytes(self) -> int:
        """Return the memory that its live processes hold."""
        return memory_bytes(self.processes())

    def wait_ready(self, budget_s: float = READY_BUDGET_S) -> None:
        """Block until it answers; raises ServingError where it ends first or takes longer."""
        began_s = time.monotonic()
        while not _answers(self.url + self.recipe.ready_path):
            self.processes()  # so that those are known which will no longer look like ours
            if self.has_ended:
                raise ServingError(f"{self.recipe.label}: ended with status {self._process.returncode}{self._tail()}")
            if time.monotonic() - began_s > budget_s:
                raise ServingError(f"{self.recipe.label}: not ready after {budget_s:.0f} s{self._tail()}")
            time.sleep(_POLL_S)
        self.start_s = time.monotonic() - began_s

    def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Ask it to end, then end what is left of it; returns when no process of it lives. Idempotent."""
        if self._is_stopped:
            return
        self.processes()
        if not self.has_ended:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
        _end(self.processes, self.recipe.label)
        self._process.wait(GONE_BUDGET_S)
        # From here on the kernel may give its id, which names the session, to somebody else.
        self._is_stopped = True

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]
        return "\n  " + "\n  ".join(lines) + f"\n(the whole log: {self.log})"


@contextlib.contextmanager
def serving(recipe: Recipe, logs: Path, ready_budget_s: float = READY_BUDGET_S) -> Iterator[Server]:
    """Start a server, yield it when it answers, stop it surely. Raises ServingError."""
    logs.mkdir(parents=True, exist_ok=True)
    server = Server(recipe, free_port(), logs / f"{recipe.slug}.log")
    try:
        server.wait_ready(ready_budget_s)
        yield server
    finally:
        server.stop()


def start_command(recipe: Recipe, port: int, mark: str | None = None) -> list[str]:
    """Return the whole command line: pinned to its cores, with its environment and, where given, the mark."""
    pinned = ["taskset", "-c", ",".join(str(core) for core in recipe.cores)]
    environment = [f"{name}={value}" for name, value in recipe.environment]
    if mark is not None:
        environment.append(f"{MARK}={mark}")
    command = [part.replace("{port}", str(port)) for part in recipe.command]
    return [*pinned, *(["env", *environment] if environment else []), *command]


def shown_command(recipe: Recipe, port: int) -> str:
    """Return the command line as one would type it in the checkout."""
    return shlex.join(start_command(recipe, port)).replace(f"{CHECKOUT}/", "").replace(str(CHECKOUT), ".")


def stop_all() -> int:
    """End every server that an earlier run left behind; return how many processes that were."""
    left = family(None, None)
    for process in left:
        send_signal(process, signal.SIGTERM)
    give_up_s = time.monotonic() + STOP_GRACE_S
    while family(None, None) and time.monotonic() < give_up_s:
        time.sleep(_POLL_S)
    seen = {process.identity for process in left}
    _end(lambda: family(None, None, seen), "servers left behind")
    return len(left)


def free_port() -> int:
    """Return a port of the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end(family_of: Callable[[], list[Process]], label: str) -> None:
    """Kill what belongs to a server until nothing does: a process may fork while it is being looked for."""
    give_up_s = time.monotonic() + GONE_BUDGET_S
    while left := family_of():
        if time.monotonic() > give_up_s:
            raise ServingError(f"{label}: processes {[p.pid for p in left]} do not end")
        for process in left:
            send_signal(process, signal.SIGKILL)
        time.sleep(_POLL_S)


def _is_router(command: list[str]) -> bool:
    return any(pair == ("baton", "router") for pair in zip(command, command[1:], strict=False))


def _answers(url: str) -> bool:
    try:
        with _OPENER.open(url, timeout=_PROBE_BUDGET_S) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
