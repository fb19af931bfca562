"""The compute-thread half of the prefill worker: one chunk batch per step.

1. `Submit` queues a prompt. 2. A step schedules chunks; a prompt that begins is announced (`Started`), and what its
prefix cache holds already is `CellsReady` at once. 3. While the model runs, each finished group of layers is announced,
so that the event loop pushes it beside the computation. 4. The last chunk yields `FirstTokenReady`. 5. `TransferEnded`
lets the blocks go.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.batch import BatchItem
from engine.block_pool import BlockPool, PoolCounts
from engine.runner import Runner
from engine.sampler import Sampled
from prefill.scheduler import JobState, PrefillJob, PrefillScheduler
from protocol.handoff import SendRange
from protocol.request import TokenRow


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


PrefillEvent = Submit | AbortJob | TransferEnded


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


PrefillEmission = Started | CellsReady | FirstTokenReady


@dataclass(slots=True)
class PrefillCounters:
    """What this worker has done; written by the compute thread, read by anyone."""

    num_steps: int = 0
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    step_s: float = 0.0


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
        runner: Runner,
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
        self.counters = PrefillCounters()
        self.pool_counts: PoolCounts = pool.counts()
        self.num_waiting = self.num_running = self.queued_tokens = 0
        self._is_busy = False

    def handle(self, event: PrefillEvent) -> None:
        """Take one event."""
        if isinstance(event, Submit):
            self._scheduler.submit(event.job)
        elif isinstance(event, AbortJob):
            self._scheduler.abort(event.transfer_id)
        else:
            self._scheduler.transfer_ended(event.transfer_id)
        self._publish()

    def step(self) -> bool:
        """Compute the next chunks."""
        begin_s = time.monotonic()
        items = self._scheduler.schedule(begin_s)
        for job in self._scheduler.take_started():
            self._announce(job)
        if not items:
            self._publish()
            return False
        pushes = [push for item in items if (push := self._push_of(item)) is not None]
        num_tokens = sum(item.num_tokens for item in items)
        in_groups = num_tokens >= self._layer_push_min_tokens and len(self._groups) > 1
        results = self._runner.step(items, self._on_layer(pushes) if in_groups else None, self._groups)
        if not in_groups:
            self._emit_cells(pushes, 0, self._num_layers)
        jobs = [self._scheduler.get(item.sequence.transfer_id) for item in items]
        self._scheduler.computed(items)
        for computed, result in zip(jobs, results, strict=True):
            if result is not None and computed is not None:
                self._finish(computed, result)
        self.counters.num_steps += 1
        self.counters.num_computed_tokens += num_tokens
        self.counters.step_s += time.monotonic() - begin_s
        self._publish()
        return True

    def _announce(self, job: PrefillJob) -> None:
        self.counters.num_cached_tokens += job.num_cached_tokens
        self._emit(Started(job.transfer_id, job.receiver_id, tuple(job.sequence.block_ids)))
        num_cached_blocks = job.num_cached_tokens // self._block_size
        if num_cached_blocks and job.receiver_id is not None:
            self._emit(CellsReady(job.transfer_id, SendRange(0, num_cached_blocks, 0, self._num_layers)))

    def _push_of(self, item: BatchItem) -> _Push | None:
        job = self._scheduler.get(item.sequence.transfer_id)
        if job is None or job.receiver_id is None:
            return None
        first = item.start // self._block_size
        end = item.start + item.num_tokens
        last = len(item.sequence.block_ids) if item.wants_logits else end // self._block_size
        return _Push(job.transfer_id, first, last - first) if last > first else None

    def _on_layer(self, pushes: list[_Push]) -> Callable[[int], None]:
        def on_layer(layer: int) -> None:
            self._emit_cells(pushes, *self._groups[layer])

        return on_layer

    def _emit_cells(self, pushes: list[_Push], first_layer: int, num_layers: int) -> None:
        for push in pushes:
            cells = SendRange(push.first_block, push.num_blocks, first_layer, num_layers)
            self._emit(CellsReady(push.transfer_id, cells))

    def _finish(self, job: PrefillJob, result: Sampled) -> None:
        if job.state is JobState.ABORTED:
            return
        seq, now_s = job.sequence, time.monotonic()
        room_tokens = self._max_model_len - seq.num_prompt_tokens - 1
        reason = seq.sampling.finish_reason(result.token_id, 1, room_tokens)
        row = TokenRow(seq.request_id, seq.epoch, 0, result.token_id, reason, result.logprobs)
        queue_s, prefill_s = job.started_s - job.arrived_s, now_s - job.started_s
        self._emit(FirstTokenReady(job.transfer_id, row, job.num_cached_tokens, queue_s, prefill_s))

    def _publish(self) -> None:
        self.pool_counts = self._pool.counts()
        self.num_waiting = self._scheduler.num_waiting
        self.num_running = self._scheduler.num_jobs - self.num_waiting
        self.queued_tokens = self._scheduler.queued_tokens
        became_idle = self._is_busy and self._scheduler.num_jobs == 0
        self._is_busy = self._scheduler.num_jobs > 0
        if became_idle:
            self._pool.check(num_expected_leased=0)


def layer_groups(num_layers: int, num_groups: int) -> list[tuple[int, int]]:
    """Split layers into `num_groups` runs of nearly equal length, as (first layer, number of layers)."""
    num_groups = min(num_groups, num_layers)
    edges = [num_layers * i // num_groups for i in range(num_groups + 1)]
    return [(a, b - a) for a, b in zip(edges, edges[1:], strict=False)]
