"""Order, sharing and memory of the prefill queue."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

from engine.batch import BatchItem
from engine.block_pool import BlockPool
from engine.sequence import Sequence
from prefill.scheduler import JobState, PrefillJob, PrefillScheduler
from protocol.block_hash import block_hashes, root_hash
from protocol.request import SamplingParams

BLOCK = 4
ROOT = root_hash("model")


def _job(
    transfer_id: int,
    num_tokens: int,
    *,
    deadline_s: float = 1.0,
    receiver: str | None = "d0",
    first_token: int = 0,
    client: str = "",
    weight: int = 1,
    rank: int = 0,
) -> PrefillJob:
    tokens = [first_token + i for i in range(num_tokens)]
    sequence = Sequence(
        request_id=transfer_id,
        transfer_id=transfer_id,
        epoch=0,
        tokens=tokens,
        num_prompt_tokens=num_tokens,
        sampling=SamplingParams(seed=0),
        root=ROOT,
        names=block_hashes(tokens, BLOCK, ROOT),
    )
    return PrefillJob(sequence, receiver, 0.0, deadline_s, client, weight, rank)


def _scheduler(num_blocks: int = 100, chunk_tokens: int = 16) -> tuple[PrefillScheduler, BlockPool]:
    pool = BlockPool(num_blocks)
    return PrefillScheduler(pool, BLOCK, chunk_tokens), pool


def _compute(scheduler: PrefillScheduler, items: list[BatchItem]) -> None:
    scheduler.launched(items)
    scheduler.landed(items)


def _plan(items: list[BatchItem]) -> dict[int, tuple[int, int, bool]]:
    return {i.sequence.transfer_id: (i.start, i.num_tokens, i.wants_logits) for i in items}


def test_a_lone_prompt_takes_whole_chunks_and_samples_from_the_last() -> None:
    scheduler, _ = _scheduler()
    scheduler.submit(_job(1, 20))
    first = scheduler.schedule(0.0)
    assert _plan(first) == {1: (0, 16, False)}
    _compute(scheduler, first)
    assert _plan(scheduler.schedule(0.0)) == {1: (16, 4, True)}


def test_short_prompts_overtake_a_long_one_by_deadline() -> None:
    scheduler, _ = _scheduler()
    scheduler.submit(_job(1, 60, deadline_s=9.0))
    _compute(scheduler, scheduler.schedule(0.0))
    scheduler.submit(_job(2, 5, deadline_s=1.0, first_token=500))
    assert _plan(scheduler.schedule(0.0)) == {2: (0, 5, True), 1: (16, 11, False)}


def test_an_overdue_long_prompt_still_leaves_half_of_each_step() -> None:
    scheduler, _ = _scheduler()
    scheduler.submit(_job(1, 60, deadline_s=-5.0))
    scheduler.submit(_job(2, 8, deadline_s=1.0, first_token=500))
    assert _plan(scheduler.schedule(0.0)) == {1: (0, 8, False), 2: (0, 8, True)}


def test_a_late_client_is_not_behind_anothers_backlog_whatever_is_due() -> None:
    scheduler, _ = _scheduler(num_blocks=1000)
    for number in range(20):
        scheduler.submit(_job(number, 40, deadline_s=number - 50.0, first_token=1000 * number, client="flood"))
    for _ in range(5):
        _compute(scheduler, scheduler.schedule(0.0))
    scheduler.submit(_job(90, 20, deadline_s=99.0, first_token=90_000, client="small"))
    steps = 0
    while (job := scheduler.get(90)) is not None and job.num_left:
        _compute(scheduler, scheduler.schedule(0.0))
        steps += 1
    assert steps == 3, "half of every step is its own"


def test_a_lower_rank_goes_first_whoever_has_had_what() -> None:
    scheduler, _ = _scheduler()
    scheduler.submit(_job(1, 40, client="a"))
    scheduler.submit(_job(2, 40, first_token=500, client="b", rank=7))
    scheduler.submit(_job(3, 40, first_token=900, client="a", rank=-1))
    assert list(_plan(scheduler.schedule(0.0))) == [3, 1]


@pytest.mark.parametrize("weight", [1, 3])
def test_backlogged_clients_share_every_stretch_by_weight(weight: int) -> None:
    rng, served = random.Random(weight), defaultdict[str, int](int)
    scheduler, _ = _scheduler(num_blocks=4000, chunk_tokens=64)
    owner = {}
    for number in range(120):
        owner[number] = name = "ab"[number % 2]
        length = rng.randint(5, 60) if name == "a" else rng.randint(60, 200)
        share = weight if name == "b" else 1
        scheduler.submit(_job(number, length, receiver=None, first_token=1000 * number, client=name, weight=share))
    for _ in range(20):
        items = scheduler.schedule(0.0)
        assert sum(item.num_tokens for item in items) == 64, "it is work conserving"
        for item in items:
            served[owner[item.sequence.transfer_id]] += item.num_tokens
        _compute(scheduler, items)
        assert abs(served["a"] - served["b"] / weight) <= 64


def test_a_prompt_sharing_blocks_in_progress_waits_and_then_finds_them_cached() -> None:
    scheduler, pool = _scheduler(chunk_tokens=64)
    scheduler.submit(_job(1, 21))
    scheduler.submit(_job(2, 21))
    first = scheduler.schedule(0.0)
    assert _plan(first) == {1: (0, 21, True)}
    _compute(scheduler, first)
    second = scheduler.schedule(0.0)
    assert _plan(second) == {2: (20, 1, True)}
    job = scheduler.get(2)
    assert job is not None and job.num_cached_tokens == 20
    assert pool.counts().leased == 5 + 1 + 1


def test_a_fully_cached_prompt_still_computes_its_last_block_for_the_logits() -> None:
    scheduler, _ = _scheduler()
    for transfer_id in (1, 2):
        scheduler.submit(_job(transfer_id, 8, receiver=None))
        items = scheduler.schedule(0.0)
        _compute(scheduler, items)
    assert _plan(items) == {2: (4, 4, True)}


def test_without_room_a_prompt_waits_and_nobody_overtakes_it() -> None:
    scheduler, pool = _scheduler(num_blocks=10, chunk_tokens=64)
    scheduler.submit(_job(1, 24, deadline_s=1.0))
    scheduler.submit(_job(2, 20, deadline_s=2.0, first_token=500))
    scheduler.submit(_job(3, 4, deadline_s=3.0, first_token=900))
    first = scheduler.schedule(0.0)
    assert set(_plan(first)) == {1}
    _compute(scheduler, first)
    assert scheduler.schedule(0.0) == []
    scheduler.transfer_ended(1)
    assert set(_plan(scheduler.schedule(0.0))) == {2, 3}
    assert pool.counts().leased == 6


def test_blocks_stay_until_the_transfer_has_ended_and_are_cached_afterwards() -> None:
    scheduler, pool = _scheduler()
    scheduler.submit(_job(1, 10))
    _compute(scheduler, scheduler.schedule(0.0))
    assert pool.counts().leased == 3
    scheduler.abort(1)
    assert pool.counts().leased == 3
    scheduler.transfer_ended(1)
    assert pool.counts() == (98, 2, 0, 100)
    assert scheduler.num_jobs == 0


def test_a_failed_transfer_lets_the_computation_finish() -> None:
    scheduler, pool = _scheduler(chunk_tokens=8)
    scheduler.submit(_job(1, 12))
    _compute(scheduler, scheduler.schedule(0.0))
    scheduler.transfer_ended(1)
    assert pool.counts().leased == 3
    _compute(scheduler, scheduler.schedule(0.0))
    assert pool.counts().leased == 0


def test_aborting_a_waiting_or_unknown_prompt_holds_nothing() -> None:
    scheduler, pool = _scheduler()
    scheduler.submit(_job(1, 10))
    scheduler.abort(1)
    scheduler.abort(77)
    assert scheduler.schedule(0.0) == [] and pool.counts().leased == 0 and scheduler.queued_tokens == 0


def test_prompts_that_would_not_compute_yet_hold_no_blocks() -> None:
    scheduler, pool = _scheduler(num_blocks=1000)
    for transfer_id in range(20):
        scheduler.submit(_job(transfer_id, 40, first_token=1000 * transfer_id))
    scheduler.schedule(0.0)
    assert pool.counts().leased == 20
    assert scheduler.num_waiting == 18


class Ledger:
    """Drives a scheduler and notes which positions of which prompt were computed or found cached."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.scheduler, self.pool = _scheduler(num_blocks=40, chunk_tokens=rng.choice([3, 16, 50]))
        self.jobs: dict[int, PrefillJob] = {}
        self.covered: dict[int, list[int]] = defaultdict(list)
        self.sampled: set[int] = set()
        self.pending: set[int] = set()

    def submit(self, transfer_id: int) -> None:
        """Queue a random prompt, often sharing its start with others."""
        self.jobs[transfer_id] = _job(
            transfer_id,
            self.rng.randint(1, 60),
            deadline_s=self.rng.random(),
            first_token=self.rng.choice([0, 0, 500]),
            receiver=self.rng.choice([None, "d0"]),
        )
        self.scheduler.submit(self.jobs[transfer_id])

    def step(self) -> bool:
        """Compute one batch; return whether there was any."""
        items = self.scheduler.schedule(0.0)
        for job in self.scheduler.take_started():
            self.covered[job.transfer_id].extend(range(job.num_cached_tokens))
            if job.receiver_id:
                self.pending.add(job.transfer_id)
        assert sum(i.num_tokens for i in items) <= 50
        for item in items:
            self.covered[item.sequence.transfer_id].extend(range(item.start, item.start + item.num_tokens))
            if item.wants_logits:
                self.sampled.add(item.sequence.transfer_id)
        _compute(self.scheduler, items)
        return bool(items)

    def end_some_transfer(self) -> None:
        """End one open transfer, rarely before its prompt is computed."""
        done = self.rng.choice(sorted(self.pending))
        if done in self.sampled or self.rng.random() < 0.1:
            self.pending.discard(done)
            self.scheduler.transfer_ended(done)

    def finish(self) -> None:
        """Run until nothing is left."""
        while self.step() or self.pending:
            for transfer_id in sorted(self.pending):
                self.scheduler.transfer_ended(transfer_id)
            self.pending.clear()


