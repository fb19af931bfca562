"""What one core, or the GPU, can do at most: measured in the same run as the kernels that are held against it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

SOURCE = Path(__file__).with_name("ceilings.cpp")
_COMPILE_BUDGET_S = 60.0
_RUN_BUDGET_S = 60.0


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Peaks of one core or one GPU; None where it could not be measured.

    Attributes:
        how: one line for the reader.
    """

    read_gb_s: float
    float_gflop_s: float | None
    int8_gop_s: float | None
    how: str

    def floor_s(self, num_bytes: float, num_operations: float, *, is_integer: bool) -> float:
        """Return the least time for so much work: the larger of bytes over bandwidth and operations over peak."""
        peak = self.int8_gop_s if is_integer else self.float_gflop_s
        arithmetic_s = num_operations / (peak * 1e9) if peak else 0.0
        return max(num_bytes / (self.read_gb_s * 1e9), arithmetic_s)


def of_core() -> Ceilings:
    """Measure the core that this process is pinned to, with a compiled program where there is a compiler."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is not None:
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder) / "ceilings"
            command = [compiler, "-O2", "-march=native", "-Wno-psabi", str(SOURCE), "-o", str(program)]
            built = subprocess.run(command, capture_output=True, timeout=_COMPILE_BUDGET_S, check=False)
            if built.returncode == 0:
                done = subprocess.run([program], capture_output=True, text=True, timeout=_RUN_BUDGET_S, check=True)
                read, floats, integers = (float(word) for word in done.stdout.split())
                return Ceilings(read, floats, integers, "one core, compiled for this machine")
    return Ceilings(_numpy_read_gb_s(), None, None, "one core, bandwidth by numpy; no compiler for the rest")


def of_gpu() -> Ceilings:
    """Measure the current CUDA device: a copy's bandwidth, and half-precision matrix products."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_s = min(event_s(lambda: target.copy_(source)) for _ in range(6))
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product_s = min(event_s(lambda: x @ x) for _ in range(6))
    name = torch.cuda.get_device_name()
    moved_gb_s, gflop_s = 2 * source.numel() / copy_s * 1e-9, 2 * 8192**3 / product_s * 1e-9
    return Ceilings(moved_gb_s, gflop_s, None, f"{name}: copy, bf16")


def event_s(call: Callable[[], object]) -> float:
    """Time one call on the current CUDA stream, by events; synchronises."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3


def _numpy_read_gb_s() -> float:
    memory = np.ones(24 << 20, np.float64)
    best = 0.0
    for _ in range(5):
        begin_s = time.thread_time()
        memory.sum()
        best = max(best, memory.nbytes / (time.thread_time() - begin_s) * 1e-9)
    return best
