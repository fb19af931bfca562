"""One CUDA graph per batch size, recorded once: a decode step is then one launch.

1. Sizes are recorded from the largest down, so that all share the memory of the first; each keeps logits of its own.
2. Before each is recorded the step runs plainly, twice: kernels are compiled and libraries choose their algorithms.
3. While recording, every lane is dead: nothing is written and nobody's tokens move.
4. A replay takes its input from the lanes' tensors and leaves logits in the graph's own.

Each size has two graphs: one for batches where some sequence adjusts its logits (penalties, bias, bars), which most do
not, and one that goes straight from the model's logits to the choice.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.decode_runner import Compute
from engine.device_queue import CudaQueue
from engine.lane_table import bucket_sizes

_NUM_PLAIN_RUNS = 2


@dataclass(frozen=True, slots=True)
class CaptureSummary:
    """What recording took."""

    num_graphs: int
    capture_s: float
    num_bytes: int

    def __str__(self) -> str:
        """Say it in one line."""
        return f"{self.num_graphs} CUDA graphs in {self.capture_s:.1f} s, {self.num_bytes / (1 << 20):.0f} MiB"


class GraphedStep:
    """A `Compute` that replays graphs of another one.

    Args:
        compute: the step; must neither synchronise nor read the host while it runs.
        queue: whose stream the graphs are recorded on. Replays go to whatever stream is current.
        max_lanes: the largest batch.
        say: takes a line of progress.

    Holds the graphs' memory for as long as it lives.
    """

    def __init__(self, compute: Compute, queue: CudaQueue, max_lanes: int, say: Callable[[str], None]) -> None:
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        started_s, free_bytes = time.monotonic(), torch.cuda.mem_get_info(queue.device)[0]
        sizes = bucket_sizes(max_lanes)[::-1]
        pool = torch.cuda.graph_pool_handle()
        last_said_s = started_s
        # A collection in the middle of a recording could free device memory, which recording forbids.
        gc.collect()
        gc.disable()
        try:
            for number, size in enumerate(sizes):
                for adjusts in (True, False):
                    self._graphs[size, adjusts] = _record(compute, queue, pool, size, adjusts)
                if time.monotonic() - last_said_s > 1.0:
                    last_said_s = time.monotonic()
                    say(f"recording CUDA graphs: {number + 1} of {len(sizes)} batch sizes")
        finally:
            gc.enable()
        queue.stream.synchronize()
        taken_bytes = max(0, free_bytes - torch.cuda.mem_get_info(queue.device)[0])
        self.summary = CaptureSummary(len(self._graphs), time.monotonic() - started_s, taken_bytes)

    def __call__(self, num_lanes: int, adjusts: bool) -> Tensor:
        """Replay the step of a batch size that was recorded. The logits hold until the next replay of any."""
        graph, logits = self._graphs[num_lanes, adjusts]
        graph.replay()
        return logits


def _record(
    compute: Compute, queue: CudaQueue, pool: Any, size: int, adjusts: bool
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    with torch.cuda.stream(queue.stream):
        for _ in range(_NUM_PLAIN_RUNS):
            compute(size, adjusts)
    queue.stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    # What other threads do meanwhile (a transfer, say) is none of this recording's business.
    with torch.cuda.graph(graph, pool=pool, stream=queue.stream, capture_error_mode="thread_local"):
        logits = compute(size, adjusts)
    return graph, logits
