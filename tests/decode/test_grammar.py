"""Sequences with grammars through both steppers: alone or in a batch, preempted or not, on the host or on a device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from decode.scheduler import DecodeScheduler
from engine.block_pool import BlockPool
from engine.execution import open_batch_runner, open_decode_runner
from engine.grammar_llguidance import LlguidanceBackend
from engine.loading import LoadedModel
from protocol.request import FinishReason, Grammar, GrammarKind, SamplingParams
from tests.decode.pair import Pair, params, prompt_of
from tests.decode.test_run_ahead import AheadPair
from tests.engine.bytes_vocabulary import EOS_ID, OBJECT, WORDS, bytes_vocabulary, text_of
from tests.engine.tiny import tiny_model

BACKEND = LlguidanceBackend(bytes_vocabulary(), 256)
LONG = Grammar(kind=GrammarKind.REGEX, text="[a-z]{28}!")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def _bound(grammar: Grammar, seed: int, **fields: float) -> SamplingParams:
    given = {"temperature": 1.0, "max_tokens": 60, **fields}
    return SamplingParams(seed=seed, eos_token_ids=(EOS_ID,), grammar=grammar, **given)  # type: ignore[arg-type]


def _bind(pair: Pair) -> Pair:
    pair.grammars = BACKEND
    return pair


def alone(model: LoadedModel, prompt: list[int], sampling: SamplingParams) -> list[int]:
    pair = _bind(Pair(model))
    assert pair.place(1, prompt, sampling, [])
    pair.run()
    return pair.tokens[1]


CASES = {
    1: (prompt_of(1, 9), _bound(OBJECT, 1)),
    2: (prompt_of(2, 20), params(2, temperature=1.0)),
    3: (prompt_of(3, 5), _bound(OBJECT, 3, temperature=0.0)),
    4: (prompt_of(4, 12), _bound(WORDS, 4, repetition_penalty=1.2, max_tokens=40)),
    5: (prompt_of(5, 30), _bound(LONG, 5)),
}


def test_company_changes_no_token_and_every_output_obeys(model: LoadedModel) -> None:
    pair = _bind(Pair(model))
    for transfer_id, (prompt, sampling) in CASES.items():
        assert pair.place(transfer_id, prompt, sampling, [])
        pair.run(num_steps=2)
    pair.run()
    for transfer_id, (prompt, sampling) in CASES.items():
        assert pair.tokens[transfer_id] == alone(model, prompt, sampling), transfer_id
    for transfer_id in (1, 3):
        assert pair.reasons[transfer_id] in (FinishReason.STOP, FinishReason.LENGTH)
        if pair.reasons[transfer_id] is FinishReason.STOP:
            found = json.loads(text_of(pair.tokens[transfer_id]))
            assert isinstance(found["a"], int) and found["b"] in ("x", "yy") and len(found) == 2
            assert pair.tokens[transfer_id][-1] != EOS_ID, "complete with its brace"
    assert pair.reasons[5] is FinishReason.STOP and len(pair.tokens[5]) == 29 and text_of(pair.tokens[5]).endswith("!")
    pair.decode_pool.check(num_expected_leased=0)


@pytest.mark.parametrize("is_replayed", [True, False])
@pytest.mark.parametrize("num_emitted", [1, 7, 20])
def test_a_sequence_placed_again_goes_on_token_for_token(
    model: LoadedModel, num_emitted: int, is_replayed: bool
) -> None:
    prompt, sampling = CASES[5]
    expected = alone(model, prompt, sampling)
    pair = _bind(Pair(model))
    assert pair.place(1, prompt, sampling, expected[:num_emitted], is_replayed)
    pair.run()
    if not is_replayed:
        # What prefill chose after the emitted tokens is the next one.
        assert pair.tokens[1][num_emitted] == expected[num_emitted]
    assert pair.tokens[1] == expected and pair.reasons[1] is FinishReason.STOP


def test_steps_that_wait_for_their_tokens_give_the_host_s(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, kernels="torch")
    ahead = _bind(AheadPair(model))
    for transfer_id, (prompt, sampling) in CASES.items():
        assert ahead.place(transfer_id, prompt, sampling, [])
        ahead.run(num_steps=1)
    ahead.run()
    assert ahead.tokens == {i: alone(model, prompt, sampling) for i, (prompt, sampling) in CASES.items()}
    assert not ahead.failed


def test_on_a_device_too_a_sequence_placed_again_goes_on(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, kernels="torch")
    prompt, sampling = CASES[5]
    expected = alone(model, prompt, sampling)
    ahead = _bind(AheadPair(model))
    assert ahead.place(1, prompt, sampling, expected[:9])
    assert ahead.place(2, *CASES[2], [])
    ahead.run()
    assert ahead.tokens[1] == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs it compiled")
def test_interpreted_kernels_choose_what_the_reference_does(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    cases = {1: (prompt_of(1, 9), _bound(OBJECT, 1, max_tokens=6)), 2: (prompt_of(2, 6), params(2, max_tokens=3))}
    plain = _bind(Pair(tiny_model(tmp_path, kernels="torch")))
    model = tiny_model(tmp_path, kernels="triton")
    pair = _bind(Pair(model))
    pair.prefill._runner = open_batch_runner(model, pair.prefill_kv)
    pair.decode._runner = open_decode_runner(model, pair.decode_kv, 2, lambda line: None)
    for each in (plain, pair):
        for transfer_id, (prompt, sampling) in cases.items():
            assert each.place(transfer_id, prompt, sampling, [])
        each.run()
    assert pair.tokens == plain.tokens and text_of(pair.tokens[1]).startswith("{")


def test_only_a_grammar_keeps_steps_from_running_ahead() -> None:
    scheduler = DecodeScheduler(BlockPool(8), 8, 4, 0, 64)
    assert not scheduler.needs_last_tokens


def test_a_grammar_that_fails_ends_its_sequencealone(model: LoadedModel) -> None:
    hostile = Grammar(kind=GrammarKind.REGEX, text="[x-z]{3}((a{100}){100}){100}b")
    pair = _bind(Pair(model))
    assert pair.place(1, prompt_of(1, 9), _bound(hostile, 1), [])
    assert pair.place(2, *CASES[2], [])
    pair.run()
    assert [transfer_id for transfer_id, _ in pair.failed] == [1] and "lexer error" in str(pair.failed[0][1])
    assert pair.tokens[2] == alone(model, *CASES[2])
    assert set(text_of(pair.tokens[1])) <= {*"xyza"}, "what obeyed was told"
    pair.decode_pool.check(num_expected_leased=0)
