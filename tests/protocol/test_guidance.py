"""Grammars whose texts hold the names of special tokens, or what a tokenizer would rather write otherwise."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

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
