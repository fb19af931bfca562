"""The texts: exact in tokens, told by the real tokenizer; equal where they are meant to be equal."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bench.text import BARE_WORDS, JUDGE, SEARCH, WORDS, Calibration, Part, Style, Writer, fixed, pieces
from model.source import resolve
from router.tokenizer import Tokenizer
from tests.bench.openai_server import count_tokens

STYLES: tuple[Style, ...] = ("prose", "rows")


@pytest.fixture(scope="module")
def smollm2(cache_dir: Path) -> Tokenizer:
    """The tokenizer of the real model."""
    return Tokenizer(resolve("smollm2", cache_dir, print).path)


@pytest.mark.model
def test_every_word_is_one_token(smollm2: Tokenizer) -> None:
    spaced = {f" {word}" for words in WORDS.values() for word in words}
    bare = {word for words in BARE_WORDS.values() for word in words} | set(BARE_WORDS)
    assert len(spaced) > 400
    assert {word for word in spaced | bare if len(smollm2.encode(word, add_special=False)) != 1} == set()


@pytest.mark.model
@pytest.mark.parametrize("style", STYLES)
def test_a_text_has_exactly_as_many_tokens_as_pieces(smollm2: Tokenizer, style: Style) -> None:
    rng = random.Random(1)
    for length in (1, 2, 3, *(rng.randrange(4, 600) for _ in range(150)), 8000):
        text = "".join(pieces(f"{style} {length}", length, style))
        assert len(smollm2.encode(text)) == length, text[-80:]


@pytest.mark.model
def test_prompts_of_several_parts_are_exact_too(smollm2: Tokenizer) -> None:
    rng, writer = random.Random(2), Writer()
    for i in range(150):
        job = Part(f"job {i % 5}", 20 + i % 5, is_shared=True)
        parts = (job, Part(f"{i}", rng.randrange(1, 200), "rows"), fixed(JUDGE), Part(f"b{i}", rng.randrange(1, 90)))
        assert len(smollm2.encode(writer.write(parts))) == sum(part.num_tokens for part in parts)


@pytest.mark.model
@pytest.mark.parametrize("line", [JUDGE, SEARCH])
def test_the_instructions_are_exact(smollm2: Tokenizer, line: str) -> None:
    assert len(smollm2.encode(Writer().write([fixed(line)]))) == fixed(line).num_tokens


def test_texts_follow_from_their_seed_alone() -> None:
    assert "".join(pieces("seven", 12)) == (" This position is for a distributed scientist with knowledge of search,")
    assert pieces("a", 50) == pieces("a", 80)[:50]
    assert pieces("a", 50) != pieces("b", 50)


def test_shared_parts_are_equal_text() -> None:
    job = Part("job", 40, is_shared=True)
    first, second = (Writer().write([job, Part(name, 10)]) for name in ("x", "y"))
    shared = "".join(pieces("job", 40))
    assert first.startswith(shared) and second.startswith(shared) and first != second


def test_probes_tell_a_constant_and_a_rate() -> None:
    assert Calibration.of_probes((24, 24), (152, 152)) == Calibration()
    assert Calibration.of_probes((24, 36), (152, 164)) == Calibration(1.0, 12)
    halves = Calibration.of_probes((20, 35), (100, 155))
    assert halves == Calibration(1.5, 5) and not halves.is_exact


@pytest.mark.parametrize("total", [60, 500, 3000])
def test_a_constant_is_taken_off_the_part_that_is_not_shared(total: int) -> None:
    job = Part("job", 30, is_shared=True)
    parts = (job, Part("own", total - 40), Part("end", 10, is_shared=True))
    text = Writer(Calibration(1.0, 12)).write(parts)
    assert count_tokens(text) + 12 == total
    assert text.startswith("".join(pieces("job", 30)))


def test_a_rate_shortens_texts_in_proportion() -> None:
    text = Writer(Calibration(1.5, 5)).write([Part("job", 300, is_shared=True), Part("own", 700)])
    assert abs(count_tokens(text) * 1.5 + 5 - 1000) <= 1.5


def test_a_prompt_keeps_a_piece_however_much_the_server_adds() -> None:
    assert count_tokens(Writer(Calibration(1.0, 30)).write([Part("own", 8)])) == 1
