"""What a GPU can do at most: reading, copying, and products of large bfloat16 matrices, on random data.

A copy moves every byte twice, and so it is counted. Floors are bytes over the bandwidth of the copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from bench.gpu.timing import median_s
from engine.device_queue import DeviceQueue


@dataclass(frozen=True, slots=True)
class ProbeSizes:
    """How much is moved and multiplied, and how often each is timed."""

    num_bytes: int = 4 << 30
    side: int = 8192
    num_rounds: int = 15


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured peaks, in bytes and operations a second.

    Attributes:
        reads: what each way of reading gave.
    """

    read_bytes_per_s: float
    copy_bytes_per_s: float
    operations_per_s: float
    reads: dict[str, float] = field(default_factory=dict)


def measure_ceilings(queue: DeviceQueue, sizes: ProbeSizes) -> Ceilings:
    """Measure; takes a second or two and three times `num_bytes` of memory at most."""
    dtype = torch.bfloat16 if queue.device.type == "cuda" else torch.float32
    with queue.active():
        source = torch.empty(sizes.num_bytes // dtype.itemsize, dtype=dtype, device=queue.device).normal_()
        target = torch.empty_like(source)
        words = source.view(torch.int32)
        left, right = (torch.randn(sizes.side, sizes.side, device=queue.device).to(dtype) for _ in range(2))

    def seconds(call: Callable[[], object]) -> float:
        return median_s([call], queue, sizes.num_rounds, in_graph=False)

    rows = words.view(-1, min(4096, words.numel()))
    ways: dict[str, Callable[[], object]] = {
        "largest": lambda: words.amax(),
        "largest of rows": lambda: rows.amax(1),
        "sum": lambda: source.sum(),
    }
    reads = {name: source.nbytes / seconds(way) for name, way in ways.items()}
    return Ceilings(
        read_bytes_per_s=max(reads.values()),
        copy_bytes_per_s=2 * source.nbytes / seconds(lambda: target.copy_(source)),
        operations_per_s=2.0 * sizes.side**3 / seconds(lambda: left @ right),
        reads=reads,
    )
