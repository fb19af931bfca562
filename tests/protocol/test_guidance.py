"""Grammars whose texts hold the names of special tokens, or what a tokenizer would rather write otherwise."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from protocol.errors import GrammarError
from protocol.guidance import compile_matcher, open_tokenizer
from protocol.request import Grammar, GrammarKind
from protocol.vocabulary import Spelling, TokenBytes
from router.grammar_child import Trial
from tests.router.tiny import EOS_ID, SPECIAL, alphabet, byte_level_gguf, write_gguf

END, START, STOP, TOOL = SPECIAL


def _gpt2(folder: Path) -> Path:
    return byte_level_gguf(folder / "gpt2.gguf")


def _qwen(folder: Path) -> Path:
    """A tokenizer that normalises: what is decomposed it would write composed."""
    return byte_level_gguf(folder / "qwen.gguf", pre="qwen2")


def _sentence_piece(folder: Path) -> Path:
    """A tokenizer that puts a space in front of every text, and knows bytes by name."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdehilnorst", "▁a", "th", "the"]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(pieces) - 259)]
    return write_gguf(
        folder / "llama.gguf", pieces, types, model="llama", scores=[-float(i) for i in range(len(pieces))],
        bos_token_id=1, eos_token_id=2, unknown_token_id=0,
    )  # fmt: skip


def _added(folder: Path) -> Path:
    """A `tokenizer.json` with added tokens of every kind: special, ordinary, greedy for the spaces around them."""
    words = {piece: i for i, piece in enumerate(alphabet())}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False), AddedToken("<eat>", lstrip=True, rstrip=True)])
    # An end that the files do not call special is no text either.
    tokenizer.add_tokens([AddedToken("<end>", special=False)])
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<s>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return folder


VOCABULARIES = [_gpt2, _qwen, _sentence_piece, _added]
NAMES = ["<s>", "</s>", "<unk>", "<end>", "<eat>", "<tool_call>", "<|im_start|>", *SPECIAL, "<0x41>", "<|end"]
TEXTS = [*NAMES, *(f"a {name} b" for name in NAMES), "the e\u0301t é ▁ 😀", " the", "the  ", "\ufb01", "a\u0308"]


def _schema(text: str) -> Grammar:
    schema = {
        "type": "object",
        "properties": {text: {"const": text}, "e": {"enum": [text + end for end in "xy"]}},
        "required": [text, "e"],
        "additionalProperties": False,
    }
    return Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(schema), whitespace_pattern="")


def _escaped(text: str) -> str:
    return "".join(f"\\x{{{ord(char):x}}}" for char in text)


WAYS: dict[str, Callable[[str], Grammar]] = {
    "choice": lambda t: Grammar(kind=GrammarKind.CHOICE, text=json.dumps([t + "x", t + "y"])),
    "regex": lambda t: Grammar(kind=GrammarKind.REGEX, text=f"{_escaped(t)}[xy]"),
    "lark": lambda t: Grammar(kind=GrammarKind.LARK, text=f"start: {json.dumps(t)} /[xy]/"),
    "schema": _schema,
}


def _answers(way: str, text: str) -> set[str]:
    if way != "schema":
        return {text + "x", text + "y"}
    documents = ({text: text, "e": text + end} for end in "xy")
    return {json.dumps(document, ensure_ascii=False, separators=(",", ":")) for document in documents}


