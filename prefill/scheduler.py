"""Which prompt tokens are computed next. Pure: no clock, no thread, no tensor; time comes as an argument.

    WAITING ──blocks allocated──► COMPUTING ──last chunk──► COMPUTED ──transfer ended──► gone
       └───────────── abort ─────────┴── blocks stay until transfer and steps in flight have ended ──► gone

Clients take turns by what has been computed for each (`protocol/turns.py`): none waits for another one's backlog. Of
one client the order is by deadline, and deadlines grow with the length of the prompt, so a long prompt does not hold up
short ones behind it. While several prompts want tokens, one of them gets at most half of a step, whatever its turn.

Where decode works in the same pool, a prompt that will run on there begins only once its sequence has a slot, and
leaves some blocks to running sequences (`engine/local_handoff.py`).

A prompt whose next block is just being computed for another one waits for it and then finds it cached: candidates for
the same job, arriving together, compute the shared part once.

Readouts are a class of their own behind prompts that owe somebody a first token:

1. A step belongs to first tokens, but for a quarter that readouts may have while any wait; what first tokens leave is
   theirs as well. So readouts cost a first token at most a third more time, and never starve.
2. Readouts begin after first tokens: where a first token lacks blocks, no readout takes any.
3. A first token that waits for a block which a readout computes lifts that readout into its own class.
4. `ReadPrompt` reads the logits of every row: it takes nothing from the cache, and at most MAX_LOGIT_ROWS tokens of a
   step are of that kind, so that logits are never held for a whole long prompt.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

from engine.batch import BatchItem
from engine.block_pool import BlockPool
from engine.local_handoff import PromptTaker
from engine.pooling import Pool
from engine.reading import Reading
from engine.sequence import Sequence, num_blocks_for
from protocol.block_hash import BlockHash
from protocol.readout import ReadPrompt, reads_cache
from protocol.turns import Turns

MAX_LOGIT_ROWS = 256
_MAX_BATCH_SEQS = 64


class JobState(Enum):
    """Where a prompt stands."""

    WAITING = auto()
    COMPUTING = auto()
    COMPUTED = auto()
    ABORTED = auto()


@dataclass(slots=True, eq=False)
class PrefillJob:
    """One prompt placed here. Owned by the scheduler once submitted.

    Attributes:
        receiver_id: the decode worker that awaits the KV, or None if the request ends with its first token.
        deadline_s: when its first token is due, on the clock of `arrived_s`.
        client, weight, rank: whose it is, its share, and what goes before turns.
        is_lifted: a first token waits for this readout's blocks.
        readings: what its chunks gave so far, if it is a readout.
        pool: the vector in the making, if it is an embedding.
    """

    sequence: Sequence
    receiver_id: str | None
    arrived_s: float
    deadline_s: float
    client: str = ""
    weight: int = 1
    rank: int = 0
    state: JobState = JobState.WAITING
    started_s: float = 0.0
    num_cached_tokens: int = 0
    has_transfer: bool = False
    num_in_flight: int = 0
    is_lifted: bool = False
    readings: list[Reading] = field(default_factory=list)
    pool: Pool | None = None

    @property
    def owes_first_token(self) -> bool:
        """Whether a first token waits for it, its own or another's; else it is a readout that may wait."""
        return self.sequence.readout is None or self.is_lifted

    @property
    def reads_every_row(self) -> bool:
        """Whether the logits of every prompt token are wanted."""
        return isinstance(self.sequence.readout, ReadPrompt)

    @property
    def transfer_id(self) -> int:
        """Id of the placement."""
        return self.sequence.transfer_id

    @property
    def num_left(self) -> int:
        """Prompt tokens still to be computed."""
        return self.sequence.num_prefill_tokens - self.sequence.num_computed_tokens


