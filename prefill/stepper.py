"""The compute-thread half of the prefill worker: one chunk batch per step.

1. `Submit` queues a prompt. 2. A step schedules chunks; a prompt that begins is announced (`Started`), and what its
prefix cache holds already is `CellsReady` at once. 3. While the model runs, each finished group of layers is announced,
so that the event loop pushes it beside the computation. 4. The last chunk yields `FirstTokenReady`. 5. `TransferEnded`
lets the blocks go.

`Measure` comes before the first of them, if it comes: how fast prompts are computed here (prefill/self_test.py).
A first token whose grammar is slow is told once that has worked it off (`GrammarSettled`); its blocks wait with it.

A readout has neither receiver nor first token: its last chunk yields `ReadingsReady`, and its blocks go at once.

Where decode works in the same pool, nothing is sent: with its first token a prompt's blocks are handed to the decode
stepper, before they are let go of here (`engine/local_handoff.py`), so that 3. and 5. fall away.

Where a step is only enqueued on a device, the next one is launched behind it, and what is to be said of a step waits,
in order, until the device has passed the point that it speaks of: nothing is sent before the kernel that wrote it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import assert_never

from engine.batch import BatchItem
from engine.block_pool import BlockPool, PoolCounts, PoolWatch
from engine.grammar import GrammarSettled, ended, follow
from engine.placement import Failure
from engine.pooling import Pool
from engine.reading import Reading, join
from engine.runner import BatchRunner
from engine.sampler import Sampled
from prefill.scheduler import JobState, PrefillJob, PrefillScheduler
from prefill.self_test import PromptPace, measure_prompts
from protocol.handoff import SendRange
from protocol.readout import PromptLogprobs, ReadEmbedding
from protocol.request import FinishReason, TokenRow


@dataclass(frozen=True, slots=True)
class Submit:
    """Event: a prompt was placed here."""

    job: PrefillJob


@dataclass(frozen=True, slots=True)
class AbortJob:
    """Event: forget a prompt."""

    transfer_id: int


@dataclass(frozen=True, slots=True)
class TransferEnded:
    """Event: no transfer reads the blocks of this prompt any more."""

    transfer_id: int


@dataclass(frozen=True, slots=True)
class Measure:
    """Event: measure how fast prompts are computed; nothing was placed here yet."""


PrefillEvent = Submit | AbortJob | TransferEnded | Measure | GrammarSettled


@dataclass(frozen=True, slots=True)
class Started:
    """Emission: a prompt has its blocks. If it has a receiver, exactly one `TransferEnded` must answer."""

    transfer_id: int
    receiver_id: str | None
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CellsReady:
    """Emission: these cells are computed."""

    transfer_id: int
    cells: SendRange


@dataclass(frozen=True, slots=True)
class FirstTokenReady:
    """Emission: the prompt is computed and its first token chosen. Times are durations in seconds."""

    transfer_id: int
    row: TokenRow
    num_cached_tokens: int
    queue_s: float
    prefill_s: float


@dataclass(frozen=True, slots=True)
class PromptFailed:
    """Emission: the prompt's first token could not be chosen, since its grammar failed."""

    transfer_id: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class ReadingsReady:
    """Emission: what a readout asked for. Times are durations in seconds."""

    transfer_id: int
    labels: tuple[float, ...]
    prompt: PromptLogprobs | None
    num_cached_tokens: int
    queue_s: float
    prefill_s: float
    embedding: bytes = b""


PrefillEmission = Started | CellsReady | FirstTokenReady | ReadingsReady | PromptFailed | PromptPace


@dataclass(slots=True)
class PrefillCounters:
    """What this worker has done; written by the compute thread, read by anyone."""

    num_steps: int = 0
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    step_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Untold:
    """A first token that waits for its grammar, and why its sequence ends with it but for that."""

    job: PrefillJob
    item: BatchItem
    result: Sampled
    reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class _Push:
    """Blocks of one item that become complete with this step."""

    transfer_id: int
    first_block: int
    num_blocks: int


