"""What one core, or the GPU, can do at most: measured in the same run as the kernels that are held against it.

    compile ceilings.cpp once ─► run it at the start of every round, on the kernels' own core ─► Ceilings of the round

A shared machine drifts by a factor of two within minutes: a kernel is divided by the floor of its own round.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np
import torch

from bench.kernels.shape import Work

SOURCE: Final = Path(__file__).with_name("ceilings.cpp")
_COMPILE_BUDGET_S = 60.0
_RUN_BUDGET_S = 60.0
_LEAST_LARGE_BYTES, _MOST_LARGE_BYTES = 96 << 20, 2 << 30
_CACHES = "sys/devices/system/cpu/cpu{core}/cache"
_GPU_BYTES = 1 << 30
_GPU_SIDE = 8192


@dataclass(frozen=True, slots=True)
class Floor:
    """The least time of some work, and the ceiling that sets it: memory, cache, float, int8 or int4."""

    seconds: float
    bound: str


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Peaks of one core or one GPU; None where it could not be measured.

    Attributes:
        memory_gb_s: the best of all ways to read memory.
        cache_gb_s: read and written together in the second-level cache; on a GPU memory's.
        float_gop_s: float32 on a core, bfloat16 on a GPU; 10^9 operations a second, as the two below.
        int8_gop_s: products of 8-bit inputs with 8-bit weights.
        int4_gop_s: the same with 4-bit weights, which may be added up in 16 bits.
        details: what each way of reading gave.
    """

    memory_gb_s: float
    cache_gb_s: float | None
    float_gop_s: float | None
    int8_gop_s: float | None
    int4_gop_s: float | None
    details: Mapping[str, float]

    def floor(self, work: Work) -> Floor:
        """Return the least time for so much work: moving bytes and computing may hide behind each other."""
        cache = self.cache_gb_s or self.memory_gb_s
        operations = {
            "float": (work.float_operations, self.float_gop_s),
            "int8": (work.int8_operations, self.int8_gop_s),
            "int4": (work.int4_operations, self.int4_gop_s),
        }
        parts = {name: count / (peak * 1e9) for name, (count, peak) in operations.items() if peak}
        arithmetic = (sum(parts.values()), max(parts, key=lambda name: parts[name])) if parts else (0.0, "")
        # The two kinds of bytes pass one after the other at worst and side by side at best: the larger is the floor.
        moved = max((work.num_bytes / (self.memory_gb_s * 1e9), "memory"), (work.cached_bytes / (cache * 1e9), "cache"))
        return Floor(*max(moved, arithmetic))


def median_of(rounds: Sequence[Ceilings]) -> Ceilings:
    """Return the median of each figure over rounds."""

    def middle(values: list[float | None]) -> float | None:
        present = [value for value in values if value is not None]
        return median(present) if present else None

    return Ceilings(
        memory_gb_s=median(one.memory_gb_s for one in rounds),
        cache_gb_s=middle([one.cache_gb_s for one in rounds]),
        float_gop_s=middle([one.float_gop_s for one in rounds]),
        int8_gop_s=middle([one.int8_gop_s for one in rounds]),
        int4_gop_s=middle([one.int4_gop_s for one in rounds]),
        details={key: median(one.details[key] for one in rounds) for key in rounds[0].details},
    )


class CoreProbe:
    """Measures the core that this thread is pinned to: by a small compiled program, else by numpy and torch.

    Holds a temporary folder until `close`.

    Args:
        large_bytes: size of the buffer that memory is read from, much larger than the last-level cache.
        small_bytes: size of the buffer that fits the second-level cache.

    Attributes:
        how: which of the two it is and why, for the reader.
    """

    def __init__(self, large_bytes: int, small_bytes: int) -> None:
        self._sizes = (large_bytes, small_bytes)
        self._folder = tempfile.TemporaryDirectory(prefix="baton-ceilings-")
        self._program, self.how = _compiled(Path(self._folder.name))

    def measure(self) -> Ceilings:
        """Return this moment's ceilings; takes about half a second."""
        if self._program is None:
            found = _read_by_libraries(self._sizes[0])
        else:
            command = [str(self._program), *map(str, self._sizes)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_RUN_BUDGET_S, check=True)
            found = parse(done.stdout)
        reads = {name: value for name, value in found.items() if name.startswith("read_")}
        return Ceilings(
            memory_gb_s=max(reads.values()),
            cache_gb_s=found.get("cache"),
            float_gop_s=found.get("fma"),
            int8_gop_s=found.get("int8"),
            int4_gop_s=found.get("int4"),
            details=reads,
        )

    def close(self) -> None:
        """Delete the program."""
        self._folder.cleanup()


