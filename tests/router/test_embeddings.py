"""/v1/embeddings through a router with scripted workers, and a router whose model is an encoder."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from protocol.errors import ConfigError
from protocol.readout import EmbeddingCard, Pooling, ReadEmbedding
from protocol.wire import Abort, Prefill, Readings, Register
from router.embeddings import PART_INPUTS
from router.members import Refusal, Registry
from router.reading import WINDOW
from router.tokenizer import Tokenizer
from tests.router.cluster import add, key, registration
from tests.router.tiny import byte_ids
from tests.router.workers import HI, ScriptedWorker, Stage, staged

DECODER_CARD = EmbeddingCard(size=3, pooling=Pooling.LAST)
ENCODER_CARD = EmbeddingCard(size=3, pooling=Pooling.MEAN, normalize=False, is_encoder=True)
PATH = "/v1/embeddings"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "seven", "years", "of", "rust", "##y", "python"]


def _vector(prompt: tuple[int, ...]) -> bytes:
    return struct.pack("<3f", len(prompt), prompt[0], prompt[-1])


async def _embed(worker: ScriptedWorker) -> Prefill:
    """Answer the next text with what can be told from its tokens."""
    prefill = await worker.hear(Prefill)
    assert isinstance(prefill.readout, ReadEmbedding) and prefill.decode_worker_id is None
    worker.say(
        Readings(
            transfer_id=prefill.transfer_id, embedding=_vector(prefill.prompt), num_cached_tokens=0, queue_s=0.0,
            prefill_s=0.01,
        )
    )  # fmt: skip
    return prefill


async def serve(worker: ScriptedWorker, num_texts: int) -> list[Prefill]:
    return [await _embed(worker) for _ in range(num_texts)]


def _body(given: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "input": given, **fields}


@pytest.fixture(scope="module")
def word_piece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A WordPiece tokenizer as BERT models ship it, with ten words."""
    folder = tmp_path_factory.mktemp("wordpiece")
    built: Any = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    built.normalizer = normalizers.BertNormalizer(lowercase=True)
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    built.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=None, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    built.decoder = decoders.WordPiece()
    built.add_special_tokens(WORDS[:4])
    built.enable_truncation(5)
    built.enable_padding(length=8)
    built.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


async def _encoder(stage: Stage, **fields: Any) -> ScriptedWorker:
    defaults: dict[str, Any] = {"address": None, "embedding": ENCODER_CARD, "num_blocks": 0, "max_model_len": 8}
    worker = await stage.worker("p0", **defaults, **fields)
    await stage.ready()
    return worker


# --- the tokenizer ---


def test_word_pieces_go_to_ids_and_back(word_piece: Tokenizer) -> None:
    assert word_piece.encode("Seven years of RUSTY Python python python") == [2, 4, 5, 6, 7, 8, 9, 9, 9, 3]
    assert word_piece.encode("rusty", add_special=False) == [7, 8]
    assert word_piece.decode([2, 7, 8, 9, 3]) == "rusty python"
    assert word_piece.token_bytes(8) == b"y" and word_piece.token_bytes(9) == b" python"
    assert not word_piece.has_chat_template and word_piece.eos_token_ids == () and word_piece.vocab_size == 10


def test_other_decoders_are_still_refused(tmp_path: Path) -> None:
    built: Any = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    built.decoder = decoders.CTC()
    built.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="WordPiece"):
        Tokenizer(tmp_path)


# --- the registry ---


def test_an_encoder_needs_no_decode_worker_and_no_address() -> None:
    registry = Registry(lease_ttl_s=3.0, stall_s=20.0)
    assert len(registry.missing()) == 2
    add(registry, "p0", address=None, embedding=ENCODER_CARD)
    assert registry.is_ready and registry.is_encoder and registry.addresses == ()
    registry.remove(key("p0"))
    assert registry.missing() == ["no prefill worker"], "what is served is known until another model comes"
    refusal = registry.register(registration("p1", address=None, embedding=DECODER_CARD), 0.0)
    assert isinstance(refusal, Refusal) and "address" in refusal.reason
    add(registry, "p2", embedding=DECODER_CARD)
    assert registry.missing() == ["no decode worker"]


# --- requests ---


