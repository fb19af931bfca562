"""Prefill and decode over one pool: the tokens of two pools, whatever happens, and every block comes back."""

from __future__ import annotations

import random

import pytest

from decode.stepper import Abandoned, DecodeEvent
from engine.loading import LoadedModel
from engine.placement import Failure
from prefill.stepper import AbortJob
from protocol.request import FinishReason, SamplingParams
from tests.decode.one_pool import OnePoolPair, OpenRunners, host_runners, late_runners
from tests.decode.pair import Pair, params, prompt_of
from tests.engine.tiny import tiny_model

BLOCK = 8
Cases = dict[int, tuple[list[int], SamplingParams]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The tiny model with the kernels that a CPU serves with."""
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def device_model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The same with kernels that could run behind the host."""
    return tiny_model(tmp_path_factory.mktemp("tiny"), kernels="torch")


@pytest.fixture(params=["host", "prefill late", "decode late"])
def way(
    request: pytest.FixtureRequest, model: LoadedModel, device_model: LoadedModel
) -> tuple[LoadedModel, OpenRunners]:
    """A model and its runners."""
    if request.param == "host":
        return model, host_runners
    return device_model, late_runners(*{"prefill late": (9, 2), "decode late": (1, 5)}[request.param])


def _mixed() -> Cases:
    lengths = [1, 7, 8, 9, 40, 100, 33, 16]
    kinds = [
        params(0),
        params(1, temperature=1.0),
        SamplingParams(seed=2, temperature=0.7, top_k=5, max_tokens=33),
        SamplingParams(seed=3, temperature=1.3, top_p=0.6, max_tokens=9, num_logprobs=3),
        SamplingParams(seed=4, temperature=1.0, repetition_penalty=1.4, frequency_penalty=0.5, max_tokens=40),
        SamplingParams(seed=5, logit_bias=((9, 30.0),), min_tokens=5, stop_token_ids=(9,), max_tokens=30),
        params(6, max_tokens=1),
        params(7, max_tokens=2),
    ]
    return {i: (prompt_of(i, n), kind) for i, (n, kind) in enumerate(zip(lengths, kinds, strict=True))}


def _two_pools(model: LoadedModel, cases: Cases) -> dict[int, list[int]]:
    """Give the tokens of prefill and decode with a pool each and copies in between, one request after the other."""
    answers = {}
    for number, (prompt, sampling) in cases.items():
        known = _ANSWERS.get((model.backend, tuple(prompt), sampling))
        if known is not None:
            answers[number] = known
            continue
        pair = Pair(model, chunk_tokens=512)
        assert pair.place(number, prompt, sampling, [])
        if sampling.max_tokens > 1:
            pair.run()
        answers[number] = _ANSWERS[model.backend, tuple(prompt), sampling] = pair.tokens[number]
    return answers


_ANSWERS: dict[tuple[str, tuple[int, ...], SamplingParams], list[int]] = {}


def _pair(way: tuple[LoadedModel, OpenRunners], **options: int) -> OnePoolPair:
    model, open_runners = way
    return OnePoolPair(model, open_runners, **options)


def test_tokens_are_those_of_two_pools_and_no_block_is_copied_or_kept(way: tuple[LoadedModel, OpenRunners]) -> None:
    cases, pair = _mixed(), _pair(way, chunk_tokens=11)
    for number, case in cases.items():
        pair.submit(number, *case)
        pair.turn()
    pair.run()
    assert pair.tokens() == _two_pools(way[0], cases)
    assert pair.requests[5].reason is FinishReason.STOP
    assert pair.decode.counters.num_taken == sum(s.max_tokens > 1 for _, s in cases.values())
    assert pair.num_declined == pair.num_gave_way == 0


def test_decode_steps_are_launched_between_the_layers_of_a_chunk(device_model: LoadedModel) -> None:
    pair = OnePoolPair(device_model, late_runners(2, 2))
    pair.submit(1, prompt_of(1, 20), params(1, max_tokens=60))
    while not pair.requests[1].tokens:
        pair.turn()
    pair.submit(2, prompt_of(2, 100), params(2, max_tokens=2))
    before, num_launched = pair.num_between, 0
    steps_in_launch: list[int] = []
    while not pair.requests[2].tokens:
        num_before = pair.decode.counters.num_steps
        pair.place_waiting()
        pair.prefill.step()  # decode has no turn of its own here
        steps_in_launch.append(pair.decode.counters.num_steps - num_before)
        num_launched += 1
    assert pair.num_between - before == 4 * -(-100 // 16), "once for each layer of each chunk"
    assert sum(steps_in_launch) > 5 and len(pair.requests[1].tokens) > 5
    pair.run()
    assert pair.tokens() == _two_pools(device_model, {1: (prompt_of(1, 20), params(1, max_tokens=60)),
                                                     2: (prompt_of(2, 100), params(2, max_tokens=2))})  # fmt: skip


def test_aborts_at_any_moment_leave_nothing_and_disturb_nobody(way: tuple[LoadedModel, OpenRunners]) -> None:
    rng = random.Random(7)
    pair = _pair(way, num_blocks=40, watermark_blocks=2)
    kept = {number: (prompt_of(number, number - 990), params(number, max_tokens=20)) for number in range(1000, 1003)}
    for number in range(45):
        pair.submit(number, prompt_of(number % 5, rng.randint(1, 90)), params(number, max_tokens=rng.randint(1, 25)))
        if number % 15 == 0:
            later = 1000 + number // 15
            pair.submit(later, *kept[later])
        for _ in range(rng.randint(0, 6)):
            pair.turn()
        aborted = rng.choice([n for n in pair.requests if n < 1000])
        if rng.random() < 0.9:
            pair.abort(aborted)
    for number in [n for n in pair.requests if n < 1000]:
        pair.abort(number)
    pair.run()
    assert pair.tokens() == _two_pools(way[0], kept)


def test_streams_that_outgrow_the_pool_give_way_and_resume_token_for_token(
    way: tuple[LoadedModel, OpenRunners],
) -> None:
    cases = {i: (prompt_of(10 + i, 20), params(i, max_tokens=40, temperature=1.0)) for i in range(3)}
    pair = _pair(way, num_blocks=14)
    for number, case in cases.items():
        pair.submit(number, *case)
    pair.run()
    assert pair.num_gave_way > 0
    assert pair.tokens() == _two_pools(way[0], cases)


@pytest.mark.parametrize("watermark_blocks", [0, 4])
def test_prompts_and_streams_that_compete_for_a_tiny_pool_all_finish(
    way: tuple[LoadedModel, OpenRunners], watermark_blocks: int
) -> None:
    rng = random.Random(watermark_blocks)
    cases = {
        i: (prompt_of(50 + i, rng.choice([3, 20, 45, 80])), params(i, max_tokens=rng.choice([1, 2, 15, 35])))
        for i in range(8)
    }
    pair = _pair(way, num_blocks=17, watermark_blocks=watermark_blocks, max_num_seqs=5)
    for number, case in cases.items():
        pair.submit(number, *case)
        pair.turn()
    pair.run()
    assert pair.num_declined > 0
    assert pair.tokens() == _two_pools(way[0], cases)


def test_the_last_running_stream_waits_for_a_prompt_that_holds_the_rest_and_never_gives_way_to_it(
    model: LoadedModel,
) -> None:
    pair = OnePoolPair(model, num_blocks=12, chunk_tokens=8)
    pair.submit(1, prompt_of(1, 24), params(1, max_tokens=60))
    while len(pair.requests[1].tokens) < 2:
        pair.turn()
    pair.submit(2, prompt_of(2, 60), params(2, max_tokens=20))  # 8 of the 8 blocks left
    pair.turn()
    assert pair.pool.num_available == 0
    while 2 not in pair.waiting:  # its prompt lands, it joins, and then it is the younger one
        pair.turn()
        assert 1 not in pair.waiting
    assert pair.num_gave_way == 1 and pair.requests[2].tokens
    pair.run()
    cases = {1: (prompt_of(1, 24), params(1, max_tokens=60)), 2: (prompt_of(2, 60), params(2, max_tokens=20))}
    assert pair.tokens() == _two_pools(model, cases)


def test_a_prompt_shared_with_running_streams_is_held_once(way: tuple[LoadedModel, OpenRunners]) -> None:
    shared = prompt_of(3, 64)
    cases = {i: ([*shared, *prompt_of(100 + i, 6)], params(i, max_tokens=12)) for i in range(6)}
    pair = _pair(way, num_blocks=30)  # six times the prompt would take 54
    for number, case in cases.items():
        pair.submit(number, *case)
    most_leased = 0
    while pair.turn():
        most_leased = max(most_leased, pair.pool.counts().leased)
    pair.run()
    assert pair.tokens() == _two_pools(way[0], cases)
    assert most_leased <= 8 + 6 * 4, "the shared blocks once, then what each has for itself"
    assert [pair.requests[i].num_cached_tokens for i in range(6)] == [0] + [64] * 5
    assert pair.num_gave_way == 0


def test_what_decode_generated_is_found_by_a_later_prompt(model: LoadedModel) -> None:
    pair = OnePoolPair(model)
    pair.submit(1, prompt_of(1, 20), params(1, max_tokens=30))
    pair.run()
    # 49 tokens have their KV; the next turn of the conversation begins with all of them.
    turn = [*prompt_of(1, 20), *pair.requests[1].tokens, *prompt_of(9, 5)]
    pair.submit(2, turn, params(2, max_tokens=10))
    pair.run()
    assert pair.requests[2].num_cached_tokens == 48
    assert pair.requests[2].tokens == _two_pools(model, {2: (turn, params(2, max_tokens=10))})[2]


def test_on_a_device_a_prompt_never_reads_what_decode_generated_but_a_resumed_stream_does(
    device_model: LoadedModel,
) -> None:
    """Their kernels may differ in the last bits: a prompt's result must not depend on who computed its prefix."""
    prompt, sampling = prompt_of(1, 20), params(1, max_tokens=30)
    pair = OnePoolPair(device_model, late_runners(3, 3))
    pair.submit(1, prompt, sampling)
    pair.run()
    tokens = list(pair.requests[1].tokens)
    turn = [*prompt, *tokens, *prompt_of(9, 5)]
    pair.submit(2, turn, params(2, max_tokens=10))
    pair.run()
    assert pair.requests[2].num_cached_tokens == 16, "the full blocks of the first prompt"
    pair.submit(3, prompt, sampling)
    pair.requests[3].tokens = tokens[:25]
    before = pair.decode.num_replayed_tokens
    pair.run()
    assert pair.requests[3].tokens == tokens
    assert pair.decode.num_replayed_tokens - before == 20 + 25 - 1 - 40, "of 45 tokens, five blocks were still there"


def test_a_first_token_that_ends_the_request_frees_the_slot(way: tuple[LoadedModel, OpenRunners]) -> None:
    model = way[0]
    first = _two_pools(model, {1: (prompt_of(1, 30), params(1, max_tokens=1))})[1][0]
    pair = _pair(way, max_num_seqs=1)
    sampling = SamplingParams(seed=1, temperature=0.0, max_tokens=20, stop_token_ids=(first,))
    for number in (1, 2):  # the second needs the slot of the first
        pair.submit(number, prompt_of(1, 30), sampling)
        pair.run()
        assert pair.requests[number].tokens == [first] and pair.requests[number].reason is FinishReason.STOP
    assert pair.decode.num_waiting == 0


def test_a_prompt_begins_only_with_a_slot_and_lets_others_pass(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = OnePoolPair(model)
    pair.submit(1, prompt_of(1, 30), params(1))
    pair.waiting.clear()
    sent: list[DecodeEvent] = []
    monkeypatch.setattr(pair.decode, "handle", sent.append)
    pair.place(pair.requests[1])
    assert not pair.prefill.step() and pair.prefill.queued_tokens == 0 and pair.pool.counts().leased == 0
    pair.submit(2, prompt_of(2, 9), params(2, max_tokens=1))
    while not pair.requests[2].tokens:
        pair.turn()
    assert not pair.requests[1].tokens
    monkeypatch.undo()
    for event in sent:
        pair.decode.handle(event)
    pair.run()
    assert len(pair.requests[1].tokens) == 20


def test_an_aborted_prompt_gives_up_its_slot_and_says_so(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = OnePoolPair(model)
    said: list[object] = []
    monkeypatch.setattr(pair.decode, "_emit", said.append)
    pair.submit(1, prompt_of(1, 100), params(1))
    pair.turn()
    transfer_id = pair.requests[1].transfer_id
    assert transfer_id is not None and pair.decode.awaits(transfer_id)
    pair.prefill.handle(AbortJob(transfer_id))
    pair.prefill.handle(AbortJob(transfer_id))
    assert said == [Abandoned(transfer_id, Failure("its prompt was aborted"))]
    pair.pool.check(num_expected_leased=0)


def test_blocks_of_an_aborted_prompt_stay_leased_while_a_step_writes_them(device_model: LoadedModel) -> None:
    """Else decode could be given one of them, and two queues would write into it."""
    pair = OnePoolPair(device_model, late_runners(30, 1))
    pair.submit(1, prompt_of(1, 60), params(1))
    pair.turn()
    assert pair.prefill.is_waiting
    leased = pair.pool.counts().leased
    pair.abort(1)
    assert pair.pool.counts().leased == leased == 8
    pair.run()


def test_readouts_take_their_blocks_from_the_common_pool_and_give_them_back(
    way: tuple[LoadedModel, OpenRunners],
) -> None:
    cases = {number: (prompt_of(number, 30), params(number, max_tokens=20)) for number in range(6)}
    state = prompt_of(40, 48)
    alone, pair = _pair(way), _pair(way, num_blocks=34, watermark_blocks=1)
    expected = {i: alone.ask([*state, 5 + i], (9, 10)) for i in range(12)}
    alone.run()
    asked: dict[int, int] = {}
    for number, case in cases.items():
        pair.submit(number, *case)
        asked |= {i: pair.ask([*state, 5 + i], (9, 10)) for i in (2 * number, 2 * number + 1)}
        pair.turn()
    pair.run()
    assert pair.tokens() == _two_pools(way[0], cases)
    assert len(pair.read) == len(asked) == 12
    for i, transfer_id in asked.items():
        assert pair.read[transfer_id] == pytest.approx(alone.read[expected[i]], abs=1e-5)
