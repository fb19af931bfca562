"""What the kernel says about a server's processes: who belongs to it, their CPU time and memory (Linux only).

A server's processes are found by a mark in their environment, which children inherit: also those that made a session
of their own or whose parent has died.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

MARK = "BENCH_PEERS_SERVER"

_PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# Fields of /proc/PID/stat, counted from the state, which follows the name in brackets.
_STATE, _USER, _SYSTEM, _STARTED = 0, 11, 12, 19
# Columns of the first line of /proc/stat that are not work: idle and waiting for a disk. What a hypervisor took
# ("steal") counts as work of others; guest time is already in user time.
_IDLE, _IO_WAIT, _GUEST = 3, 4, 8


@dataclass(frozen=True, slots=True)
class Process:
    """One live process as /proc shows it; `started_ticks` tells it from a later one with the same id."""

    pid: int
    started_ticks: int
    cpu_s: float


def marked(value: str | None = None) -> list[Process]:
    """List live processes that carry this mark, or any mark; those of other users are invisible."""
    return list(_marked(value))


def _marked(value: str | None) -> Iterator[Process]:
    wanted = f"{MARK}=".encode() + (value.encode() + b"\0" if value is not None else b"")
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if wanted in (entry / "environ").read_bytes() and (process := _read(int(entry.name))) is not None:
                yield process


def _read(pid: int) -> Process | None:
    fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    if fields[_STATE] == "Z":
        return None
    cpu_s = (int(fields[_USER]) + int(fields[_SYSTEM])) / _TICKS_PER_S
    return Process(pid, int(fields[_STARTED]), cpu_s)


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
        now = _read(process.pid)
        if now is not None and now.started_ticks == process.started_ticks:
            signal.pidfd_send_signal(handle, number)
    except OSError:
        pass  # it ended in between
    finally:
        os.close(handle)


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
