"""What prompts do to running streams on one GPU: 64 streams at 1k while 8k prompts arrive one after another.

    alone          streams only
    turns          one queue: a decode step, then a chunk of the prompt, then a decode step (colocated chunked prefill)
    two queues     a queue each over one KV memory, decode's with priority; the GPU mixes their kernels
    split          the same, each queue on multiprocessors of its own (green contexts)

One thread drives both runners, as a worker's compute thread does: it collects what is done, launches what may be
launched, and looks again after a moment. The gaps between steps are taken where their tokens reach the host.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Final

from bench.gpu.points import Figures, Point, Section, Skip
from bench.gpu.prefilling import chunks_of
from bench.gpu.rig import MAX_BATCH, Stage, decode_items
from bench.gpu.sharing import SHARINGS, Sharing, share_curve
from bench.gpu.timing import percentile
from engine.batch import BatchItem
from engine.compute_loop import DEVICE_LOOK_S
from engine.decode_runner import InFlight, LaneDecodeRunner
from engine.runner import BatchRunner, LaunchedBatch
from engine.sequence import Sequence

_BATCH: Final = MAX_BATCH
_CONTEXT_TOKENS, _PROMPT_TOKENS = 1024, 8192
_NUM_WARM_STEPS: Final = 8


class Decoding:
    """Streams that never end, as many steps ahead as the runner allows.

    Attributes:
        at_s: when each step's tokens were on the host.
    """

    def __init__(self, runner: LaneDecodeRunner, sequences: list[Sequence]) -> None:
        self._runner, self._items = runner, decode_items(sequences)
        self._flights: deque[InFlight] = deque()
        self._num_launched = 0
        self.at_s: list[float] = []

    def step(self, max_steps: int) -> bool:
        """Launch what may be launched, collect what is done; False if neither."""
        launched = False
        while len(self._flights) < self._runner.depth and self._num_launched < max_steps:
            self._flights.append(self._runner.launch(self._items))
            self._num_launched += 1
            launched = True
        if not self._flights or not self._flights[0].is_done():
            return launched
        self._flights.popleft().results()
        self.at_s.append(time.perf_counter())
        return True

    def finish(self) -> None:
        """Wait for what is in flight."""
        while self._flights:
            self._flights.popleft().results()


class Prompts:
    """Prompts that arrive one after another, the next one when the one before has its first token.

    Attributes:
        ttft_s: of each.
    """

    def __init__(self, runner: BatchRunner, sequences: Seq[Sequence], chunk_tokens: int) -> None:
        self._runner = runner
        self._waiting: deque[list[BatchItem]] = deque(chunks_of(s, chunk_tokens) for s in sequences)
        self._chunks: deque[BatchItem] = deque()
        self._flights: deque[LaunchedBatch] = deque()
        self._began_s = 0.0
        self.ttft_s: list[float] = []

    @property
    def is_done(self) -> bool:
        """Whether every prompt has its first token."""
        return not self._waiting and not self._chunks and not self._flights

    def step(self) -> bool:
        """Launch a chunk if one may be launched, collect what is done; False if neither."""
        worked = False
        if self._flights and self._flights[0].is_done():
            results, worked = self._flights.popleft().results(), True
            if results[0] is not None:
                self.ttft_s.append(time.perf_counter() - self._began_s)
        if not self._chunks and not self._flights and self._waiting:
            self._chunks.extend(self._waiting.popleft())
            self._began_s = time.perf_counter()
        if self._chunks and len(self._flights) < self._runner.depth:
            self._flights.append(self._runner.launch([self._chunks.popleft()]))
            return True
        return worked

    def finish(self) -> None:
        """Wait for what is in flight."""
        while self._flights:
            self._flights.popleft().results()


@dataclass(frozen=True, slots=True)
class Window:
    """What came of one arrangement: gaps between the streams' tokens, and the prompts' times."""

    gaps_s: list[float]
    ttft_s: list[float]
    duration_s: float


def section(stage: Stage, name: str, share_s: float) -> Section:
    """Give one point for each way to share the GPU."""
    points = [
        Point(way.name, {"way": way.name}, 9.0 * stage.scale.need_factor, partial(_measure, stage, name, way))
        for way in SHARINGS
    ]
    curve = Point("bandwidth by multiprocessors", {}, 3.0 * stage.scale.need_factor, partial(_curve, stage))
    return Section("interference", name, share_s, (*points, curve))


def play(decoding: Decoding, prompts: Prompts | None, num_steps: int, max_steps: int) -> Window:
    """Drive both until the prompts are done, or without any for so many steps; end early where places run out."""
    while len(decoding.at_s) < _NUM_WARM_STEPS:
        decoding.step(max_steps)
    num_before, begin_s = len(decoding.at_s), time.perf_counter()
    while len(decoding.at_s) < max_steps:
        if prompts.is_done if prompts is not None else len(decoding.at_s) - num_before >= num_steps:
            break
        worked = decoding.step(max_steps)
        if prompts is not None and prompts.step():
            worked = True
        if not worked:
            time.sleep(DEVICE_LOOK_S)
    duration_s = time.perf_counter() - begin_s
    decoding.finish()
    if prompts is not None:
        prompts.finish()
    at_s = decoding.at_s[num_before - 1 :]
    gaps_s = [b - a for a, b in zip(at_s, at_s[1:], strict=False)]
    return Window(gaps_s, [] if prompts is None else prompts.ttft_s, duration_s)


def _measure(stage: Stage, name: str, way: Sharing) -> Figures:
    rig, scale = stage.rig(name), stage.scale
    context_tokens, prompt_tokens = scale.tokens(_CONTEXT_TOKENS), scale.tokens(_PROMPT_TOKENS)
    # Streams go on while prompts arrive, however long that takes; each step needs a place for its token.
    max_steps = min(scale.max_stream_steps, rig.max_model_len - context_tokens) - 1
    streams = rig.sequences(_BATCH, context_tokens, max_steps + 1)
    taken = sum(len(stream.block_ids) for stream in streams)
    prompts = rig.sequences(scale.num_prompts, prompt_tokens, 1, first_block=taken)
    runners, chunk_tokens = way.open(rig), scale.tokens(way.chunk_tokens)
    arriving = Prompts(runners.prefill, prompts, chunk_tokens) if way.has_prompts else None
    if arriving is not None:
        for item in chunks_of(prompts[0], chunk_tokens):
            runners.prefill.launch([item]).results()  # kernels are compiled, libraries choose their algorithms
    window = play(Decoding(runners.decode, streams), arriving, scale.num_steps, max_steps)
    if arriving is not None and not arriving.ttft_s:
        raise Skip(f"no prompt was done within {max_steps} steps")
    return {"detail": runners.detail} | figures_of(window, prompt_tokens)


def _curve(stage: Stage) -> Figures:
    probe = stage.scale.probe
    return {"rows": share_curve(stage.device, probe.num_bytes // 4, probe.num_rounds)}


def figures_of(window: Window, prompt_tokens: int) -> Figures:
    """Return the streams' gaps and the prompts' speed."""
    gaps_s, middle = window.gaps_s, median(window.gaps_s)
    figures: Figures = {
        "itl_p50_ms": middle * 1e3,
        "itl_p99_ms": percentile(gaps_s, 0.99) * 1e3,
        "itl_max_ms": max(gaps_s) * 1e3,
        "p99_over_median": percentile(gaps_s, 0.99) / middle,
        "decode_tokens_per_s": _BATCH * len(gaps_s) / sum(gaps_s),
        "num_steps": len(gaps_s),
    }
    if window.ttft_s:
        figures |= {
            "num_prompts": len(window.ttft_s),
            "ttft_p50_ms": median(window.ttft_s) * 1e3,
            "prompt_tokens_per_s": prompt_tokens * len(window.ttft_s) / sum(window.ttft_s),
        }
    return figures
