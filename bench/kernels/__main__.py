"""`python -m bench.kernels`: every kernel beside its floor, on this machine's CPU, and on its GPU where there is one.

1. Pin this thread to one core.
2. Build the native cases and their torch counterparts; measure them in rounds, each with ceilings of its own.
3. The same for the torch kernels on the GPU, with events, where there is one.
4. Print tables; write JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.kernels import ceilings
from bench.kernels.batches import QUICK, Menu, Pools
from bench.kernels.ceilings import CoreProbe
from bench.kernels.native import NativeCases
from bench.kernels.plain import PlainCases, Setting
from bench.kernels.report import as_json, ceilings_lines, tables_of
from bench.kernels.shape import Shape
from bench.kernels.timing import Bench, Case, CudaStopwatch, Plan, ThreadStopwatch
from bench.machine import machine
from kernels.cpu import native
from kernels.cpu.native import NativeKernels, NativeUnavailableError

REPORT_COLUMNS = 120
_PLAN, _QUICK_PLAN = Plan(7, 240.0, 5e-3), Plan(3, 40.0, 2e-3)
# Options and the fields they set.
_SIZES = {
    "hidden": "hidden",
    "intermediate": "intermediate",
    "heads": "num_heads",
    "kv-heads": "num_kv_heads",
    "head-dim": "head_dim",
    "layers": "num_layers",
    "vocab": "vocab",
}
_GPU_ROW_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class Wish:
    """What the command line asks for."""

    shape: Shape
    menu: Menu
    plan: Plan
    only: re.Pattern[str]
    core: int
    instruction_set: str | None

    def keep(self, cases: Iterable[Case]) -> list[Case]:
        """Return the cases that --only names."""
        return [case for case in cases if self.only.search(case.title)]


class Teller:
    """A line of progress that renews itself on a terminal; elsewhere nothing."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, text: str) -> None:
        """Show what is being done."""
        if self._console.is_terminal:
            width = self._console.width - 1
            self._console.print(text[:width].ljust(width), end="\r", markup=False, highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 2 where nothing could be measured."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        wish = _wish(args)
    except ValueError as error:
        parser.error(str(error))
    console = Console() if sys.stdout.isatty() else Console(width=REPORT_COLUMNS)
    before, num_threads = os.sched_getaffinity(0), torch.get_num_threads()
    results: dict[str, Any] = {}
    try:
        os.sched_setaffinity(0, {wish.core})
        torch.set_num_threads(1)
        with torch.inference_mode():
            for name, measure in (("cpu", _on_core), ("gpu", _on_gpu)):
                if (found := measure(wish, console)) is not None:
                    results[name] = found
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(num_threads)
    if args.json is not None:
        about: dict[str, Any] = {"machine": machine(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
        about |= {"shape": dataclasses.asdict(wish.shape), "core": wish.core}
        args.json.write_text(json.dumps({**about, **results}, indent=1) + "\n")
    return 0 if results else 2


def _on_core(wish: Wish, console: Console) -> dict[str, Any] | None:
    try:
        kernels = NativeKernels(native.load(), 1, wish.instruction_set)
    except NativeUnavailableError as error:
        console.print(f"no native kernels: {error}", markup=False)
        return None
    sizes = ceilings.cache_sizes(wish.core)
    pools = Pools(wish.shape, wish.menu, "cpu", sizes.cold_bytes)
    cases = wish.keep(NativeCases(kernels, wish.shape, wish.menu, sizes, pools).all())
    if not cases:
        console.print(f"no case matches {wish.only.pattern!r}", markup=False)
        return None
    setting = Setting("cpu", torch.float32, "f32", sizes.cold_bytes, sizes.second // 2, 64)
    plain = {case.name: case for case in PlainCases(wish.shape, wish.menu, setting, pools).all()}
    probe = CoreProbe(sizes.large_bytes, sizes.second // 2)
    try:
        bench = Bench(cases, plain, ThreadStopwatch(), wish.plan, Teller(console))
        timings, rounds = bench.run(probe.measure)
    finally:
        probe.close()
    console.print(f"native kernels ({kernels.instruction_set}) on core {wish.core}: {machine()}", markup=False)
    console.print("\n".join(ceilings_lines(rounds, probe.how)), markup=False, highlight=False)
    for table in tables_of(timings, "CPU time"):
        console.print(table)
    return {"instruction_set": kernels.instruction_set, **as_json(timings, rounds, probe.how)}


def _on_gpu(wish: Wish, console: Console) -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        console.print("no CUDA device here: the GPU's part is left out")
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    cold_bytes = 4 * int(getattr(properties, "L2_cache_size", 64 << 20))
    shape = dataclasses.replace(wish.shape, activation_bytes=2)
    menu = dataclasses.replace(wish.menu, kv_dtypes=(torch.bfloat16,))
    setting = Setting("cuda", torch.bfloat16, "bf16", cold_bytes, _GPU_ROW_BYTES, 4096)
    cases = wish.keep(PlainCases(shape, menu, setting, Pools(shape, menu, "cuda", cold_bytes)).all())
    if not cases:
        console.print(f"no case matches {wish.only.pattern!r}", markup=False)
        return None
    how = "by torch, matrix products in bfloat16"
    bench = Bench(cases, {}, CudaStopwatch(), wish.plan, Teller(console))
    timings, rounds = bench.run(ceilings.of_gpu)
    console.print(f"torch kernels in bfloat16 on {properties.name}", markup=False)
    console.print("\n".join(ceilings_lines(rounds, how)), markup=False, highlight=False)
    for table in tables_of(timings, "event time"):
        console.print(table)
    return {"device": properties.name, **as_json(timings, rounds, how)}


def _wish(args: argparse.Namespace) -> Wish:
    shape = Shape(**{field: getattr(args, field) for field in _SIZES.values()})
    _check(shape)
    usable = sorted(os.sched_getaffinity(0))
    core = usable[-1] if args.core is None else args.core
    if core not in usable:
        raise ValueError(f"--core {core}: this process may use {', '.join(map(str, usable))}")
    menu, plan = (QUICK, _QUICK_PLAN) if args.quick else (Menu(), _PLAN)
    if args.each_matrix:
        menu = dataclasses.replace(menu, each_matrix=True)
    if args.rounds is not None:
        plan = dataclasses.replace(plan, rounds=args.rounds)
    if plan.rounds < 1:
        raise ValueError("--rounds: at least one")
    try:
        only = re.compile(args.only)
    except re.error as error:
        raise ValueError(f"--only: {error}") from error
    return Wish(shape, menu, plan, only, core, args.instruction_set)


def _check(shape: Shape) -> None:
    needs: tuple[tuple[str, Callable[[Shape], bool]], ...] = (
        ("every size must be positive", lambda s: min(getattr(s, field) for field in _SIZES.values()) > 0),
        ("--hidden and --intermediate are multiples of 32", lambda s: s.hidden % 32 == s.intermediate % 32 == 0),
        ("--head-dim is a multiple of 16", lambda s: s.head_dim % 16 == 0),
        ("--heads is a multiple of --kv-heads", lambda s: s.num_heads % s.num_kv_heads == 0),
        ("--heads times --head-dim is a multiple of 32", lambda s: s.num_heads * s.head_dim % 32 == 0),
    )
    for text, holds in needs:
        if not holds(shape):
            raise ValueError(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: under a minute")
    parser.add_argument("--only", default="", metavar="PATTERN", help="only cases whose 'group: name' matches")
    parser.add_argument("--each-matrix", action="store_true", help="products with each matrix of a layer too")
    parser.add_argument("--rounds", type=int, help=f"rounds at most ({_PLAN.rounds}; quick {_QUICK_PLAN.rounds})")
    parser.add_argument("--core", type=int, help="core to run on (the last usable one)")
    parser.add_argument("--instruction-set", help="portable, avx2 or avx512 (the best)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    shape = Shape()
    for option, field in _SIZES.items():
        parser.add_argument(f"--{option}", dest=field, type=int, default=getattr(shape, field))
    return parser


if __name__ == "__main__":
    sys.exit(main())
