"""`python -m bench.kernels`: every kernel beside its floor, on this machine's CPU, and on its GPU where there is one.

    ceilings of one core ─► cases, all of them once a round, several rounds ─► medians ─► time / floor

Rounds, because the speed of a shared machine drifts: figures of one table were taken side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.kernels import ceilings
from bench.kernels.cases import Case, Shape, attentions, linears, rows, steps
from bench.kernels.ceilings import Ceilings
from bench.kernels.gpu import gpu_cases
from kernels.cpu import native
from kernels.cpu.native import NativeKernels, NativeUnavailableError

REPORT_COLUMNS = 120
_SHORTEST_S = 2e-4
_ROWS, _QUICK_ROWS = (1, 2, 4, 8, 16, 64, 256), (1, 8)


@dataclass(frozen=True, slots=True)
class Timing:
    """One kernel's figures; times are medians over rounds, of thread CPU time on a CPU and of events on a GPU.

    Attributes:
        wall_s: median wall time: above time_s where the core was taken away.
        plain_s: torch's time for the same, or None.
    """

    name: str
    time_s: float
    least_s: float
    wall_s: float
    floor_s: float
    plain_s: float | None

    @property
    def over_floor(self) -> float:
        """Time over floor: 1 is as fast as memory or arithmetic allow."""
        return self.time_s / self.floor_s


def measure(cases: Sequence[Case], peaks: Ceilings, num_rounds: int, say: Console) -> list[Timing]:
    """Run every case once a round and return the medians."""
    taken: list[list[tuple[float, float]]] = [[] for _ in cases]
    plain: list[list[float]] = [[] for _ in cases]
    for number in range(num_rounds):
        for case, times, others in zip(cases, taken, plain, strict=True):
            times.append(_timed(case.run))
            if case.plain is not None:
                others.append(_timed(case.plain)[0])
        if say.is_terminal:
            say.print(f"round {number + 1} of {num_rounds}", end="\r")
    found = []
    for case, times, others in zip(cases, taken, plain, strict=True):
        cpu, wall = np.array(times).T
        floor_s = peaks.floor_s(case.num_bytes, case.num_operations, is_integer=case.is_integer)
        plain_s = float(np.median(others)) if others else None
        median = float(np.median(cpu))
        found.append(Timing(case.name, median, float(cpu.min()), float(np.median(wall)), floor_s, plain_s))
    return found


def _timed(call: Callable[[], object]) -> tuple[float, float]:
    """Return CPU and wall time of one call, repeated until the clock can tell."""
    count = 0
    cpu_s, wall_s = time.thread_time(), time.perf_counter()
    while not count or time.thread_time() - cpu_s < _SHORTEST_S:
        call()
        count += 1
    return (time.thread_time() - cpu_s) / count, (time.perf_counter() - wall_s) / count


def cpu_cases(kernels: NativeKernels, shape: Shape, *, is_quick: bool) -> Iterator[Case]:
    """Give every case of the native library."""
    yield from linears(kernels, shape, _QUICK_ROWS if is_quick else _ROWS)
    yield from attentions(kernels, shape)
    yield from rows(kernels, shape)
    for format_name in ("q4_1",) if is_quick else ("q4_0", "q4_1", "q8_0", "f32"):
        yield from steps(kernels, shape, format_name)


def table_of(timings: Sequence[Timing], peaks: Ceilings) -> Table:
    """Lay the figures out."""
    title = f"{peaks.how}: {peaks.read_gb_s:.1f} GB/s"
    if peaks.float_gflop_s:
        title += f", {peaks.float_gflop_s:.0f} GFLOP/s"
    if peaks.int8_gop_s:
        title += f", {peaks.int8_gop_s:.0f} int8 GOP/s"
    table = Table("kernel", title=title)
    for column in ("time", "least", "floor", "time / floor", "torch / time"):
        table.add_column(column, justify="right")
    for t in timings:
        ratio = "-" if t.plain_s is None else f"{t.plain_s / t.time_s:.1f}"
        table.add_row(t.name, *(_shown(s) for s in (t.time_s, t.least_s, t.floor_s)), f"{t.over_floor:.2f}", ratio)
    return table


def _shown(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    parser.add_argument("--only", default="", metavar="PATTERN", help="only cases whose name matches")
    parser.add_argument("--rounds", type=int, help="times that each case is measured (7; quick 3)")
    parser.add_argument("--core", type=int, help="core to run on (the last usable one)")
    parser.add_argument("--instruction-set", help="portable, avx2 or avx512 (the best)")
    parser.add_argument("--json", type=Path)
    shape = Shape()
    for name in Shape.__slots__:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(shape, name))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 2 where nothing can be measured."""
    args = _parser().parse_args(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=REPORT_COLUMNS)
    shape = Shape(**{name: getattr(args, name) for name in Shape.__slots__})
    num_rounds = args.rounds or (3 if args.quick else 7)
    usable = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {usable[-1] if args.core is None else args.core})
    torch.set_num_threads(1)
    results: dict[str, object] = {}
    try:
        kernels = NativeKernels(native.load(), 1, args.instruction_set)
    except NativeUnavailableError as error:
        console.print(f"no native kernels: {error}")
    else:
        cases = [c for c in cpu_cases(kernels, shape, is_quick=args.quick) if re.search(args.only, c.name)]
        peaks = ceilings.of_core()
        timings = measure(cases, peaks, num_rounds, console)
        console.print(f"native kernels, {kernels.instruction_set}")
        console.print(table_of(timings, peaks))
        results["cpu"] = {"peaks": asdict(peaks), "timings": [asdict(t) for t in timings]}
    if torch.cuda.is_available():
        results["gpu"] = _on_gpu(shape, num_rounds, args.only, console)
    else:
        console.print("no GPU here: its part is left out")
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if results else 2


def _on_gpu(shape: Shape, num_rounds: int, only: str, console: Console) -> dict[str, object]:
    peaks = ceilings.of_gpu()
    timings = []
    for case, time_s in gpu_cases(shape, num_rounds):
        if re.search(only, case.name):
            floor_s = peaks.floor_s(case.num_bytes, case.num_operations, is_integer=False)
            timings.append(Timing(case.name, time_s, time_s, time_s, floor_s, None))
    console.print(table_of(timings, peaks))
    return {"peaks": asdict(peaks), "timings": [asdict(t) for t in timings]}


if __name__ == "__main__":
    sys.exit(main())
