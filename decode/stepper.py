"""The compute-thread half of the decode worker: one token per running sequence and step.

1. `ReserveBlocks` holds blocks: `Granted`, or `NoRoom`. 2. The event loop receives the KV meanwhile. 3. `JoinBatch`
lets the sequence take part from the next step on. 4. Each step yields one `StepRows` with every new token.
5. A sequence that finishes, is preempted (`GaveWay`) or is dropped (`DropSequence`) leaves between two steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from decode.scheduler import DecodeScheduler, Reserved
from engine.block_pool import BlockPool, PoolCounts
from engine.runner import Runner
from engine.sequence import Sequence
from protocol.errors import OutOfBlocks
from protocol.request import TokenRow


@dataclass(frozen=True, slots=True)
class ReserveBlocks:
    """Event: a sequence was placed here, to be fed by `sender_id`."""

    sequence: Sequence
    sender_id: str


@dataclass(frozen=True, slots=True)
class JoinBatch:
    """Event: every block of the prompt has landed."""

    transfer_id: int
    first_token_id: int


@dataclass(frozen=True, slots=True)
class DropSequence:
    """Event: forget a sequence; nothing writes into its blocks any more."""

    transfer_id: int


DecodeEvent = ReserveBlocks | JoinBatch | DropSequence


@dataclass(frozen=True, slots=True)
class Granted:
    """Emission: blocks are held for this transfer."""

    transfer_id: int
    sender_id: str
    reserved: Reserved


@dataclass(frozen=True, slots=True)
class NoRoom:
    """Emission: the pool or the batch is full; nothing is held."""

    transfer_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class GaveWay:
    """Emission: this sequence was preempted and holds nothing any more."""

    transfer_id: int


@dataclass(frozen=True, slots=True)
class StepRows:
    """Emission: the new tokens of one step, as (transfer_id, row)."""

    rows: tuple[tuple[int, TokenRow], ...]


DecodeEmission = Granted | NoRoom | GaveWay | StepRows


@dataclass(slots=True)
class DecodeCounters:
    """What this worker has done; written by the compute thread, read by anyone."""

    num_steps: int = 0
    num_computed_tokens: int = 0
    step_s: float = 0.0


class DecodeStepper:
    """Drives scheduler and runner of one decode worker on the compute thread.

    Args:
        emit: takes emissions; called on the compute thread.
        max_model_len: bound of prompt plus output tokens.
    """

    def __init__(
        self,
        runner: Runner,
        pool: BlockPool,
        scheduler: DecodeScheduler,
        emit: Callable[[DecodeEmission], None],
        max_model_len: int,
    ) -> None:
        self._runner = runner
        self._pool = pool
        self._scheduler = scheduler
        self._emit = emit
        self._max_model_len = max_model_len
        self._is_busy = False
        self.counters = DecodeCounters()
        self.pool_counts: PoolCounts = pool.counts()
        self.num_running = self.num_waiting = 0

    @property
    def num_preemptions(self) -> int:
        """Sequences that gave way so far."""
        return self._scheduler.num_preemptions

    @property
    def num_replayed_tokens(self) -> int:
        """Tokens computed again for placed-again sequences."""
        return self._scheduler.num_replayed_tokens

    def handle(self, event: DecodeEvent) -> None:
        """Take one event."""
        if isinstance(event, ReserveBlocks):
            self._reserve(event)
        elif isinstance(event, JoinBatch):
            self._scheduler.commit(event.transfer_id, event.first_token_id)
        else:
            self._scheduler.drop(event.transfer_id)
        self._publish()

    def step(self) -> bool:
        """Run one decode step."""
        begin_s = time.monotonic()
        plan = self._scheduler.schedule()
        for transfer_id in plan.preempted:
            self._emit(GaveWay(transfer_id))
        if not plan.items:
            self._publish()
            return False
        results = [r for r in self._runner.step(plan.items) if r is not None]
        transfer_ids = {(i.sequence.request_id, i.sequence.epoch): i.sequence.transfer_id for i in plan.items}
        rows = self._scheduler.apply(plan, results, self._max_model_len)
        if rows:
            self._emit(StepRows(tuple((transfer_ids[row.request_id, row.epoch], row) for row in rows)))
        self.counters.num_steps += 1
        self.counters.num_computed_tokens += len(plan.items)
        self.counters.step_s += time.monotonic() - begin_s
        self._publish()
        return True

    def _reserve(self, event: ReserveBlocks) -> None:
        transfer_id = event.sequence.transfer_id
        try:
            reserved = self._scheduler.reserve(event.sequence)
        except OutOfBlocks as error:
            self._emit(NoRoom(transfer_id, str(error)))
            return
        self._emit(Granted(transfer_id, event.sender_id, reserved))

    def _publish(self) -> None:
        self.pool_counts = self._pool.counts()
        self.num_running = self._scheduler.num_running
        self.num_waiting = self._scheduler.num_held - self.num_running
        became_idle = self._is_busy and self._scheduler.num_held == 0
        self._is_busy = self._scheduler.num_held > 0
        if became_idle:
            self._pool.check(num_expected_leased=0)