def parse(output: str) -> dict[str, float]:
    """Read lines of "name value"."""
    return {name: float(value) for name, value in (line.split() for line in output.splitlines())}


def _compiled(folder: Path) -> tuple[Path | None, str]:
    if not SOURCE.is_file():
        return None, f"read by numpy and torch: {SOURCE.name} is not installed; no peaks of arithmetic"
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        return None, "read by numpy and torch: no compiler; no peaks of arithmetic"
    program = folder / "ceilings"
    command = [compiler, "-O3", "-march=native", "-Wno-psabi", str(SOURCE), "-o", str(program)]
    try:
        built = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_BUDGET_S, check=False)
    except subprocess.TimeoutExpired:
        return None, "read by numpy and torch: the compiler took too long; no peaks of arithmetic"
    if built.returncode:
        return None, f"read by numpy and torch: {Path(compiler).name} refused {SOURCE.name}; no peaks of arithmetic"
    return program, f"by a program that {Path(compiler).name} compiled for this processor"


def _read_by_libraries(num_bytes: int) -> dict[str, float]:
    memory = np.ones(num_bytes // 8, np.float64)
    tensor = torch.from_numpy(memory)
    ways: dict[str, Callable[[], object]] = {
        "read_numpy_sum": memory.sum,
        "read_numpy_max": memory.max,
        "read_torch_sum": tensor.sum,
        "read_torch_max": tensor.max,
    }
    found = dict.fromkeys(ways, 0.0)
    for _ in range(3):
        for name, way in ways.items():
            begin_s = time.thread_time()
            way()
            found[name] = max(found[name], memory.nbytes / (time.thread_time() - begin_s) * 1e-9)
    return found


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """Bytes of the second-level and of the last-level cache that a core sees."""

    second: int = 512 << 10
    last: int = 32 << 20

    @property
    def large_bytes(self) -> int:
        """Size of a buffer of which hardly anything can stay in a cache."""
        return min(max(4 * self.last, _LEAST_LARGE_BYTES), _MOST_LARGE_BYTES)

    @property
    def cold_bytes(self) -> int:
        """Size of copies which, taken in turns, are never found in a cache."""
        return min(max(2 * self.last, _LEAST_LARGE_BYTES * 2 // 3), _MOST_LARGE_BYTES // 2)


def cache_sizes(core: int, root: Path = Path("/")) -> CacheSizes:
    """Read the sizes that Linux tells of a core's caches; usual ones where it tells none."""
    levels: dict[int, int] = {}
    for folder in sorted((root / _CACHES.format(core=core)).glob("index*")):
        try:
            level, size = int((folder / "level").read_text()), (folder / "size").read_text().strip()
            if (folder / "type").read_text().strip() == "Instruction":
                continue
        except (OSError, ValueError):
            continue
        if (found := re.fullmatch(r"(\d+)([KMG]?)", size)) is not None:
            levels[level] = int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]]
    if not levels:
        return CacheSizes()
    return CacheSizes(levels.get(2, CacheSizes().second), levels[max(levels)])


def of_gpu() -> Ceilings:
    """Measure the current CUDA device: reading, copying, and products of large bfloat16 matrices; synchronises."""
    source = torch.ones(_GPU_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    x = torch.randn(_GPU_SIDE, _GPU_SIDE, device="cuda", dtype=torch.bfloat16)
    # The least of several: the first ones also load kernels and wake the clocks.
    read_s, copy_s, product_s = (
        min(event_s(call) for _ in range(12)) for call in (source.sum, lambda: target.copy_(source), lambda: x @ x)
    )
    details = {"read": _GPU_BYTES / read_s * 1e-9, "copy": 2 * _GPU_BYTES / copy_s * 1e-9}
    return Ceilings(max(details.values()), None, 2 * _GPU_SIDE**3 / product_s * 1e-9, None, None, details)


def event_s(call: Callable[[], object], count: int = 1) -> float:
    """Return the time of one of `count` calls on the current CUDA stream, by events; synchronises."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3 / count
