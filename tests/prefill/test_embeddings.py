"""Vectors of prompts by prefill workers, against one plain forward; and of texts by an encoder's worker."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import EngineConfig
from engine.encoder_loading import LoadedEncoder, is_encoder_model, load_embedder
from engine.encoder_stepper import AbortText, EncoderStepper, SubmitText, Text, VectorReady
from engine.loading import LoadedModel, preload
from engine.pooling import Pool
from engine.runner import BatchRunner
from model.batch import ForwardBatch
from prefill.stepper import FirstTokenReady, ReadingsReady
from protocol.errors import ConfigError
from protocol.readout import Pooling, ReadEmbedding, ReadLabels
from tests.engine.tiny import tiny_model
from tests.prefill.test_readouts import PROMPT, Bench, _device, _host

MEAN, LAST, CLS = (ReadEmbedding(pooling=pooling) for pooling in (Pooling.MEAN, Pooling.LAST, Pooling.CLS))
TINY_BERT = {
    "architectures": ["BertModel"], "vocab_size": 200, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip


def _floats(vector: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(vector) // 4}f", vector))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_model(tmp_path_factory.mktemp("plain"), kernels="torch")


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_model(tmp_path_factory.mktemp("native"))


def _states(model: LoadedModel, prompt: list[int]) -> torch.Tensor:
    """Return the last hidden states of a prompt by one forward of the torch decoder, `[n, hidden_size]`."""
    num_tokens, block_size = len(prompt), model.fingerprint.block_size
    batch = ForwardBatch(
        token_ids=torch.tensor(prompt),
        positions=torch.arange(num_tokens),
        slot_mapping=torch.arange(num_tokens),
        query_start=torch.tensor([0, num_tokens], dtype=torch.int32),
        seq_lens=torch.tensor([num_tokens], dtype=torch.int32),
        block_tables=torch.arange(-(-num_tokens // block_size), dtype=torch.int32).unsqueeze(0),
        logits_indices=torch.arange(num_tokens),
        is_decode=False,
    )
    cache = model.new_kv_cache().tensor
    states, logits = model.decoder.forward_states(batch, cache), model.decoder.forward(batch, cache)
    # What is read are the very states that logits are made of.
    weights = getattr(model.decoder, "weights", None)
    assert weights is not None
    torch.testing.assert_close(states @ weights.lm_head.float().T, logits)
    return states.double()


def _unit(vector: torch.Tensor) -> list[float]:
    return list((vector / vector.norm()).tolist())


@pytest.mark.parametrize("chunk_tokens", [1, 7, 16, 64])
def test_vectors_are_pooled_states_whatever_the_chunks(
    plain: LoadedModel, native: LoadedModel, chunk_tokens: int
) -> None:
    states = _states(plain, PROMPT)
    for model, runner in ((native, _host), (plain, _host), (plain, _device)):
        bench = Bench(model, runner, chunk_tokens)
        mean, last = bench.read(1, PROMPT, MEAN), bench.read(2, PROMPT, LAST)
        assert _floats(mean.embedding) == pytest.approx(_unit(states.mean(0)), abs=2e-5)
        assert _floats(last.embedding) == pytest.approx(_unit(states[-1]), abs=2e-5)
        assert mean.num_cached_tokens == 0 and last.num_cached_tokens == 40, "a cached block holds no states"
        raw = bench.read(3, PROMPT, ReadEmbedding(pooling=Pooling.MEAN, normalize=False))
        assert _floats(raw.embedding) == pytest.approx(states.mean(0).tolist(), abs=5e-5)
        bench.pool.check(num_expected_leased=0)


def test_a_native_vector_has_the_same_bits_in_any_chunks_and_company(native: LoadedModel) -> None:
    found = set()
    for chunk_tokens in (1, 5, 16, 64):
        found.add(Bench(native, _host, chunk_tokens).read(1, PROMPT, MEAN).embedding)
    bench = Bench(native, _host, 64)
    for transfer_id in range(2, 6):
        bench.submit(transfer_id, [transfer_id + 3 * i for i in range(30)], MEAN if transfer_id % 2 else None)
    found.add(bench.read(1, PROMPT, MEAN).embedding)
    assert len(found) == 1


@pytest.mark.parametrize("runner", [_host, _device])
def test_embeddings_labels_and_first_tokens_share_a_step(
    plain: LoadedModel, runner: Callable[[LoadedModel], BatchRunner]
) -> None:
    bench = Bench(plain, runner, 256)
    prompts = {1: PROMPT, 2: PROMPT[5:30], 3: PROMPT[3:20], 4: PROMPT[9:40]}
    kinds = {1: MEAN, 2: ReadLabels(token_ids=(5, 6)), 3: None, 4: LAST}
    for transfer_id, kind in kinds.items():
        bench.submit(transfer_id, prompts[transfer_id], kind)
    bench.run()
    alone = {i: Bench(plain, runner, 256).read(i, prompts[i], kinds[i]) for i in (1, 2, 4)}  # type: ignore[arg-type]
    read = {s.transfer_id: s for s in bench.said if isinstance(s, ReadingsReady)}
    assert sorted(read) == [1, 2, 4] and [s.transfer_id for s in bench.said if isinstance(s, FirstTokenReady)] == [3]
    for i in (1, 4):
        assert _floats(read[i].embedding) == pytest.approx(_floats(alone[i].embedding), abs=1e-5)
    assert read[2].labels == pytest.approx(alone[2].labels, abs=1e-4) and read[2].embedding == b""


def test_pooling_of_rows_that_come_in_pieces() -> None:
    rows = np.random.default_rng(3).normal(size=(50, 8)).astype(np.float32)
    for readout in (MEAN, LAST, CLS):
        whole = Pool(readout)
        whole.add(rows)
        for cut in (1, 20, 49):
            pieces = Pool(readout)
            pieces.add(rows[:cut])
            pieces.add(rows[cut:])
            assert pieces.vector() == whole.vector()
    expected = rows.astype(np.float64).mean(0)
    mean = Pool(MEAN)
    mean.add(rows)
    assert _floats(mean.vector()) == pytest.approx((expected / np.linalg.norm(expected)).tolist(), abs=1e-7)
    zero = Pool(MEAN)
    zero.add(np.zeros((2, 4), np.float32))
    assert _floats(zero.vector()) == [0.0] * 4, "a vector without direction stays what it is"


# --- encoders ---


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> LoadedEncoder:
    folder = tmp_path_factory.mktemp("bert")
    (folder / "config.json").write_text(json.dumps(TINY_BERT))
    return load_embedder(EngineConfig(model=f"dummy:{folder}", device="cpu"), "auto", lambda _: None, folder)


def _text(transfer_id: int, length: int, deadline_s: float, readout: ReadEmbedding = MEAN) -> Text:
    return Text(transfer_id, tuple((transfer_id * 7 + i) % 200 for i in range(length)), readout, 0.0, deadline_s)


def test_an_encoders_steps_take_what_is_due_first_and_forget_what_is_aborted(bert: LoadedEncoder) -> None:
    said: list[list[VectorReady]] = []
    stepper = EncoderStepper(bert.encoder, 40, said.append)
    for text in (_text(1, 30, 9.0), _text(2, 10, 2.0), _text(3, 20, 1.0), _text(4, 64, 8.0), _text(5, 3, 3.0)):
        stepper.handle(SubmitText(text))
    assert stepper.queued_tokens == 127
    stepper.handle(AbortText(5))
    stepper.handle(AbortText(99))
    while stepper.step():
        pass
    assert [[ready.transfer_id for ready in step] for step in said] == [[3, 2], [4], [1]]
    assert stepper.queued_tokens == stepper.num_waiting == stepper.num_running == 0
    alone: list[list[VectorReady]] = []
    other = EncoderStepper(bert.encoder, 40, alone.append)
    other.handle(SubmitText(_text(2, 10, 2.0)))
    assert other.step() and alone[0][0].vector == said[0][1].vector, "the same bits in any company"


def test_an_encoder_tells_its_vectors_and_limits(bert: LoadedEncoder, tmp_path: Path) -> None:
    assert (bert.card.size, bert.card.pooling, bert.card.is_encoder, bert.max_tokens) == (32, Pooling.MEAN, True, 64)
    (tmp_path / "config.json").write_text(json.dumps(TINY_BERT))
    config = EngineConfig(model=f"dummy:{tmp_path}", device="cpu", max_model_len=20)
    assert is_encoder_model(config, tmp_path)
    loaded = load_embedder(config, "cls", lambda _: None, tmp_path)
    assert loaded.card.pooling is Pooling.CLS and loaded.max_tokens == 20
    preload(config, tmp_path)
    for wrong in ({"max_model_len": 65}, {"quantization": "int8"}):
        with pytest.raises(ConfigError, match="max_model_len|encoders"):
            load_embedder(EngineConfig(model=f"dummy:{tmp_path}", device="cpu", **wrong), "auto", print, tmp_path)
