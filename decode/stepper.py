"""The compute-thread half of the decode worker: one token per running sequence and step.

1. `ReserveBlocks` holds blocks: `Granted`, or `NoRoom`. 2. The event loop receives the KV meanwhile. 3. `JoinBatch`
lets the sequence take part from the next step on. 4. Each step yields one `StepRows` with every new token.
5. A sequence that finishes, is preempted (`GaveWay`) or is dropped (`DropSequence`) leaves between two steps.

As many steps are launched ahead as the runner allows; the oldest is collected when it is done. While a sequence with a
grammar runs, a step waits for the tokens of the one before. A sequence whose grammar is slow sits out steps; when that
has gone on, `GrammarSettled` has this stepper look again. One whose grammar fails is given up (`Abandoned`).

Where prefill works in the same pool, 1. to 3. are: a slot is held, the prefill stepper asks for it and hands the blocks
over itself (`engine/local_handoff.py`), or says that it will not (`Abandoned`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import assert_never

from decode.scheduler import DecodeScheduler, Reserved, StepPlan
from engine.block_pool import BlockPool, PoolCounts, PoolWatch
from engine.decode_runner import DecodeRunner, InFlight
from engine.grammar import GrammarSettled
from engine.placement import Failure
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


DecodeEvent = ReserveBlocks | JoinBatch | DropSequence | GrammarSettled


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
class Abandoned:
    """Emission: a sequence is held no more: the prefill stepper beside this one gave up its prompt, or its grammar
    failed; `failure` None: all is well.
    """

    transfer_id: int
    failure: Failure | None


@dataclass(frozen=True, slots=True)
class StepRows:
    """Emission: the new tokens of one step, as (transfer_id, row)."""

    rows: tuple[tuple[int, TokenRow], ...]


DecodeEmission = Granted | NoRoom | GaveWay | Abandoned | StepRows


@dataclass(slots=True)
class DecodeCounters:
    """What this worker has done; written by the compute thread, read by anyone.

    Attributes:
        num_taken: prompts taken over from a prefill stepper of the same pool.
    """

    num_steps: int = 0
    num_computed_tokens: int = 0
    num_taken: int = 0
    step_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step on its way."""

    plan: StepPlan
    in_flight: InFlight
    launched_s: float


class DecodeStepper:
    """Drives scheduler and runner of one decode worker on the compute thread.

    Args:
        emit: takes emissions; called on the compute thread.
        watch: of a pool that a prefill stepper shares; None where the pool is this stepper's own.
    """

    def __init__(
        self,
        runner: DecodeRunner,
        pool: BlockPool,
        scheduler: DecodeScheduler,
        emit: Callable[[DecodeEmission], None],
        watch: PoolWatch | None = None,
    ) -> None:
        self._runner = runner
        self._pool = pool
        self._scheduler = scheduler
        self._emit = emit
        self._flights: deque[_Flight] = deque()
        self._collected_s = 0.0
        self._has_own_pool = watch is None
        self._watch = watch or PoolWatch(pool)
        self.counters = DecodeCounters()
        self.pool_counts: PoolCounts = pool.counts()
        self.num_running = self.num_waiting = self.num_behind = 0

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
            self._give_up_failed()
        elif isinstance(event, DropSequence):
            self._scheduler.drop(event.transfer_id)
        elif not isinstance(event, GrammarSettled):  # the next step looks at what waits for its grammar
            assert_never(event)
        self._publish()

    @property
    def is_waiting(self) -> bool:
        """Whether a step is in flight."""
        return bool(self._flights)

    # --- PromptTaker ---

    @property
    def num_kept_back(self) -> int:
        """Blocks that a beginning prompt must leave, so that running sequences can grow."""
        return self._scheduler.num_kept_back

    def awaits(self, transfer_id: int) -> bool:
        """Whether a slot is held for this sequence."""
        return self._scheduler.awaits(transfer_id)

    def begun(self, transfer_id: int) -> None:
        """Note that a prompt has its blocks."""
        self._scheduler.begun(transfer_id)

    def take(self, transfer_id: int, block_ids: Seq[int], first_token_id: int) -> None:
        """Hold a computed prompt's blocks and let its sequence run; nothing happens if its slot is gone."""
        self.counters.num_taken += self._scheduler.take(transfer_id, block_ids, first_token_id)
        self._give_up_failed()
        self._publish()

    def abandon(self, transfer_id: int, failure: Failure | None) -> None:
        """Give up the slot of a sequence whose prompt will not come; a running one is left alone."""
        if self._scheduler.awaits(transfer_id):
            self._scheduler.drop(transfer_id)
            self._emit(Abandoned(transfer_id, failure))
            self._publish()

    # --- steps ---

    def step(self) -> bool:
        """Launch what may be launched, collect what is done; False if neither."""
        launched = self._catch_up()
        depth = 1 if self._scheduler.needs_last_tokens else self._runner.depth
        while len(self._flights) < depth and self._launch():
            launched = True
        if not self._flights or not self._flights[0].in_flight.is_done():
            self._publish()
            return launched
        self._collect(self._flights.popleft())
        return True

    def _catch_up(self) -> bool:
        """Tell the tokens that slow grammars have worked off; False if there are none."""
        num_behind = self._scheduler.num_behind
        if not num_behind:
            return False
        rows = self._scheduler.catch_up()
        if rows:
            self._emit(StepRows(tuple(rows)))
        self._give_up_failed()
        return self._scheduler.num_behind < num_behind

    def _launch(self) -> bool:
        begin_s = time.monotonic()
        plan = self._scheduler.schedule()
        for transfer_id in plan.preempted:
            self._emit(GaveWay(transfer_id))
        if not plan.items:
            return False
        self._flights.append(_Flight(plan, self._runner.launch(plan.items), begin_s))
        return True

    def _collect(self, flight: _Flight) -> None:
        plan = flight.plan
        transfer_ids = {(i.sequence.request_id, i.sequence.epoch): i.sequence.transfer_id for i in plan.items}
        rows = self._scheduler.apply(plan, flight.in_flight.results())
        if rows:
            self._emit(StepRows(tuple((transfer_ids[row.request_id, row.epoch], row) for row in rows)))
        self._give_up_failed()
        now_s = time.monotonic()
        self.counters.num_steps += 1
        self.counters.num_computed_tokens += len(plan.items)
        # Steps overlap where several are in flight: count each moment once.
        self.counters.step_s += now_s - max(flight.launched_s, self._collected_s)
        self._collected_s = now_s
        self._publish()

    def _give_up_failed(self) -> None:
        for transfer_id, failure in self._scheduler.take_failed():
            self._emit(Abandoned(transfer_id, Failure(f"grammar: {failure}", is_of_grammar=True)))

    def _reserve(self, event: ReserveBlocks) -> None:
        transfer_id = event.sequence.transfer_id
        try:
            if self._has_own_pool:
                self._emit(Granted(transfer_id, event.sender_id, self._scheduler.reserve(event.sequence)))
            else:
                self._scheduler.expect(event.sequence)
        except OutOfBlocks as error:
            self._emit(NoRoom(transfer_id, str(error)))

    def _publish(self) -> None:
        self.pool_counts = self._pool.counts()
        self.num_running = self._scheduler.num_running
        self.num_behind = self._scheduler.num_behind
        self.num_waiting = self._scheduler.num_held - self.num_running
        self._watch.tell(self, self._scheduler.num_held > 0)
