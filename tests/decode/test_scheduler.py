"""Joining, growing, preempting and finishing in the decode batch."""

from __future__ import annotations

import random

import pytest

from decode.scheduler import DecodeScheduler, StepPlan
from engine.block_pool import BlockPool
from engine.sampler import Sampled
from engine.sequence import Sequence
from protocol.block_hash import block_hashes, root_hash
from protocol.errors import OutOfBlocks
from protocol.request import FinishReason, SamplingParams, TokenRow

BLOCK = 4
ROOT = root_hash("model")
MAX_LEN = 64


def _sequence(
    transfer_id: int, num_prompt: int, *, emitted: tuple[int, ...] = (), max_tokens: int = 50, first: int = 0
) -> Sequence:
    tokens = [first + i for i in range(num_prompt)] + list(emitted)
    return Sequence(
        request_id=transfer_id,
        transfer_id=transfer_id,
        epoch=1,
        tokens=tokens,
        num_prompt_tokens=num_prompt,
        sampling=SamplingParams(seed=0, max_tokens=max_tokens, eos_token_ids=(2,)),
        root=ROOT,
        names=block_hashes(tokens, BLOCK, ROOT),
    )


def _scheduler(num_blocks: int = 50, max_num_seqs: int = 8, watermark: int = 0) -> tuple[DecodeScheduler, BlockPool]:
    pool = BlockPool(num_blocks)
    return DecodeScheduler(pool, BLOCK, max_num_seqs, watermark, MAX_LEN), pool


def _token(seq: Sequence) -> int:
    """What the model under test would say: a function of the position alone."""
    return 1000 + seq.num_computed_tokens


def _step(scheduler: DecodeScheduler) -> tuple[StepPlan, list[TokenRow]]:
    plan = scheduler.schedule()
    results = [Sampled(_token(item.sequence) + 1) for item in plan.items]
    return plan, scheduler.apply(plan, results)


def test_a_sequence_joins_on_commit_and_reports_from_index_one() -> None:
    scheduler, _ = _scheduler()
    reserved = scheduler.reserve(_sequence(1, 6))
    assert len(reserved.block_ids) == 2 and reserved.num_cached_blocks == 0
    assert scheduler.schedule().items == []
    scheduler.commit(1, 1006)
    plan, rows = _step(scheduler)
    assert [(i.start, i.num_tokens) for i in plan.items] == [(6, 1)]
    assert rows == [TokenRow(1, 1, 1, 1007, None)]
    assert _step(scheduler)[1] == [TokenRow(1, 1, 2, 1008, None)]


def test_commit_of_an_aborted_sequence_or_a_second_commit_changes_nothing() -> None:
    scheduler, pool = _scheduler()
    scheduler.reserve(_sequence(1, 6))
    scheduler.drop(1)
    scheduler.drop(1)
    scheduler.commit(1, 5)
    assert scheduler.num_running == 0
    scheduler.reserve(_sequence(2, 6))
    scheduler.commit(2, 5)
    scheduler.commit(2, 5)
    assert scheduler.num_running == 1
    scheduler.drop(2)
    pool.check(num_expected_leased=0)


def test_end_by_token_by_length_and_by_context() -> None:
    scheduler, pool = _scheduler()
    for transfer_id, num_prompt, max_tokens in ((1, 6, 2), (2, MAX_LEN - 2, 50), (3, 5, 50)):
        scheduler.reserve(_sequence(transfer_id, num_prompt, max_tokens=max_tokens, first=100 * transfer_id))
        scheduler.commit(transfer_id, 9)
    plan = scheduler.schedule()
    rows = scheduler.apply(plan, [Sampled(5), Sampled(5), Sampled(2)])
    assert [r.finish_reason for r in rows] == [FinishReason.LENGTH, FinishReason.LENGTH, FinishReason.STOP]
    pool.check(num_expected_leased=0)


def test_a_block_is_taken_only_when_a_position_needs_it() -> None:
    scheduler, pool = _scheduler()
    scheduler.reserve(_sequence(1, 4))
    scheduler.commit(1, 9)
    assert pool.counts().leased == 1
    for _ in range(4):
        _step(scheduler)
    assert pool.counts().leased == 2
    _step(scheduler)
    assert pool.counts().leased == 3


def test_the_youngest_gives_way_when_the_pool_is_dry() -> None:
    scheduler, pool = _scheduler(num_blocks=4)
    for transfer_id in (1, 2):
        scheduler.reserve(_sequence(transfer_id, 7, first=100 * transfer_id))
        scheduler.commit(transfer_id, 9)
    assert len(_step(scheduler)[1]) == 2
    plan, rows = _step(scheduler)
    assert plan.preempted == [2] and [r.request_id for r in rows] == [1]
    assert scheduler.num_preemptions == 1
    scheduler.drop(1)
    pool.check(num_expected_leased=0)


