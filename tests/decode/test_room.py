"""Whom decode lets into a pool that prefill fills, and what a beginning prompt leaves there."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import cast

import pytest

from decode.promises import Promises
from decode.scheduler import DecodeScheduler
from engine.block_pool import BlockPool
from engine.loading import LoadedModel
from engine.local_handoff import PromptTaker
from engine.placement import sequence_of
from engine.sampler import Sampled
from engine.sequence import Sequence
from prefill.scheduler import PrefillJob, PrefillScheduler
from protocol.errors import OutOfBlocks
from protocol.wire import Reserve
from tests.decode.pair import params, prompt_of
from tests.engine.tiny import tiny_model

BLOCK = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def _sequence(model: LoadedModel, transfer_id: int, prompt: list[int], emitted: Seq[int] = ()) -> Sequence:
    reserve = Reserve(
        request_id=transfer_id, transfer_id=transfer_id, epoch=1, prefill_worker_id="p", prompt=tuple(prompt),
        emitted=tuple(emitted), is_replayed=True, sampling=params(0, max_tokens=60),
    )  # fmt: skip
    return sequence_of(reserve, model)


def _scheduler(num_blocks: int, watermark_blocks: int = 0) -> tuple[DecodeScheduler, BlockPool]:
    pool = BlockPool(num_blocks)
    return DecodeScheduler(pool, BLOCK, 8, watermark_blocks, 512, has_own_pool=False), pool


def test_two_sequences_are_not_let_in_on_the_same_free_blocks(model: LoadedModel) -> None:
    scheduler, pool = _scheduler(10)
    scheduler.expect(_sequence(model, 1, prompt_of(1, 40)))  # 6 with the first token
    with pytest.raises(OutOfBlocks, match="12 blocks wanted and 0 kept back, 10 available"):
        scheduler.expect(_sequence(model, 2, prompt_of(2, 40)))
    assert pool.counts().leased == 0 and not scheduler.awaits(2)
    blocks = pool.allocate(5)
    scheduler.begun(1)
    assert scheduler.take(1, blocks, 7)
    pool.release(blocks)
    assert pool.counts().leased == 5
    scheduler.drop(1)
    scheduler.expect(_sequence(model, 2, prompt_of(2, 40)))
    scheduler.drop(2)
    pool.check(num_expected_leased=0)


def test_candidates_for_one_job_are_promised_their_common_prompt_once(model: LoadedModel) -> None:
    scheduler, _ = _scheduler(14)
    shared = prompt_of(3, 64)
    for number in range(6):
        scheduler.expect(_sequence(model, number, [*shared, number + 3]))
    with pytest.raises(OutOfBlocks, match="15 blocks wanted"):
        scheduler.expect(_sequence(model, 6, [*shared, 9]))


def test_what_running_streams_hold_is_not_wanted_again(model: LoadedModel) -> None:
    scheduler, pool = _scheduler(10)
    shared = prompt_of(3, 48)
    scheduler.expect(_sequence(model, 1, [*shared, 5]))
    blocks = pool.allocate(7)
    scheduler.begun(1)
    assert scheduler.take(1, blocks, 9)
    pool.release(blocks)
    scheduler.expect(_sequence(model, 2, [*shared, 6, 7]))
    with pytest.raises(OutOfBlocks):
        scheduler.expect(_sequence(model, 3, prompt_of(4, 50)))


def test_emitted_tokens_and_the_watermark_count_as_room(model: LoadedModel) -> None:
    scheduler, _ = _scheduler(10, watermark_blocks=3)
    assert scheduler.num_kept_back == 0
    with pytest.raises(OutOfBlocks, match="11 blocks wanted and 0 kept back"):
        scheduler.expect(_sequence(model, 1, prompt_of(1, 40), emitted=prompt_of(99, 48)))
    scheduler.expect(_sequence(model, 2, prompt_of(1, 40), emitted=prompt_of(99, 8)))
    with pytest.raises(OutOfBlocks, match="8 blocks wanted and 3 kept back"):
        scheduler.expect(_sequence(model, 3, prompt_of(2, 10)))


def test_a_taken_prompt_whose_slot_is_gone_is_left_to_its_owner(model: LoadedModel) -> None:
    scheduler, pool = _scheduler(10)
    blocks = pool.allocate(3)
    assert not scheduler.take(1, blocks, 5)
    scheduler.expect(_sequence(model, 1, prompt_of(1, 20)))
    scheduler.drop(1)
    scheduler.begun(1)
    assert not scheduler.take(1, blocks, 5)
    pool.release(blocks)
    pool.check(num_expected_leased=0)


def test_a_prompt_that_begins_leaves_running_streams_room_to_grow_and_takes_all_when_none_runs(
    model: LoadedModel,
) -> None:
    decode, pool = _scheduler(12, watermark_blocks=3)
    prefill = PrefillScheduler(pool, BLOCK, 64, cast(PromptTaker, decode))
    decode.expect(_sequence(model, 1, prompt_of(1, 8)))
    decode.expect(_sequence(model, 2, prompt_of(2, 40)))
    blocks = pool.allocate(1)
    decode.take(1, blocks, 5)
    pool.release(blocks)
    assert decode.num_kept_back == 3
    grown = pool.allocate(4)  # as if the first stream had grown meanwhile: 7 are left
    prefill.submit(PrefillJob(_sequence(model, 2, prompt_of(2, 40)), "d", 0.0, 1.0))
    assert prefill.schedule(0.0) == [] and prefill.queued_tokens == 40
    decode.drop(1)
    (item,) = prefill.schedule(0.0)
    assert item.sequence.transfer_id == 2 and pool.num_available == 12 - 4 - 5
    pool.release(grown)


def test_promises_add_up_and_end_once() -> None:
    promises = Promises()
    promises.add(1, [b"a", b"b"], 2)
    promises.add(2, [b"a", b"c"], 1)
    assert promises.num_blocks == 3 + 3 and promises.num_new([b"a", b"d"]) == 1
    promises.remove(1)
    promises.remove(1)
    assert promises.num_blocks == 2 + 1
    promises.remove(2)
    assert promises.num_blocks == 0 and promises.num_new([b"a"]) == 1


def test_hidden_generated_blocks_are_found_by_the_stream_resumed_and_by_no_prompt(model: LoadedModel) -> None:
    pool = BlockPool(30)
    scheduler = DecodeScheduler(pool, BLOCK, 8, 0, 512, hides_generated=True)
    prompt, output = prompt_of(1, 20), prompt_of(2, 30)
    scheduler.reserve(_sequence(model, 1, prompt))
    scheduler.commit(1, output[0])
    for token_id in output[1:]:
        plan = scheduler.schedule()
        scheduler.apply(plan, [Sampled(token_id)])
    scheduler.drop(1)  # 49 tokens were computed: 2 blocks of the prompt, 4 with output
    assert pool.counts().cached == 6
    asked_again = scheduler.reserve(_sequence(model, 2, [*prompt, *output]))
    assert asked_again.num_cached_blocks == 2
    resumed = _sequence(model, 3, prompt, output)
    assert scheduler.reserve(resumed).num_cached_blocks == 3 and resumed.num_computed_tokens == 48
    for transfer_id in (2, 3):
        scheduler.drop(transfer_id)
    pool.check(num_expected_leased=0)
