"""Compile every kernel for Hopper, on a machine with or without a GPU, and say what each one needs of the chip.

1. Every subject keeps its cases in a file `hopper_<subject>.py` beside this one, in a function `cases()`.
2. `python -m tests.kernels.gpu.hopper [part of a name]` compiles them for compute capability 9.0 (never in Triton's
   interpreter: TRITON_INTERPRET must not be set) and prints one JSON object a line, a `HopperReport` per case.
3. `test_hopper.py` runs that once and holds each report against the limits of the chip.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tests.kernels.gpu as package

# What one thread block may use of a multiprocessor of compute capability 9.0.
MAX_SHARED_BYTES = 232_448
# Float arithmetic in machine code: what may round, and so may differ between two copies of one loop.
ARITHMETIC = re.compile(r"\b(FFMA|FMUL|FADD|MUFU\.EX2|HMMA|HGMMA|QGMMA)\b")
# What tells in PTX how the tensor cores are fed and used.
INSTRUCTIONS = (
    "wgmma.mma_async",
    "mma.sync",
    "cp.async.cg",
    "cp.async.ca",
    "cp.async.bulk",
    "ld.global",
    "atom.global",
)


@dataclass(frozen=True, slots=True)
class HopperCase:
    """One kernel with the types and constants of one launch.

    signature: the type of each run-time argument by name: "*bf16", "*fp32", "*i32", "*fp8e4nv", "i32", "fp32", ...
    constexprs: the value of each constexpr argument by name (they need not stand in the signature).
    aligned: the integer arguments that are divisible by 16 at run time; every pointer is taken to be so, except those
    in `unaligned`. Triton sees it at launch by itself; here it decides whether loads become 16-byte copies.
    with_loops: report `loops`, which takes most of a second.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    unaligned: tuple[str, ...] = ()
    with_loops: bool = False


@dataclass(frozen=True, slots=True)
class HopperReport:
    """What the compiler made of a case; `error` is the compiler's message where it made nothing.

    registers: per thread. spilled_bytes: stack of one thread (Triton has no use for a stack but spills).
    blocks_per_multiprocessor: how many thread blocks fit at once, by registers, shared memory and warps.
    instructions: how often each of `INSTRUCTIONS` stands in the PTX.
    loops: how often each kind of `ARITHMETIC` stands in each loop of the machine code that has any, in order.
    """

    name: str
    shared_bytes: int = 0
    registers: int = 0
    spilled_bytes: int = 0
    blocks_per_multiprocessor: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    loops: list[dict[str, int]] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""


def find_cases() -> list[HopperCase]:
    """Collect the cases of every subject; a name may stand only once."""
    found: list[HopperCase] = []
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda module: module.name):
        if module.name.startswith("hopper_"):
            found.extend(importlib.import_module(f"{package.__name__}.{module.name}").cases())
    names = [case.name for case in found]
    assert len(names) == len(set(names)), "two cases of one name"
    return found


def compile_case(case: HopperCase) -> Any:
    """Compile a case for sm_90; returns Triton's CompiledKernel (`asm["ptx"]`, `asm["cubin"]`, `metadata`)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(case.kernel.arg_names)
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    constexprs = {name: case.constexprs[name] for name in names if signature[name] == "constexpr"}
    aligned = {
        name
        for name, kind in signature.items()
        if name in case.aligned or (kind.startswith("*") and name not in case.unaligned)
    }
    attrs = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name in aligned}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def report_case(case: HopperCase) -> HopperReport:
    """Compile a case and read registers and stack from its machine code."""
    start = time.perf_counter()
    try:
        compiled = compile_case(case)
    except Exception as error:  # noqa: BLE001 - one kernel that does not compile must not hide the others
        return HopperReport(case.name, error=f"{type(error).__name__}: {error}")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        registers, spilled_bytes = _resources(cubin)
        loops = _loops(cubin) if case.with_loops else []
    shared_bytes = int(compiled.metadata.shared)
    ptx: str = compiled.asm["ptx"]
    return HopperReport(
        name=case.name,
        shared_bytes=shared_bytes,
        registers=registers,
        spilled_bytes=spilled_bytes,
        blocks_per_multiprocessor=_blocks_per_multiprocessor(registers, shared_bytes, compiled.metadata.num_warps),
        loops=loops,
        instructions={word: count for word in INSTRUCTIONS if (count := ptx.count(word))},
        seconds=round(time.perf_counter() - start, 2),
    )


def _resources(cubin: Path) -> tuple[int, int]:
    import triton

    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    assert figures is not None, text
    registers, stack, local = (int(figure) for figure in figures.groups())
    return registers, stack + local


def _loops(cubin: Path) -> list[dict[str, int]]:
    import triton

    command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(cubin)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    labels = {line.strip().removesuffix(":"): number for number, line in enumerate(lines) if line.startswith(".L_")}
    found = []
    for number, line in enumerate(lines):
        branch = re.search(r"BRA.*`\((\.L_\w+)\)", line)
        first = labels.get(branch.group(1), number) if branch else number
        counts = Counter(word for inner in lines[first:number] for word in ARITHMETIC.findall(inner))
        if counts:
            found.append(dict(sorted(counts.items())))
    return found


def _blocks_per_multiprocessor(registers: int, shared_bytes: int, num_warps: int) -> int:
    """Count the blocks that fit: 65,536 registers (given to warps by 256), 64 warps, 228 KiB less 1 KiB per block."""
    registers_per_warp = -(-registers * 32 // 256) * 256
    return min(65_536 // (registers_per_warp * num_warps), 64 // num_warps, 233_472 // (shared_bytes + 1024), 32)


def _report_by_name(name: str) -> HopperReport:
    return report_case(next(case for case in find_cases() if case.name == name))


def main() -> None:
    """Print a report for every case whose name contains the first argument."""
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    names = [case.name for case in find_cases() if wanted in case.name]
    num_workers = min(len(os.sched_getaffinity(0)), 4)
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as workers:
        for report in workers.map(_report_by_name, names):
            print(json.dumps(asdict(report)), flush=True)


if __name__ == "__main__":
    main()
