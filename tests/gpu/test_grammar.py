"""Sequences with grammars in recorded steps: the tokens of launched ones, and of a runner that samples on the host."""

from __future__ import annotations

import pytest

from engine.grammar_llguidance import LlguidanceBackend
from engine.loading import LoadedModel
from protocol.request import FinishReason, SamplingParams
from tests.decode.pair import Pair, params, prompt_of
from tests.engine.bytes_vocabulary import EOS_ID, OBJECT, WORDS, bytes_vocabulary
from tests.gpu.models import LLAMA, DevicePair, gpu_model

CASES = {
    1: (prompt_of(1, 40), SamplingParams(seed=1, max_tokens=60, eos_token_ids=(EOS_ID,), grammar=OBJECT)),
    2: (prompt_of(2, 9), params(2, max_tokens=30, temperature=1.0)),
    3: (prompt_of(3, 130), SamplingParams(seed=3, max_tokens=40, eos_token_ids=(EOS_ID,), grammar=WORDS, top_k=50)),
    4: (prompt_of(4, 17), params(4, max_tokens=50)),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return gpu_model(tmp_path_factory.mktemp("llama"), LLAMA)


def _tokens(pair: Pair, model: LoadedModel) -> dict[int, list[int]]:
    pair.grammars = LlguidanceBackend(bytes_vocabulary(model.vocab_size), model.vocab_size)
    for transfer_id, (prompt, sampling) in CASES.items():
        assert pair.place(transfer_id, prompt, sampling, [])
        pair.run(num_steps=3)
    pair.run()
    assert not pair.failed and pair.reasons[2] is FinishReason.LENGTH
    return pair.tokens


def test_graphs_launches_and_the_host_choose_the_same_tokens(model: LoadedModel) -> None:
    recorded = _tokens(DevicePair(model), model)
    assert recorded == _tokens(DevicePair(model, eager=True), model)
    assert recorded == _tokens(Pair(model, chunk_tokens=512), model)


def test_a_sequence_placed_again_goes_on_token_for_token(model: LoadedModel) -> None:
    expected = _tokens(DevicePair(model), model)[3]
    pair = DevicePair(model)
    pair.grammars = LlguidanceBackend(bytes_vocabulary(model.vocab_size), model.vocab_size)
    assert pair.place(3, *CASES[3], expected[:5])
    pair.run()
    assert pair.tokens[3] == expected
