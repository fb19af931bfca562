"""Both steppers with a real (tiny) model: the hand-off changes no token, nor do batches, chunks or preemption."""

from __future__ import annotations

import pytest

from decode.stepper import DropSequence
from engine.loading import LoadedModel
from engine.placement import refusal_of
from model.native_decoder import NativeDecoder
from prefill.stepper import layer_groups
from protocol.request import FinishReason, SamplingParams
from protocol.wire import Prefill
from tests.decode.pair import Pair, params, prompt_of
from tests.engine.tiny import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def _reference(model: LoadedModel, prompt: list[int], sampling: SamplingParams) -> list[int]:
    pair = Pair(model, chunk_tokens=512)
    assert pair.place(1, prompt, sampling, [])
    pair.run()
    return pair.tokens[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_chunks_and_batches_change_no_token(model: LoadedModel, temperature: float) -> None:
    cases = {i: (prompt_of(i, n), params(i, temperature=temperature)) for i, n in enumerate([1, 7, 8, 9, 40, 100])}
    pair = Pair(model, chunk_tokens=11)
    for transfer_id, (prompt, sampling) in cases.items():
        assert pair.place(transfer_id, prompt, sampling, [])
        pair.run(num_steps=2)
    pair.run()
    for transfer_id, (prompt, sampling) in cases.items():
        assert pair.tokens[transfer_id] == _reference(model, prompt, sampling), transfer_id
        assert pair.reasons[transfer_id] is FinishReason.LENGTH
    pair.decode_pool.check(num_expected_leased=0)


@pytest.mark.parametrize("is_replayed", [True, False])
def test_a_preempted_sequence_resumes_token_for_token(model: LoadedModel, is_replayed: bool) -> None:
    assert isinstance(model.decoder, NativeDecoder), "elsewhere the phases' bits differ"
    cases = {i: (prompt_of(10 + i, 20), params(i, max_tokens=30, temperature=1.0)) for i in range(3)}
    pair = Pair(model, decode_blocks=14)
    waiting = list(cases)
    num_preempted = 0
    for _ in range(50):
        while waiting:
            transfer_id = waiting[0]
            if not pair.place(transfer_id, *cases[transfer_id], pair.tokens.get(transfer_id, []), is_replayed):
                break
            waiting.pop(0)
        gave_way = pair.run()
        num_preempted += len(gave_way)
        waiting.extend(gave_way)
        if not waiting and not gave_way:
            break
    assert num_preempted > 0
    for transfer_id, (prompt, sampling) in cases.items():
        assert pair.tokens[transfer_id] == _reference(model, prompt, sampling)


@pytest.mark.parametrize("num_emitted", [1, 7, 8, 20, 39])
def test_prefill_goes_on_where_a_lost_decode_worker_was(model: LoadedModel, num_emitted: int) -> None:
    """Penalties, the bar before min_tokens, the seed's index and the length limit count what was emitted before."""
    prompt = prompt_of(3, 21)
    sampling = SamplingParams(
        seed=5, temperature=0.9, max_tokens=40, min_tokens=30, frequency_penalty=0.7, repetition_penalty=1.2,
        eos_token_ids=(7, 9, 11, 13), num_logprobs=2,
    )  # fmt: skip
    tokens = _reference(model, prompt, sampling)
    pair = Pair(model)
    assert pair.place(1, prompt, sampling, tokens[:num_emitted], is_replayed=False)
    assert pair.tokens[1] == tokens[: num_emitted + 1], "the first new token is prefill's"
    pair.run()
    assert pair.tokens[1][: len(tokens)] == tokens and pair.decode.num_replayed_tokens == 0


def test_a_shared_prefix_is_computed_and_copied_once(model: LoadedModel) -> None:
    pair, shared = Pair(model), prompt_of(30, 64)
    pair.place(1, shared + [5, 6, 7], params(1), [])
    pair.run()
    before = pair.prefill.counters.num_computed_tokens
    assert pair.place(2, shared + [9, 10], params(2), [])
    assert pair.prefill.counters.num_computed_tokens - before == 2
    pair.run()
    assert pair.tokens[2] == _reference(model, shared + [9, 10], params(2))


def test_dropping_a_sequence_between_steps_frees_its_blocks(model: LoadedModel) -> None:
    pair = Pair(model)
    pair.place(1, prompt_of(40, 30), params(1), [])
    pair.run(num_steps=3)
    pair.decode.handle(DropSequence(1))
    pair.decode.handle(DropSequence(1))
    assert not pair.decode.step()
    assert pair.decode.pool_counts.leased == 0


def test_layer_groups_cover_every_layer_once() -> None:
    assert layer_groups(30, 3) == [(0, 10), (10, 10), (20, 10)]
    assert layer_groups(2, 5) == [(0, 1), (1, 1)]
    assert layer_groups(7, 3) == [(0, 2), (2, 2), (4, 3)]


@pytest.mark.parametrize(
    ("prompt", "sampling", "words"),
    [
        ((), params(0), "0 tokens"),
        ((1,) * 512, params(0), "512 tokens"),
        ((1, 256), params(0), "token id 256"),
        ((1,), SamplingParams(seed=0, logit_bias=((300, 1.0),)), "token id 300"),
        ((1,), SamplingParams(seed=0, stop_token_ids=(999,)), "token id 999"),
        ((1, 2), params(0), None),
    ],
)
def test_a_worker_refuses_what_would_break_it(
    model: LoadedModel, prompt: tuple[int, ...], sampling: SamplingParams, words: str | None
) -> None:
    message = Prefill(
        request_id=1, transfer_id=1, epoch=1, decode_worker_id=None, prompt=prompt, sampling=sampling, deadline_s=1.0
    )
    refusal = refusal_of(message, model)
    assert refusal is None if words is None else words in str(refusal)