@pytest.mark.parametrize("encoding", [None, "float", "base64"])
async def test_texts_and_token_ids_become_vectors(tokenizer: Tokenizer, encoding: str | None) -> None:
    async with staged(tokenizer) as stage:
        prefill, decode = await stage.pair(embedding=DECODER_CARD)
        for given, prompts in (
            ("hi", [byte_ids("hi")]),
            (["hi", "abc"], [byte_ids("hi"), byte_ids("abc")]),
            ([5, 6, 7], [[5, 6, 7]]),
            ([[5, 6], [7]], [[5, 6], [7]]),
        ):
            body = _body(given, user="me", **({"encoding_format": encoding} if encoding else {}))
            asking = asyncio.create_task(stage.post(PATH, body))
            seen = await serve(prefill, len(prompts))
            status, answer, _ = await asking
            assert status == 200 and answer["object"] == "list" and answer["model"] == "m", answer
            assert sorted(list(p.prompt) for p in seen) == sorted(prompts)
            assert all(p.readout == ReadEmbedding(pooling=Pooling.LAST, normalize=True) for p in seen)
            total = sum(map(len, prompts))
            assert answer["usage"] == {"prompt_tokens": total, "total_tokens": total}
            for index, (entry, prompt) in enumerate(zip(answer["data"], prompts, strict=True)):
                assert entry["object"] == "embedding" and entry["index"] == index
                found = entry["embedding"]
                if encoding == "base64":
                    assert base64.b64decode(found) == _vector(tuple(prompt))
                else:
                    assert found == [len(prompt), prompt[0], prompt[-1]]
        assert not decode.heard(Prefill)


async def test_normalisation_may_be_asked_for_and_dimensions_only_if_there(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer) as stage:
        prefill, _ = await stage.pair(embedding=DECODER_CARD)
        asking = asyncio.create_task(stage.post(PATH, _body("hi", normalize=False, dimensions=3)))
        seen = await _embed(prefill)
        assert (await asking)[0] == 200 and seen.readout == ReadEmbedding(pooling=Pooling.LAST, normalize=False)
        status, answer, _ = await stage.post(PATH, _body("hi", dimensions=2))
        assert status == 400 and answer["error"]["param"] == "dimensions"


async def test_many_inputs_are_read_a_window_at_a_time_and_cancelled_together(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer, max_num_requests=200, lease_ttl_s=60.0) as stage:
        prefill, _ = await stage.pair(embedding=DECODER_CARD, max_num_seqs=512, num_blocks=1000)
        texts = [f"text {i}" for i in range(2 * PART_INPUTS + 5)]
        asking = asyncio.create_task(stage.post(PATH, _body(texts)))
        await serve(prefill, len(texts))
        status, answer, _ = await asking
        assert status == 200 and [e["embedding"][0] for e in answer["data"]] == [len(byte_ids(t)) for t in texts]
        asking = asyncio.create_task(stage.post(PATH, _body(texts)))
        await stage.until(lambda: sum(isinstance(m, Prefill) for m in prefill.received) == WINDOW)
        asking.cancel()
        await stage.until(lambda: sum(isinstance(m, Abort) for m in prefill.received) == WINDOW)
        assert stage.router.switchboard.num_requests == 0 and stage.router.switchboard.idle.is_set()


async def test_a_text_of_a_lost_worker_is_computed_elsewhere(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer) as stage:
        prefill, _ = await stage.pair(embedding=DECODER_CARD)
        other = await stage.worker("p1", embedding=DECODER_CARD)
        asking = asyncio.create_task(stage.post(PATH, _body("hello")))
        await prefill.hear(Prefill)
        await prefill.close()
        await _embed(other)
        status, answer, _ = await asking
        assert status == 200 and answer["data"][0]["embedding"][0] == 5


BAD: list[tuple[dict[str, Any], str]] = [
    (_body(""), "input"),
    (_body([]), "input"),
    (_body(["a", ""]), "input"),
    (_body([[]]), "input"),
    (_body([1, "a"]), "input"),
    (_body(["a", [1]]), "input"),
    (_body([1.5]), "input"),
    (_body([-1]), "input"),
    (_body([100_000]), "input"),
    (_body(["a"] * 2049), "input"),
    (_body("x" * 300), "input"),
    (_body({"text": "a"}), "input"),
    ({"model": "m"}, "input"),
    ({"model": "other", "input": "a"}, "model"),
    ({"input": "a", "model": 5}, "model"),
    (_body("a", encoding_format="int8"), "encoding_format"),
    (_body("a", dimensions=0), "dimensions"),
    (_body("a", truncate_prompt_tokens=0), "truncate_prompt_tokens"),
    (_body("a", truncate_prompt_tokens=-2), "truncate_prompt_tokens"),
    (_body("a", truncate_prompt_tokens=300), "truncate_prompt_tokens"),
]