@pytest.mark.parametrize("seed", range(15))
def test_every_token_is_computed_once_and_every_block_comes_back(seed: int) -> None:
    ledger = Ledger(random.Random(seed))
    rng = ledger.rng
    for step in range(600):
        if rng.random() < 0.3 and step < 400:
            ledger.submit(step)
        ledger.step()
        if ledger.pending and rng.random() < 0.5:
            ledger.end_some_transfer()
        if rng.random() < 0.05 and ledger.jobs:
            ledger.scheduler.abort(rng.choice(sorted(ledger.jobs)))
        ledger.pool.check()
    ledger.finish()
    for transfer_id, job in ledger.jobs.items():
        if job.state is JobState.COMPUTED:
            assert sorted(ledger.covered[transfer_id]) == list(range(job.sequence.num_prompt_tokens))
    assert ledger.scheduler.num_jobs == 0
    ledger.pool.check(num_expected_leased=0)


def test_blocks_of_an_aborted_job_stay_until_the_steps_in_flight_have_landed() -> None:
    scheduler, pool = _scheduler()
    scheduler.submit(_job(1, 20, receiver=None))
    first = scheduler.schedule(0.0)
    scheduler.launched(first)
    second = scheduler.schedule(0.0)
    scheduler.launched(second)
    scheduler.abort(1)
    assert pool.counts().leased == 5 and scheduler.schedule(0.0) == []
    scheduler.landed(first)
    assert pool.counts().leased == 5, "the second step still writes"
    scheduler.landed(second)
    pool.check(num_expected_leased=0)
    assert scheduler.num_jobs == 0
