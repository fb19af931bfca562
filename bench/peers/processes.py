"""What the kernel says about a server's processes: who belongs to it, their CPU time and memory (Linux only).

A server's processes are those that
1. carry a mark in their environment, which children inherit (until one writes its title over it, as vLLM's do), or
2. belong to the session that its first process leads, or
3. descend from such a process, or were once seen to be one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

MARK = "BENCH_PEERS_SERVER"

_PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# Fields of /proc/PID/stat, counted from the state, which follows the name in brackets.
_STATE, _PARENT, _SESSION, _USER, _SYSTEM, _STARTED = 0, 1, 3, 11, 12, 19
# Columns of the first line of /proc/stat that are not work: idle and waiting for a disk. What a hypervisor took
# ("steal") counts as work of others; guest time is already in user time.
_IDLE, _IO_WAIT, _GUEST = 3, 4, 8
_AUTOGROUP_TRIES, _AUTOGROUP_PAUSE_S = 20, 0.11


@dataclass(frozen=True, slots=True)
class Process:
    """One live process as /proc shows it; `started_ticks` tells it from a later one with the same id."""

    pid: int
    started_ticks: int
    parent: int = 0
    session: int = 0
    cpu_s: float = 0.0

    @property
    def identity(self) -> tuple[int, int]:
        """What no other process ever shares with it on this boot."""
        return (self.pid, self.started_ticks)


def family(mark: str | None, session: int | None, known: Collection[tuple[int, int]] = ()) -> list[Process]:
    """List the live processes of a server; those of other users are invisible.

    Args:
        mark: value of the mark; None takes every marked process, and the sessions that these belong to.
        session: which its first process leads; None where that is not known.
        known: identities of processes once seen to belong to it.
    """
    everyone = _everyone()
    marked = {p.pid for p in everyone if _has_mark(p.pid, mark)}
    sessions = {session} if mark is not None else {p.session for p in everyone if p.pid in marked}
    found = {p.pid for p in everyone if p.pid in marked or p.session in sessions or p.identity in known}
    while more := {p.pid for p in everyone if p.parent in found} - found:
        found |= more
    return [p for p in everyone if p.pid in found and p.pid != os.getpid()]


def this_process() -> Process:
    """Return this process."""
    found = _read(os.getpid())
    assert found is not None, "a process that asks is alive"
    return found


def _everyone() -> list[Process]:
    found = []
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                found.append(_read(int(entry.name)))
    return [process for process in found if process is not None]


def _has_mark(pid: int, mark: str | None) -> bool:
    wanted = f"{MARK}=".encode() + (mark.encode() + b"\0" if mark is not None else b"")
    try:
        return wanted in (_PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return False


def _read(pid: int) -> Process | None:
    fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    if fields[_STATE] == "Z":
        return None
    cpu_s = (int(fields[_USER]) + int(fields[_SYSTEM])) / _TICKS_PER_S
    return Process(pid, int(fields[_STARTED]), int(fields[_PARENT]), int(fields[_SESSION]), cpu_s)


def command_line(process: Process) -> list[str]:
    """Return program and arguments of a process; empty where it has gone."""
    try:
        text = (_PROC / str(process.pid) / "cmdline").read_bytes()
    except OSError:
        return []
    return text.decode(errors="replace").split("\0")[:-1]


def memory_bytes(processes: Iterable[Process]) -> int:
    """Return the memory of these processes; a page that several share is divided among them."""
    total = 0
    for process in processes:
        with contextlib.suppress(OSError):
            rollup = (_PROC / str(process.pid) / "smaps_rollup").read_text()
            total += sum(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
    return total


def send_signal(process: Process, number: signal.Signals) -> None:
    """Signal exactly this process; one that has gone, whoever has its id by now, is left alone."""
    try:
        handle = os.pidfd_open(process.pid)
    except OSError:
        return
    try:
        # The handle holds on to whoever has the id now: if that is the one we know, the signal can reach nobody else.
        with contextlib.suppress(OSError):  # it may end in between
            now = _read(process.pid)
            if now is not None and now.identity == process.identity:
                signal.pidfd_send_signal(handle, number)
    finally:
        os.close(handle)


def set_niceness(processes: Iterable[Process], niceness: int) -> None:
    """Let these processes come before others (below 0, as root only) or after them; raises PermissionError.

    Where the kernel shares processors out between sessions first ("autogroup"), niceness means nothing between these:
    there, that of the session is set as well.
    """
    for process in processes:
        folder = _PROC / str(process.pid)
        try:
            for thread in (folder / "task").iterdir():
                os.setpriority(os.PRIO_PROCESS, int(thread.name), niceness)
            _set_session(folder / "autogroup", str(niceness))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended, or the kernel knows no autogroups


def _set_session(file: Path, text: str) -> None:
    # The kernel takes one such change in a tenth of a second.
    for _ in range(_AUTOGROUP_TRIES):
        try:
            if file.exists():
                file.write_text(text)
            return
        except BlockingIOError:
            time.sleep(_AUTOGROUP_PAUSE_S)
    raise PermissionError(0, "the kernel does not take the session's niceness", str(file))


def machine_busy_s() -> float:
    """Return the CPU time that all processors have spent on work since boot, time stolen by the hypervisor included."""
    values = [int(v) for v in (_PROC / "stat").read_text().split("\n", 1)[0].split()[1:]]
    busy = sum(values[:_GUEST]) - values[_IDLE] - values[_IO_WAIT]
    return busy / _TICKS_PER_S


def vector_extensions() -> str:
    """Return the processor's vector extensions that matter to language models."""
    lines = [line.partition(":") for line in (_PROC / "cpuinfo").read_text().splitlines()]
    flags = {flag for key, _, value in lines if key.strip() in ("flags", "Features") for flag in value.split()}
    known = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")
    return " ".join(name for name in known if name in flags) or "no vector extensions known here"
