"""Recording and replaying, with a stand-in for CUDA's graphs: what is recorded, in which order, and what a replay does.

The real ones are in tests/gpu; this shows that what drives them is sound.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from decode.scheduler import DecodeScheduler
from decode.stepper import DecodeStepper
from engine.decode_runner import LaneDecodeRunner, LaneStep
from engine.device_queue import HostQueue
from engine.execution import lane_sizes
from engine.graphs import GraphedStep
from engine.lane_state import LaneState
from model.torch_decoder import TorchDecoder
from tests.decode.pair import Pair, params, prompt_of
from tests.engine.tiny import tiny_model


class RecordedGraph:
    """Stands for a graph: a replay runs the step again and leaves its result where the recording left it."""

    recording: RecordedGraph | None = None

    def __init__(self) -> None:
        self.run: Callable[[], Tensor] | None = None
        self.logits: Tensor | None = None

    def replay(self) -> None:
        assert self.run is not None and self.logits is not None and RecordedGraph.recording is None
        with torch.inference_mode():
            self.logits.copy_(self.run())


@contextmanager
def _recording(graph: RecordedGraph, **given: Any) -> Iterator[None]:
    assert given["capture_error_mode"] == "thread_local" and not gc.isenabled()
    RecordedGraph.recording = graph
    yield
    RecordedGraph.recording = None


class _Stream:
    def synchronize(self) -> None:
        return


class StreamQueue(HostQueue):
    """A CPU queue with the one thing more that recording asks of a GPU's."""

    stream = _Stream()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", _recording)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 30))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())


@pytest.mark.usefixtures("stand_in")
def test_every_batch_size_is_recorded_from_the_largest_down_and_replays_give_the_tokens(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, kernels="torch")
    pair, plain = Pair(model), Pair(model)
    assert isinstance(model.decoder, TorchDecoder)
    queue, sizes = StreamQueue(torch.device("cpu")), replace(lane_sizes(model, 6), num_biases=2, num_endings=2)
    state = LaneState(sizes, queue)
    step, calls = LaneStep(model.decoder, pair.decode_kv, state, sizes), list[tuple[int, bool, bool]]()

    def compute(num_lanes: int, adjusts: bool) -> Tensor:
        graph = RecordedGraph.recording
        calls.append((num_lanes, adjusts, graph is not None))
        logits = step(num_lanes, adjusts)
        if graph is not None:
            graph.run, graph.logits = (lambda: step(num_lanes, adjusts)), logits
        return logits

    said: list[str] = []
    graphs = GraphedStep(compute, queue, 6, said.append)  # type: ignore[arg-type]
    recorded = [(size, adjusts) for size, adjusts, is_recorded in calls if is_recorded]
    assert recorded == [(size, adjusts) for size in (6, 4, 2, 1) for adjusts in (True, False)]
    assert len(calls) == 3 * len(recorded), "each runs twice before it is recorded"
    assert str(graphs.summary).startswith("8 CUDA graphs in ") and gc.isenabled()
    assert not state.all.is_alive.any() and (state.all.emitted == -1).all(), "nobody was there while it was recorded"

    num_calls = len(calls)
    runner = LaneDecodeRunner(graphs, state, sizes, queue)
    scheduler = DecodeScheduler(pair.decode_pool, 8, 6, 0, 512, runner.growth_blocks)
    pair.decode = DecodeStepper(runner, pair.decode_pool, scheduler, pair.from_decode.append)
    for transfer_id in range(5):
        for each in (pair, plain):
            assert each.place(transfer_id, prompt_of(transfer_id, 9 + transfer_id), params(transfer_id, 12, 1.0), [])
    pair.run()
    plain.run()
    assert pair.tokens == plain.tokens and len(calls) == num_calls, "steps come from the graphs alone"