def _answer(vocabulary: TokenBytes, grammar: Grammar, seed: int) -> list[int]:
    """Draw one answer that obeys; no special token may ever be allowed but an end."""
    vocab_size = len(vocabulary.tokens)
    matcher = compile_matcher(open_tokenizer(vocabulary, vocab_size), grammar)
    words, dice, found = np.zeros(-(-vocab_size // 32), np.int32), random.Random(seed), list[int]()
    while True:
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        assert not matcher.is_error(), matcher.get_error()
        allowed = set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little", count=vocab_size)).tolist())
        ordinary = allowed - set(vocabulary.eos_token_ids)
        assert not ordinary & vocabulary.special_ids
        if not ordinary:
            return found
        found.append(dice.choice(sorted(ordinary)))
        assert matcher.consume_token(found[-1]), matcher.get_error()


@pytest.mark.parametrize("make", VOCABULARIES)
@pytest.mark.parametrize("way", WAYS)
def test_a_special_token_s_name_is_spelled_with_ordinary_tokens(
    make: Callable[[Path], Path], way: str, tmp_path: Path
) -> None:
    path = make(tmp_path)
    vocabulary, trial = TokenBytes.of_model(path), Trial(path)
    for number, text in enumerate(TEXTS):
        grammar = WAYS[way](text)
        trial.text_of(grammar)  # what workers can do the router takes
        found = _answer(vocabulary, grammar, number)
        assert b"".join(vocabulary.tokens[i] for i in found).decode() in _answers(way, text), text


@pytest.mark.parametrize("make", VOCABULARIES)
def test_a_text_is_spelled_byte_for_byte_and_as_its_tokenizer_does_where_that_is_the_same(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    vocabulary = TokenBytes.of_model(make(tmp_path))
    spelling = Spelling(vocabulary)
    for text in TEXTS:
        found = spelling.of(text)
        assert b"".join(vocabulary.tokens[i] for i in found) == text.encode(), text
        assert vocabulary.special_ids.isdisjoint(found), text
    plain = "the 42 and the rest"
    if b"".join(vocabulary.tokens[i] for i in vocabulary.encode(plain)) == plain.encode():
        assert spelling.of(plain) == vocabulary.encode(plain)


def test_merged_tokens_are_used_and_what_no_token_stands_for_is_left_out(tmp_path: Path) -> None:
    vocabulary = TokenBytes.of_model(_gpt2(tmp_path))
    assert [vocabulary.tokens[i] for i in Spelling(vocabulary).of("the and the")] == [b"the", b" ", b"and", b" the"]
    poor = TokenBytes((b"", b"a", b"ab", b"c"), frozenset({0}), (0,), None, lambda text: [])
    assert Spelling(poor).of("abxca") == [2, 3, 1]


def test_the_ends_of_answers_are_never_text(tmp_path: Path) -> None:
    vocabulary = TokenBytes.of_model(_added(tmp_path))
    assert vocabulary.eos_token_ids and set(vocabulary.eos_token_ids) <= vocabulary.special_ids
    assert TokenBytes.of_model(_gpt2(tmp_path)).eos_token_ids == (EOS_ID,)


# --- large schemas ---


def _optional(number: int, **fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {f"property_{i}": {"type": "integer"} for i in range(number)}, **fields}


def _models(number: int) -> dict[str, Any]:
    """As pydantic writes models that name each other."""
    models: dict[str, Any] = {}
    for i in range(number):
        refs = [{"$ref": f"#/$defs/M{k}"} for k in (2 * i + 1, 2 * i + 2) if k < number]
        models[f"M{i}"] = {
            "title": f"M{i}",
            "type": "object",
            "properties": {
                "id": {"title": "Id", "type": "integer"},
                "tag": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None, "title": "Tag"},
                "kids": {"type": "array", "items": {"anyOf": [*refs, {"type": "null"}]}},
            },
            "required": ["id"],
        }
    return {"$defs": models, "$ref": "#/$defs/M0"}


_INNER = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}
LARGE: dict[str, Any] = {
    "1,000 that may be left out": _optional(1000),
    "and no others": _optional(1000, additionalProperties=False),
    "a list of them": {"type": "array", "items": _optional(900), "minItems": 1},
    "an enum": {"type": "object", "properties": {"e": {"enum": [f"word {i}" for i in range(5000)]}}, "required": ["e"]},
    "300 objects": {"type": "object", "properties": {f"o{i}": _INNER for i in range(300)}},
    "60 models": _models(60),
}


def _json_schema(schema: Any) -> Grammar:
    return Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(schema, separators=(",", ":")))


@pytest.mark.parametrize("name", LARGE)
def test_a_large_schema_is_held_by_workers(name: str, tmp_path: Path) -> None:
    path, grammar = _gpt2(tmp_path), _json_schema(LARGE[name])
    vocabulary = TokenBytes.of_model(path)
    assert Trial(path).text_of(grammar)
    start = compile_matcher(open_tokenizer(vocabulary, len(vocabulary.tokens)), grammar)
    words = np.zeros(-(-len(vocabulary.tokens) // 32), np.int32)
    for seed in range(3):
        matcher, dice = start.deep_copy(), random.Random(seed)
        for _ in range(100):
            matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            assert not matcher.is_error(), matcher.get_error()
            bits = np.unpackbits(words.view(np.uint8), bitorder="little", count=len(vocabulary.tokens))
            bits[list(vocabulary.eos_token_ids)] = 0
            if not bits.any():
                break
            assert matcher.consume_token(int(dice.choice(np.flatnonzero(bits)))), matcher.get_error()


@pytest.mark.parametrize("schema", [_optional(1500), {"type": "array", "items": _optional(1500)}])
def test_a_schema_too_large_to_be_held_is_refused_by_its_trial(schema: dict[str, Any], tmp_path: Path) -> None:
    """Also where the first dice end the answer at once: a worker would meet the limit with the first brace."""
    with pytest.raises(GrammarError, match="too large"):
        Trial(_gpt2(tmp_path)).text_of(_json_schema(schema))
