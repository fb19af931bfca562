"""A step of one batch size as CUDA graphs: one, or several with its attention launched between them.

    graph ─► attention ─► graph ─► attention ─► ... ─► graph

The engine records a graph for every batch size (`engine.graphs`); this is for sections that need one size, on a stream
of their own, or cut as vLLM's piecewise mode cuts.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from engine.decode_runner import Compute
from engine.device_queue import CudaQueue, DeviceQueue

Attend = Callable[..., Tensor]
_NUM_PLAIN_RUNS: Final = 2
_cuda: Any = torch.cuda  # its classes carry no types


class Graph(Protocol):
    """What a piece is recorded into."""

    def capture_begin(self, pool: Any) -> None:
        """Record from now on."""

    def capture_end(self) -> None:
        """Stop recording."""

    def replay(self) -> None:
        """Run what was recorded."""


class NoGraph:
    """What stands for a graph on a CPU: it records nothing and runs nothing."""

    def capture_begin(self, pool: Any) -> None:
        """Do nothing."""

    def capture_end(self) -> None:
        """Do nothing."""

    def replay(self) -> None:
        """Do nothing."""


class RecordedStep:
    """A `Compute` of one batch size. On a CPU the pieces are empty, and the step itself runs after them.

    Args:
        batch: lanes of the step.
        queue: whose stream it is recorded on; replays go to whatever stream is current.

    Attributes:
        graphs: one more than there are cuts.
    """

    def __init__(self, batch: int, queue: DeviceQueue) -> None:
        self._batch, self._queue = batch, queue
        self._is_gpu = isinstance(queue, CudaQueue)
        self._pool = _cuda.graph_pool_handle() if self._is_gpu else None
        self.graphs: list[Graph] = []
        self._between: list[Callable[[], object]] = []
        self._is_recording = False
        self._step: Compute | None = None
        self._logits: Tensor | None = None

    def cutting(self, attend: Attend) -> Attend:
        """Give the attention that the step must call in order to be cut there.

        Its result goes where the next piece looks for it by a copy: the kernel writes into memory of its own choice.
        """

        def cut(query: Tensor, *args: Any) -> Tensor:
            if not self._is_recording:
                return attend(query, *args)
            out = torch.empty_like(query)
            self.graphs[-1].capture_end()
            self._between.append(lambda: out.copy_(attend(query, *args)))
            self._begin_piece()
            return out

        return cut

    def record(self, step: Compute) -> RecordedStep:
        """Run the step plainly, so that kernels are compiled, then record it. Every lane must be dead."""
        self._step = step
        with self._queue.active():
            for _ in range(_NUM_PLAIN_RUNS):
                step(self._batch, False)
            self._queue.mark().wait()
            # A collection in the middle could free device memory, which recording forbids.
            gc.collect()
            gc.disable()
            self._is_recording = True
            try:
                self._begin_piece()
                self._logits = step(self._batch, False)
                self.graphs[-1].capture_end()
            finally:
                self._is_recording = False
                gc.enable()
        return self

    def __call__(self, num_lanes: int, adjusts: bool) -> Tensor:
        """Run the pieces and what is between them; see `Compute`."""
        assert num_lanes == self._batch and not adjusts
        assert self._step is not None and self._logits is not None, "nothing is recorded"
        with torch.inference_mode():
            for graph, attend in zip(self.graphs, self._between, strict=False):
                graph.replay()
                attend()
            self.graphs[-1].replay()
        return self._logits if self._is_gpu else self._step(num_lanes, adjusts)

    def _begin_piece(self) -> None:
        self.graphs.append(_cuda.CUDAGraph() if self._is_gpu else NoGraph())
        self.graphs[-1].capture_begin(self._pool)