async def test_what_cannot_be_embedded_is_refused_by_name(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer) as stage:
        prefill, _ = await stage.pair(embedding=DECODER_CARD)
        for body, param in BAD:
            status, answer, _ = await stage.post(PATH, body)
            assert status in (400, 404) and answer["error"]["param"] == param, (body, answer)
        status, answer, _ = await stage.post(PATH, _body("x" * 300))
        assert "maximum context length is 255 tokens, however you requested 300 tokens" in answer["error"]["message"]
        status, _, _ = await stage.post(PATH, _body("\ud800"))
        assert status == 400
        assert not prefill.heard(Prefill)


async def test_workers_that_give_no_vectors_are_not_asked(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer) as stage:
        await stage.pair()
        status, answer, _ = await stage.post(PATH, _body("hi"))
        assert status == 400 and "no embeddings" in answer["error"]["message"]


# --- an encoder ---


async def test_an_encoder_serves_embeddings_and_nothing_else(word_piece: Tokenizer) -> None:
    async with staged(word_piece) as stage:
        worker = await _encoder(stage)
        asking = asyncio.create_task(stage.post(PATH, _body("Seven years of rust")))
        seen = await _embed(worker)
        status, answer, _ = await asking
        assert status == 200 and seen.prompt == (2, 4, 5, 6, 7, 3), answer
        assert seen.readout == ReadEmbedding(pooling=Pooling.MEAN, normalize=False)
        completion = {"model": "m", "prompt": "hi"}
        questions = [{"type": "predicate", "instructions": "Is it?"}]
        for path, body in (
            ("/v1/chat/completions", HI),
            ("/v1/completions", completion),
            ("/v1/completions", {**completion, "stream": True}),
            ("/v1/decisions", {"model": "m", "input": "x", "questions": questions}),
            ("/v1/rerank", {"model": "m", "query": "x", "documents": ["y"]}),
        ):
            status, answer, _ = await stage.post(path, body)
            assert status == 400 and "only embeds" in answer["error"]["message"], (path, answer)
        status, answer, _ = await stage.post("/tokenize", {"prompt": "rusty"})
        assert status == 200 and answer["tokens"] == [2, 7, 8, 3] and answer["max_model_len"] == 8


async def test_long_texts_are_refused_or_cut_within_their_frame(word_piece: Tokenizer) -> None:
    async with staged(word_piece) as stage:
        worker = await _encoder(stage)
        long = "seven years of rusty python " * 3
        status, answer, _ = await stage.post(PATH, _body(["python", long]))
        assert status == 400 and "input[1]" in answer["error"]["message"]
        fitting = "seven years of rusty python"  # with its frame it takes all of the eight
        for given, limit, expected in (
            (fitting, None, [2, 4, 5, 6, 7, 8, 9, 3]),
            (long, -1, [2, 4, 5, 6, 7, 8, 9, 3]),
            (long, 4, [2, 4, 5, 3]),
            ([9] * 20, 5, [9] * 5),
            ("python", 5, [2, 9, 3]),
        ):
            fields = {} if limit is None else {"truncate_prompt_tokens": limit}
            asking = asyncio.create_task(stage.post(PATH, _body(given, **fields)))
            assert list((await _embed(worker)).prompt) == expected
            assert (await asking)[0] == 200
        status, answer, _ = await stage.post(PATH, _body(long, truncate_prompt_tokens=2))
        assert status == 400 and "no room" in answer["error"]["message"]


def test_a_card_survives_the_wire() -> None:
    from protocol.wire import decode, encode

    register = registration("p0", embedding=ENCODER_CARD, address=None)
    found = decode(encode(register))
    assert isinstance(found, Register) and found.embedding == ENCODER_CARD
    assert json.dumps(str(found.embedding.pooling)) == '"mean"'
