"""Text to tokens and back: the real vocabulary, and small ones of each kind."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, normalizers

from protocol.errors import ConfigError, InvalidRequest
from protocol.gguf_metadata import read_metadata
from protocol.gguf_vocabulary import build_tokenizer
from router.tokenizer import Tokenizer
from tests.golden.make_golden import long_prompts, plain_prompts
from tests.router.tiny import EOS_ID, alphabet, byte_id, byte_ids, byte_level_gguf, write_gguf

GOLDEN = Path(__file__).parent.parent / "golden" / "smollm2.json"
TRICKY = "Grüße, 世界! 🚀👩‍👩‍👧 don't  stop\n\n\ttabs 12345 é é \u200b x"


# --- the real vocabulary ---


@pytest.mark.model
def test_smollm2_tokenises_and_renders_as_transformers_does(smollm2: Tokenizer) -> None:
    golden = {p["name"]: p["prompt"] for p in json.loads(GOLDEN.read_text())["prompts"]}
    compared = 0
    for prompt in [*plain_prompts(), *long_prompts()]:
        if prompt.name not in golden:
            continue
        text = smollm2.render_chat([{"role": "user", "content": prompt.text}]) if prompt.chat else prompt.text
        ids = smollm2.encode(text, add_special=False)
        assert ids[: prompt.num_tokens or None] == golden[prompt.name], prompt.name
        compared += 1
    assert compared == 24


@pytest.mark.model
def test_smollm2_decodes_every_golden_prompt_to_itself(smollm2: Tokenizer) -> None:
    for prompt in json.loads(GOLDEN.read_text())["prompts"]:
        text = smollm2.decode(prompt["prompt"], skip_special=False)
        if "\ufffd" not in text:
            assert smollm2.encode(text, add_special=False) == prompt["prompt"], prompt["name"]


@pytest.mark.model
def test_smollm2_is_read_within_a_second(cache_dir: Path, smollm2: Tokenizer) -> None:
    path = next((cache_dir / "smollm2").glob("*.gguf"))
    best_s = 10.0
    for _ in range(3):
        begin_s = time.monotonic()
        Tokenizer(path)
        best_s = min(best_s, time.monotonic() - begin_s)
    assert best_s < 1.0
    assert smollm2.vocab_size == 49152 and smollm2.eos_token_ids == (2,) and smollm2.bos_token_id == 1


@pytest.mark.model
def test_special_tokens_are_hidden_or_shown(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("a<|im_end|>b")
    assert smollm2.decode(ids) == "ab"
    assert smollm2.decode(ids, skip_special=False) == "a<|im_end|>b"


# --- streams ---


def test_a_stream_emits_whole_characters_only(tokenizer: Tokenizer) -> None:
    text = "a🚀é世z"
    decoder = tokenizer.stream_decoder()
    pieces = [decoder.feed(i) for i in byte_ids(text)]
    assert "".join(pieces) == text and decoder.flush() == ""
    assert pieces == ["a", "", "", "", "🚀", "", "é", "", "", "世", "z"]


def test_a_stream_that_ends_within_a_character_flushes_one_replacement(tokenizer: Tokenizer) -> None:
    decoder = tokenizer.stream_decoder()
    assert [decoder.feed(i) for i in byte_ids("🚀")[:3]] == ["", "", ""]
    assert decoder.flush() == "\ufffd"


def test_a_stream_and_a_whole_decode_agree_on_arbitrary_bytes(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    for _ in range(200):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 30))]
        decoder = tokenizer.stream_decoder()
        assert "".join(map(decoder.feed, ids)) + decoder.flush() == tokenizer.decode(ids)


def test_token_bytes_of_unknown_ids_are_empty(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(10**6) == b""
    assert not tokenizer.is_known(10**6) and not tokenizer.is_known(-1)


# --- GGUF, byte level ---


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "default", "llama-bpe", "qwen2"])
def test_every_byte_level_kind_is_lossless(tmp_path: Path, pre: str) -> None:
    tokenizer = Tokenizer(byte_level_gguf(tmp_path / "x.gguf", pre))
    text = TRICKY.replace("é", "é")  # Qwen composes characters before it splits
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


def _pieces(path: Path, pre: str, text: str) -> list[str]:
    tokenizer = build_tokenizer(read_metadata(byte_level_gguf(path, pre)))
    assert tokenizer.pre_tokenizer is not None
    return [piece.replace("Ġ", " ") for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def test_the_pre_tokenizers_split_as_their_models_do(tmp_path: Path) -> None:
    text = "it's 12345"
    assert _pieces(tmp_path / "a", "smollm", text) == ["it", "'s", " ", "1", "2", "3", "4", "5"]
    assert _pieces(tmp_path / "b", "gpt-2", text) == ["it", "'s", " 12345"]
    assert _pieces(tmp_path / "c", "llama-bpe", text) == ["it", "'s", " ", "123", "45"]
    assert _pieces(tmp_path / "d", "qwen2", text) == ["it", "'s", " ", "1", "2", "3", "4", "5"]


def test_merges_and_special_tokens_apply(tokenizer: Tokenizer) -> None:
    words = [tokenizer.token_text(i) for i in tokenizer.encode("the the<|stop|>")]
    assert words == ["the", " the", "<|stop|>"]
    assert tokenizer.eos_token_ids == (EOS_ID,)


def test_bos_is_added_where_the_file_says_so(tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_level_gguf(tmp_path / "x.gguf", add_bos_token=True))
    assert tokenizer.encode("a") == [1, byte_id("a")]
    assert tokenizer.encode("a", add_special=False) == [byte_id("a")]


def test_the_end_of_turn_token_ends_as_well(tmp_path: Path) -> None:
    assert Tokenizer(byte_level_gguf(tmp_path / "x.gguf", eot_token_id=3)).eos_token_ids == (EOS_ID, 3)


def test_unknown_kinds_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'klingon' is not supported"):
        Tokenizer(byte_level_gguf(tmp_path / "a.gguf", "klingon"))
    with pytest.raises(ConfigError, match="'rwkv' is not supported"):
        Tokenizer(byte_level_gguf(tmp_path / "b.gguf", model="rwkv"))


@pytest.mark.parametrize("cut", [3, 10, 100, 3000])
def test_a_cut_gguf_file_is_a_clear_error(tmp_path: Path, cut: int) -> None:
    path = byte_level_gguf(tmp_path / "x.gguf")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ConfigError, match="x.gguf"):
        Tokenizer(path)


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="surrogates"):
        tokenizer.encode("a\ud800b")


# --- GGUF, SentencePiece ---

PIECES = {"▁": -2.0, "a": -3.0, "b": -3.1, "c": -3.2, "▁a": -1.5, "ab": -1.0, "bc": -1.1, "abc": -0.5, "▁ab": -0.9,
          "ca": -1.3, "aa": -1.2}  # fmt: skip


def _sentence_piece(path: Path, **values: Any) -> Tokenizer:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *PIECES]
    types = [2, 3, 3] + [6] * 256 + [1] * len(PIECES)
    scores = [0.0] * 259 + list(PIECES.values())
    values = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, **values}
    return Tokenizer(write_gguf(path, tokens, types, model="llama", scores=scores, **values))


def _spm(text: str) -> list[str]:
    """Merge as SentencePiece does: always the neighbours whose union scores best, leftmost first."""
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        unions = [(PIECES[a + b], -i) for i, (a, b) in enumerate(zip(symbols, symbols[1:], strict=False))
                  if a + b in PIECES]  # fmt: skip
        if not unions:
            return symbols
        at = -max(unions)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


def test_sentence_piece_merges_by_score(tmp_path: Path) -> None:
    tokenizer = _sentence_piece(tmp_path / "x.gguf", add_bos_token=False)
    rng = random.Random(2)
    for _ in range(300):
        text = "".join(rng.choice("abc ") for _ in range(rng.randrange(1, 12)))
        found = [tokenizer.token_text(i).replace(" ", "▁") for i in tokenizer.encode(text)]
        assert found == _spm(text), text


def test_sentence_piece_falls_back_to_bytes_and_adds_bos(tmp_path: Path) -> None:
    tokenizer = _sentence_piece(tmp_path / "x.gguf")
    ids = tokenizer.encode("ab é")
    assert ids[0] == 1
    decoder = tokenizer.stream_decoder()
    assert "".join(map(decoder.feed, ids)) == " ab é"
    assert [tokenizer.token_bytes(i) for i in ids[-2:]] == [b"\xc3", b"\xa9"]


# --- tokenizer.json ---


def _model_folder(folder: Path, **config: Any) -> Path:
    vocab = {c: i for i, c in enumerate(alphabet())}
    tokenizer = HfTokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|eot|>"])
    tokenizer.enable_truncation(5)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}, **config}))
    return folder


def test_a_directory_gives_tokens_ends_and_template(tmp_path: Path) -> None:
    folder = _model_folder(tmp_path, bos_token="<s>", chat_template="{{ bos_token }}{{ messages[0].content }}")
    (folder / "generation_config.json").write_text('{"eos_token_id": [258, 257]}')
    (folder / "config.json").write_text('{"eos_token_id": 3}')
    tokenizer = Tokenizer(folder)
    assert tokenizer.eos_token_ids == (258, 257)
    assert tokenizer.bos_token_id == 256
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "<s>hi"
    assert len(tokenizer.encode("longer-than-five")) == 16, "truncation is for training"


def test_the_template_file_wins_over_the_config_and_ours_over_both(tmp_path: Path) -> None:
    folder = _model_folder(
        tmp_path, chat_template=[{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    )
    messages = [{"role": "user", "content": "x"}]
    assert Tokenizer(folder).render_chat(messages) == "D"
    (folder / "chat_template.jinja").write_text("F")
    assert Tokenizer(folder).render_chat(messages) == "F"
    assert Tokenizer(folder, chat_template="O").render_chat(messages) == "O"


def test_a_directory_without_tokenizer_or_with_a_damaged_one_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be used"):
        Tokenizer(tmp_path)


def test_a_decoder_of_unknown_kind_is_refused(tmp_path: Path) -> None:
    tokenizer = HfTokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.CTC()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="decoder"):
        Tokenizer(tmp_path)