class PrefillStepper:
    """Drives scheduler and runner of one prefill worker on the compute thread.

    Args:
        emit: takes emissions; called on the compute thread.
        layer_groups: (first layer, number of layers) of each push of a large chunk.
        layer_push_min_tokens: smaller batches are pushed whole.
    """

    def __init__(
        self,
        runner: BatchRunner,
        pool: BlockPool,
        scheduler: PrefillScheduler,
        emit: Callable[[PrefillEmission], None],
        *,
        block_size: int,
        layer_groups: Sequence[tuple[int, int]],
        layer_push_min_tokens: int,
        max_model_len: int,
    ) -> None:
        self._runner = runner
        self._pool = pool
        self._scheduler = scheduler
        self._emit = emit
        self._block_size = block_size
        self._groups = {first + count - 1: (first, count) for first, count in layer_groups}
        self._num_layers = sum(count for _, count in layer_groups)
        self._layer_push_min_tokens = layer_push_min_tokens
        self._max_model_len = max_model_len
        self._chunk_tokens = scheduler.chunk_tokens
        self._due: deque[tuple[Callable[[], bool], Callable[[], None]]] = deque()
        self._behind: list[_Untold] = []
        self._num_in_flight = 0
        self._landed_s = 0.0
        self.counters = PrefillCounters()
        self.pool_counts: PoolCounts = pool.counts()
        self.num_waiting = self.num_running = self.queued_tokens = 0
        self._watch = PoolWatch(pool)
        self._between: Callable[[], None] | None = None

    def share_pool(self, watch: PoolWatch, between: Callable[[], None] | None) -> None:
        """Work in a pool beside the decode stepper that is the scheduler's taker; only before the first event.

        Args:
            watch: of the common pool.
            between: called between the layers of a launch, which takes long where the device is only told of it: lets
                decode have its turn meanwhile. None where a launch computes.
        """
        assert self._scheduler.taker is not None
        self._watch, self._between = watch, between

    def handle(self, event: PrefillEvent) -> None:
        """Take one event."""
        if isinstance(event, Submit):
            self._scheduler.submit(event.job)
        elif isinstance(event, AbortJob):
            self._scheduler.abort(event.transfer_id)
            if self._scheduler.taker is not None:
                self._scheduler.taker.abandon(event.transfer_id, Failure("its prompt was aborted"))
        elif isinstance(event, TransferEnded):
            self._scheduler.transfer_ended(event.transfer_id)
        elif isinstance(event, Measure):
            sizes = (self._block_size, self._max_model_len - 1, self._chunk_tokens)
            self._emit(measure_prompts(self._runner, self._pool, *sizes))
        elif not isinstance(event, GrammarSettled):  # the next step looks at what waits for its grammar
            assert_never(event)
        self._publish()

    @property
    def num_behind(self) -> int:
        """First tokens that wait for their grammars."""
        return len(self._behind)

    @property
    def is_waiting(self) -> bool:
        """Whether something is to be said once the device gets there."""
        return bool(self._due)

    def step(self) -> bool:
        """Say what is due and launch the next chunks."""
        spoke = self._speak()
        if self.num_behind:
            spoke |= self._catch_up()
        if self._num_in_flight == self._runner.depth:
            return spoke
        begin_s = time.monotonic()
        items = self._scheduler.schedule(begin_s)
        for job in self._scheduler.take_started():
            self._announce(job)
        if not items:
            self._publish()
            return spoke
        self._launch(items, begin_s)
        self._speak()
        return True

    def _launch(self, items: list[BatchItem], begin_s: float) -> None:
        pushes = [push for item in items if (push := self._push_of(item)) is not None]
        num_tokens = sum(item.num_tokens for item in items)
        is_large = num_tokens >= self._layer_push_min_tokens and len(self._groups) > 1
        in_groups = is_large and self._scheduler.taker is None
        if self._between is not None:
            launched = self._runner.launch(items, self._give_way)
        else:
            launched = self._runner.launch(items, self._on_layer(pushes) if in_groups else None, self._groups)
        if not in_groups:
            self._say_cells(pushes, 0, self._num_layers)
        jobs = [self._scheduler.get(item.sequence.transfer_id) for item in items]
        self._scheduler.launched(items)
        self._num_in_flight += 1

        def land() -> None:
            self._num_in_flight -= 1
            for job, item, result in zip(jobs, items, launched.results(), strict=True):
                if job is None or job.state is JobState.ABORTED:
                    continue
                if job.sequence.readout is not None:
                    self._read(job, item, result)
                elif isinstance(result, Sampled):
                    self._finish(job, item, result)
            # May let go of blocks: only after they have been handed over.
            self._scheduler.landed(self._without_behind(items))
            now_s = time.monotonic()
            self.counters.num_steps += 1
            self.counters.num_computed_tokens += num_tokens
            self.counters.step_s += now_s - max(begin_s, self._landed_s)
            self._landed_s = now_s
            self._publish()

        self._due.append((launched.is_done, land))

    def _speak(self) -> bool:
        """Do what is due, in order, as far as the device has got; return whether there was anything."""
        spoke = False
        while self._due and self._due[0][0]():
            self._due.popleft()[1]()
            spoke = True
        return spoke

    def _say(self, emission: PrefillEmission) -> None:
        """Emit once the device has done all that is enqueued now."""
        mark = self._runner.mark()
        if not self._due and mark.is_passed():
            self._emit(emission)
        else:
            self._due.append((mark.is_passed, lambda: self._emit(emission)))

    def _announce(self, job: PrefillJob) -> None:
        self.counters.num_cached_tokens += job.num_cached_tokens
        if self._scheduler.taker is not None:
            return
        self._say(Started(job.transfer_id, job.receiver_id, tuple(job.sequence.block_ids)))
        num_cached_blocks = job.num_cached_tokens // self._block_size
        if num_cached_blocks and job.receiver_id is not None:
            self._say(CellsReady(job.transfer_id, SendRange(0, num_cached_blocks, 0, self._num_layers)))

    def _push_of(self, item: BatchItem) -> _Push | None:
        job = self._scheduler.get(item.sequence.transfer_id)
        if job is None or not job.has_transfer:
            return None
        first = item.start // self._block_size
        end = item.start + item.num_tokens
        last = len(item.sequence.block_ids) if item.wants_logits else end // self._block_size
        return _Push(job.transfer_id, first, last - first) if last > first else None

    def _on_layer(self, pushes: list[_Push]) -> Callable[[int], None]:
        def on_layer(layer: int) -> None:
            self._say_cells(pushes, *self._groups[layer])
            self._speak()

        return on_layer

    def _give_way(self, _: int) -> None:
        assert self._between is not None
        self._speak()
        self._between()

    def _say_cells(self, pushes: list[_Push], first_layer: int, num_layers: int) -> None:
        for push in pushes:
            cells = SendRange(push.first_block, push.num_blocks, first_layer, num_layers)
            self._say(CellsReady(push.transfer_id, cells))

    def _finish(self, job: PrefillJob, item: BatchItem, result: Sampled) -> None:
        seq = job.sequence
        room_tokens = self._max_model_len - seq.num_prefill_tokens - 1
        reason = follow(seq.sampling, seq.grammar, result.token_id, seq.num_output_tokens + 1, room_tokens)
        if seq.grammar is None or seq.grammar.is_settled:
            self._tell(job, result, reason)
        else:
            self._behind.append(_Untold(job, item, result, reason))

    def _without_behind(self, items: list[BatchItem]) -> list[BatchItem]:
        behind = [untold.item for untold in self._behind]
        return [item for item in items if all(item is not other for other in behind)] if behind else items

    def _catch_up(self) -> bool:
        """Tell the first tokens that slow grammars have worked off meanwhile; False if there are none."""
        settled = [u for u in self._behind if u.job.sequence.grammar is None or u.job.sequence.grammar.is_settled]
        for untold in settled:
            self._behind.remove(untold)
            if untold.job.state is not JobState.ABORTED:
                self._tell(untold.job, untold.result, untold.reason)
            self._scheduler.landed([untold.item])
        return bool(settled)

    def _tell(self, job: PrefillJob, result: Sampled, reason: FinishReason | None) -> None:
        seq, now_s = job.sequence, time.monotonic()
        if seq.grammar is not None and seq.grammar.failure is not None:
            self._give_up(job, Failure(f"grammar: {seq.grammar.failure}", is_of_grammar=True))
            return
        reason = ended(seq.grammar, reason)
        row = TokenRow(seq.request_id, seq.epoch, seq.num_output_tokens, result.token_id, reason, result.logprobs)
        queue_s, prefill_s = job.started_s - job.arrived_s, now_s - job.started_s
        self._emit(FirstTokenReady(job.transfer_id, row, job.num_cached_tokens, queue_s, prefill_s))
        taker = self._scheduler.taker
        if taker is not None and reason is None:
            taker.take(job.transfer_id, seq.block_ids, result.token_id)
        elif taker is not None:
            taker.abandon(job.transfer_id, None)

    def _give_up(self, job: PrefillJob, failure: Failure) -> None:
        self._scheduler.abort(job.transfer_id)
        self._emit(PromptFailed(job.transfer_id, failure))
        if self._scheduler.taker is not None:
            self._scheduler.taker.abandon(job.transfer_id, failure)

    def _read(self, job: PrefillJob, item: BatchItem, result: Sampled | Reading | None) -> None:
        """Keep what a chunk of a readout gave; tell all of it with the last."""
        readout, embedding = job.sequence.readout, b""
        if isinstance(result, Reading) and result.states is not None:
            assert isinstance(readout, ReadEmbedding)
            job.pool = job.pool or Pool(readout)
            job.pool.add(result.states, result.num_tokens)
        elif isinstance(result, Reading):
            job.readings.append(result)
        if not item.wants_logits:
            return
        if job.pool is not None:
            embedding = job.pool.vector()
        labels = () if job.pool is not None or job.reads_every_row else job.readings[-1].labels
        prompt = join(job.readings) if job.reads_every_row else None
        queue_s, prefill_s = job.started_s - job.arrived_s, time.monotonic() - job.started_s
        ready = ReadingsReady(job.transfer_id, labels, prompt, job.num_cached_tokens, queue_s, prefill_s, embedding)
        self._emit(ready)

    def _publish(self) -> None:
        self.pool_counts = self._pool.counts()
        self.num_waiting = self._scheduler.num_waiting
        self.num_running = self._scheduler.num_jobs - self.num_waiting
        self.queued_tokens = self._scheduler.queued_tokens
        self._watch.tell(self, self._scheduler.num_jobs > 0)


def layer_groups(num_layers: int, num_groups: int) -> list[tuple[int, int]]:
    """Split layers into `num_groups` runs of nearly equal length, as (first layer, number of layers)."""
    num_groups = min(num_groups, num_layers)
    edges = [num_layers * i // num_groups for i in range(num_groups + 1)]
    return [(a, b - a) for a, b in zip(edges, edges[1:], strict=False)]