class PrefillScheduler:
    """Queue and blocks of one prefill worker.

    Args:
        pool: the worker's blocks.
        block_size: tokens per block.
        chunk_tokens: most tokens of one step.
        taker: decode's end, where prompts are handed over inside the pool instead of being sent.
    """

    def __init__(self, pool: BlockPool, block_size: int, chunk_tokens: int, taker: PromptTaker | None = None) -> None:
        self._pool = pool
        self.taker = taker
        self._block_size = block_size
        self.chunk_tokens = chunk_tokens
        self._share_tokens = max(1, chunk_tokens // 2)
        self._readout_tokens = max(1, chunk_tokens // 4)
        self._jobs: dict[int, PrefillJob] = {}
        self._started: list[PrefillJob] = []
        self._turns = Turns()

    @property
    def num_jobs(self) -> int:
        """Jobs that hold anything here."""
        return len(self._jobs)

    @property
    def num_waiting(self) -> int:
        """Jobs that have not begun."""
        return sum(job.state is JobState.WAITING for job in self._jobs.values())

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens still to be computed, of prompts that may begin or have begun."""
        return sum(
            job.num_left
            for job in self._jobs.values()
            if job.state is JobState.COMPUTING or (job.state is JobState.WAITING and self._has_slot(job))
        )

    def get(self, transfer_id: int) -> PrefillJob | None:
        """Return a job by its placement."""
        return self._jobs.get(transfer_id)

    def submit(self, job: PrefillJob) -> None:
        """Queue a job."""
        assert job.transfer_id not in self._jobs
        self._jobs[job.transfer_id] = job
        self._turns.want(job.client)

    def schedule(self, now_s: float) -> list[BatchItem]:
        """Choose the chunks of the next step, allocating the blocks of prompts that begin; empty if there is nothing.

        Prompts that began are returned by `take_started`.
        """
        firsts, readouts = self._candidates(now_s)
        wanted = sum(job.num_left for job in readouts)
        grants = _share(firsts, self.chunk_tokens - min(self._readout_tokens, wanted), MAX_LOGIT_ROWS)
        num_rows_left = MAX_LOGIT_ROWS - sum(num for job, num in grants.items() if job.reads_every_row)
        grants |= _share(readouts, self.chunk_tokens - sum(grants.values()), num_rows_left)
        return [
            BatchItem(job.sequence, job.sequence.num_computed_tokens, num_tokens, num_tokens == job.num_left)
            for job, num_tokens in grants.items()
            if num_tokens
        ]

    def take_started(self) -> list[PrefillJob]:
        """Return the jobs that began since the last call: their blocks are allocated, cached ones found."""
        started, self._started = self._started, []
        return started

    def launched(self, items: Iterable[BatchItem]) -> None:
        """Note that a step computes these chunks; full blocks become findable.

        Whoever finds one reads it in a later step, so after this one, or is told of it in order with this step's cells.
        """
        for item in items:
            seq = item.sequence
            first = seq.num_computed_tokens // self._block_size
            seq.num_computed_tokens = item.start + item.num_tokens
            last = min(seq.num_computed_tokens // self._block_size, len(seq.names))
            for index in range(first, last):
                self._pool.name(seq.block_ids[index], seq.names[index])
            job = self._jobs[seq.transfer_id]
            job.num_in_flight += 1
            self._turns.charge(job.client, item.num_tokens, job.weight)
            if job.num_left == 0 and job.state is JobState.COMPUTING:
                self._leave(job, JobState.COMPUTED)

    def landed(self, items: Iterable[BatchItem]) -> None:
        """Note that a launched step is done."""
        for item in items:
            job = self._jobs[item.sequence.transfer_id]
            job.num_in_flight -= 1
            self._free_if_done(job)

    def abort(self, transfer_id: int) -> None:
        """Stop computing a job; its blocks are freed once no transfer reads and no step writes them. Idempotent."""
        job = self._jobs.get(transfer_id)
        if job is not None:
            self._leave(job, JobState.ABORTED)
            self._free_if_done(job)

    def transfer_ended(self, transfer_id: int) -> None:
        """Note that nobody reads the blocks of this job any more. A job still computing goes on for its first token."""
        job = self._jobs.get(transfer_id)
        if job is not None:
            job.has_transfer = False
            self._free_if_done(job)

    def _leave(self, job: PrefillJob, state: JobState) -> None:
        """Note that nothing more is computed for a job."""
        if job.state in _UNFINISHED:
            self._turns.rest(job.client)
        job.state = state

    def _candidates(self, now_s: float) -> tuple[list[PrefillJob], list[PrefillJob]]:
        """Return what may compute now: prompts that owe a first token, and readouts."""
        unfinished = [job for job in self._jobs.values() if job.state in _UNFINISHED]
        being_computed = self._in_progress(unfinished)
        # Two passes over the first class: what it waits for may have been lifted into it.
        firsts, may_start = self._choose(
            self._in_turns(job for job in unfinished if job.owes_first_token), being_computed, now_s, True
        )
        firsts += [job for job in unfinished if job.is_lifted and job.state is JobState.COMPUTING and job not in firsts]
        readouts, _ = self._choose(
            self._in_turns(job for job in unfinished if not job.owes_first_token), being_computed, now_s, may_start
        )
        return firsts, readouts

    def _in_turns(self, jobs: Iterable[PrefillJob]) -> list[PrefillJob]:
        return self._turns.order(jobs, lambda job: min(job.num_left, self._share_tokens))

    def _choose(
        self, jobs: list[PrefillJob], being_computed: dict[BlockHash, PrefillJob], now_s: float, may_start: bool
    ) -> tuple[list[PrefillJob], bool]:
        """Choose enough of a class to fill a step; tell also whether none of it lacked blocks."""
        chosen: list[PrefillJob] = []
        num_claimed = 0
        for job in jobs:
            # Enough to fill a step: a prompt that would not compute yet must not hold blocks yet.
            if len(chosen) == _MAX_BATCH_SEQS or num_claimed >= self.chunk_tokens:
                break
            if job.state is JobState.WAITING:
                # Nobody overtakes a prompt that lacks blocks: smaller ones would starve it for ever.
                may_start = may_start and (not self._has_slot(job) or self._start(job, being_computed, now_s))
            if job.state is JobState.COMPUTING:
                chosen.append(job)
                num_claimed += min(job.num_left, self._share_tokens)
        return chosen, may_start

    def _has_slot(self, job: PrefillJob) -> bool:
        return self.taker is None or job.receiver_id is None or self.taker.awaits(job.transfer_id)

    def _in_progress(self, jobs: list[PrefillJob]) -> dict[BlockHash, PrefillJob]:
        """Return who computes which block."""
        found: dict[BlockHash, PrefillJob] = {}
        for job in jobs:
            if job.state is JobState.COMPUTING:
                first = job.sequence.num_computed_tokens // self._block_size
                found.update(dict.fromkeys(job.sequence.names[first:], job))
        return found

    def _start(self, job: PrefillJob, being_computed: dict[BlockHash, PrefillJob], now_s: float) -> bool:
        """Give a job its blocks; return False if there are not enough. One that waits for another's block is passed."""
        seq = job.sequence
        # The last token is always computed: its logits give the first output token.
        usable = 0 if not reads_cache(seq.readout) else (seq.num_prefill_tokens - 1) // self._block_size
        cached = self._pool.match(seq.names[:usable])
        if len(cached) < usable and (other := being_computed.get(seq.names[len(cached)])) is not None:
            other.is_lifted |= job.owes_first_token
            return True
        self._pool.acquire(cached)
        num_fresh = num_blocks_for(seq.num_prefill_tokens, self._block_size) - len(cached)
        num_kept_back = 0 if self.taker is None else self.taker.num_kept_back
        if num_fresh + num_kept_back > self._pool.num_available:
            self._pool.release(cached)
            return False
        seq.add_blocks(cached + self._pool.allocate(num_fresh))
        seq.num_computed_tokens = job.num_cached_tokens = len(cached) * self._block_size
        job.state, job.started_s = JobState.COMPUTING, now_s
        job.has_transfer = job.receiver_id is not None and self.taker is None
        if self.taker is not None:
            self.taker.begun(job.transfer_id)
        for name in seq.names[len(cached) :]:
            being_computed.setdefault(name, job)
        self._started.append(job)
        return True

    def _free_if_done(self, job: PrefillJob) -> None:
        if job.has_transfer or job.num_in_flight or job.state in _UNFINISHED:
            return
        self._pool.release(job.sequence.take_blocks())
        del self._jobs[job.transfer_id]


def _share(jobs: list[PrefillJob], budget: int, num_rows_left: int) -> dict[PrefillJob, int]:
    """Divide the tokens of a step among jobs: of several, none gets more than half until all have what they want.

    `num_rows_left` bounds the tokens of those that read every row.
    """
    grants = dict.fromkeys(jobs, 0)
    whole = budget
    for limit in (whole if len(jobs) < 2 else max(1, whole // 2), whole):
        for job in jobs:
            room = min(budget, num_rows_left) if job.reads_every_row else budget
            more = max(0, min(min(job.num_left, limit) - grants[job], room))
            grants[job] += more
            budget -= more
            num_rows_left -= more if job.reads_every_row else 0
    return grants


_UNFINISHED = (JobState.WAITING, JobState.COMPUTING)