def test_a_preempted_sequence_goes_on_with_the_same_tokens() -> None:
    scheduler, _ = _scheduler()
    scheduler.reserve(_sequence(1, 6))
    scheduler.commit(1, 1006)
    tokens = [1006] + [row.token_id for _ in range(9) for row in _step(scheduler)[1]]
    other, _ = _scheduler()
    other.reserve(_sequence(1, 6, emitted=tuple(tokens[:5])))
    other.commit(1, 1006)
    rows = [row for _ in range(9) for row in _step(other)[1]]
    assert [r.index for r in rows] == [5, 6, 7, 8, 9]
    assert [r.token_id for r in rows] == tokens[5:10]
    assert other.num_replayed_tokens == 4


def test_resuming_where_the_blocks_survived_replays_only_the_rest() -> None:
    scheduler, _ = _scheduler()
    scheduler.reserve(_sequence(1, 6))
    scheduler.commit(1, 1006)
    tokens = [1006] + [row.token_id for _ in range(9) for row in _step(scheduler)[1]]
    scheduler.drop(1)
    reserved = scheduler.reserve(_sequence(2, 6, emitted=tuple(tokens)))
    assert reserved.num_cached_blocks == 2
    scheduler.commit(2, 1006)
    plan, rows = _step(scheduler)
    assert plan.items[0].start == 12 and rows == []


def test_a_prefix_held_here_is_granted_as_cached() -> None:
    scheduler, _ = _scheduler()
    scheduler.reserve(_sequence(1, 10))
    scheduler.commit(1, 9)
    scheduler.drop(1)
    reserved = scheduler.reserve(_sequence(2, 11))
    assert reserved.num_cached_blocks == 2 and len(reserved.block_ids) == 3


def test_blocks_reserved_but_never_committed_are_not_mistaken_for_a_prefix() -> None:
    scheduler, _ = _scheduler()
    scheduler.reserve(_sequence(1, 10))
    scheduler.drop(1)
    assert scheduler.reserve(_sequence(2, 10)).num_cached_blocks == 0


def test_reservations_stop_at_the_watermark_and_at_the_slots() -> None:
    scheduler, pool = _scheduler(num_blocks=10, max_num_seqs=2, watermark=3)
    scheduler.reserve(_sequence(1, 12))
    before = pool.counts()
    with pytest.raises(OutOfBlocks, match="kept back"):
        scheduler.reserve(_sequence(2, 16, first=100))
    assert pool.counts() == before
    scheduler.reserve(_sequence(3, 8, first=100))
    with pytest.raises(OutOfBlocks, match="slots"):
        scheduler.reserve(_sequence(4, 1, first=200))


@pytest.mark.parametrize("seed", range(15))
def test_no_token_is_lost_or_doubled_whatever_is_preempted(seed: int) -> None:
    rng = random.Random(seed)
    scheduler, pool = _scheduler(num_blocks=16, max_num_seqs=6, watermark=1)
    wanted = {i: (rng.randint(1, 20), rng.randint(2, 30)) for i in range(25)}
    got: dict[int, list[int]] = {i: [] for i in wanted}
    waiting, landed = sorted(wanted), list[int]()
    finished, transfer_of = set[int](), dict[int, int]()
    next_transfer = 1000
    for _ in range(5000):
        if len(finished) == len(wanted):
            break
        if waiting and rng.random() < 0.5:
            request = waiting[0]
            num_prompt, num_out = wanted[request]
            seq = _sequence(
                next_transfer, num_prompt, emitted=tuple(got[request]), max_tokens=num_out, first=100 * request
            )
            try:
                scheduler.reserve(seq)
                transfer_of[next_transfer] = waiting.pop(0)
                landed.append(next_transfer)
                next_transfer += 1
            except OutOfBlocks:
                pass
        if landed and rng.random() < 0.7:
            transfer = landed.pop(0)
            request = transfer_of[transfer]
            first = 1000 + wanted[request][0]
            if not got[request]:
                got[request].append(first)
            scheduler.commit(transfer, first)
        plan, rows = _step(scheduler)
        waiting = [transfer_of[t] for t in plan.preempted] + waiting
        for row in rows:
            request = transfer_of[row.request_id]
            assert row.index == len(got[request])
            got[request].append(row.token_id)
            if row.finish_reason is not None:
                finished.add(request)
        pool.check()
    for request, (num_prompt, num_out) in wanted.items():
        assert got[request] == [1000 + num_prompt + i for i in range(num_out)]
    pool.check(num_expected_leased=0)
