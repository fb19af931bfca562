"""What a grammar allows, when it is over, how it follows replayed tokens, and how it fails."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import numpy as np
import pytest

from engine.grammar import GrammarState, allowed_tokens, ended, follow
from engine.grammar_compiler import GrammarCompiler
from engine.grammar_llguidance import LlguidanceBackend
from protocol.errors import GrammarError, GrammarUnavailable
from protocol.request import FinishReason, Grammar, GrammarKind, SamplingParams
from protocol.wire import Reserve, decode, encode
from tests.engine.bytes_vocabulary import EOS_ID, OBJECT, WORDS, bytes_vocabulary, ids_of, state_of
from tests.router.tiny import byte_ids, byte_level_gguf

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


def _allowed(state: GrammarState, vocab_size: int = 256) -> set[int]:
    return set(np.flatnonzero(allowed_tokens(state.mask(), vocab_size)).tolist())


def _after(grammar: Grammar, text: str, **fields: object) -> GrammarState:
    state = state_of(grammar, **fields)  # type: ignore[arg-type]
    for token_id in ids_of(text):
        assert token_id in _allowed(state), text
        state.accept(token_id)
    assert state.failure is None
    return state


def test_only_what_obeys_is_allowed() -> None:
    assert _allowed(_after(OBJECT, "")) == {*ids_of("{")}
    assert _allowed(_after(OBJECT, '{"a": ')) == {*ids_of("-0123456789")}
    assert _allowed(_after(OBJECT, '{"a": 12, "b": "')) == {*ids_of("xy")}
    assert not _after(OBJECT, '{"a": 12, "b": "x"').is_over


def test_an_eos_is_allowed_exactly_where_the_output_may_end() -> None:
    assert EOS_ID not in _allowed(_after(WORDS, "ab"))
    complete = _after(WORDS, "abc")
    assert EOS_ID in _allowed(complete) and not complete.is_over
    assert EOS_ID not in _allowed(_after(WORDS, "abc "))
    assert EOS_ID not in _allowed(_after(WORDS, "abc", ignore_eos=True)), "then it goes on while it can"


def test_the_last_possible_token_ends_the_output_without_an_eos() -> None:
    state = _after(OBJECT, '{"a": 12, "b": "x"}')
    assert state.is_over and _allowed(state) == {EOS_ID}
    assert _after(OBJECT, '{"a": 12, "b": "x"}', ignore_eos=True).is_over


def _reasons(text: str, grammar: Grammar, **fields: object) -> list[FinishReason | None]:
    sampling = SamplingParams(seed=0, eos_token_ids=(EOS_ID,), grammar=grammar, **fields)  # type: ignore[arg-type]
    state = state_of(grammar, **fields)  # type: ignore[arg-type]
    tokens = [EOS_ID if char == "$" else ids_of(char)[0] for char in text]
    reasons = (follow(sampling, state, token_id, i + 1, 100 - i) for i, token_id in enumerate(tokens))
    return [ended(state, reason) for reason in reasons]


def test_why_a_sequence_ends() -> None:
    choice = Grammar(kind=GrammarKind.CHOICE, text='["yes","no","nope"]')
    assert _reasons("yes", choice) == [None, None, STOP]
    assert _reasons("no$", choice) == [None, None, STOP]
    assert _reasons("yes", choice, max_tokens=3) == [None, None, STOP], "complete, if only just"
    assert _reasons("ye", choice, max_tokens=2) == [None, LENGTH]
    assert _reasons("yes", choice, min_tokens=9, max_tokens=20) == [None, None, STOP], "nothing could follow"
    assert _reasons("ye", choice, stop_token_ids=tuple(ids_of("e"))) == [None, STOP], "the client's own wish"
    assert _reasons("yes", choice, stop_token_ids=tuple(ids_of("e")), min_tokens=3) == [None, None, STOP]


def test_before_min_tokens_a_grammar_gets_every_token_that_it_may_need() -> None:
    stops, grammar = (5, 6), Grammar(kind=GrammarKind.REGEX, text="a+")
    free = SamplingParams(seed=0, eos_token_ids=(2,), stop_token_ids=stops)
    assert free.barred_token_ids == (5, 6, 2)
    assert SamplingParams(seed=0, eos_token_ids=(2,), stop_token_ids=stops, grammar=grammar).barred_token_ids == (2,)
    bound = SamplingParams(seed=0, eos_token_ids=(2,), stop_token_ids=stops, grammar=grammar, ignore_eos=True)
    assert bound.barred_token_ids == ()


@pytest.mark.parametrize("grammar", [OBJECT, WORDS])
def test_replayed_tokens_lead_to_the_state_of_those_sampled_one_by_one(grammar: Grammar) -> None:
    text = '{"a": -305, "b": "yy"' if grammar is OBJECT else "abc defg h"
    for length in range(len(text) + 1):
        replayed = state_of(grammar)
        replayed.replay(ids_of(text[:length]))
        stepped = _after(grammar, text[:length])
        assert _allowed(replayed) == _allowed(stepped) and replayed.is_over == stepped.is_over


def test_what_does_not_obey_fails_the_state_and_nothing_else() -> None:
    with pytest.raises(GrammarError, match="after token"):
        state_of(OBJECT).replay(ids_of('{"c'))
    state = _after(OBJECT, "{")
    state.accept(ids_of("?")[0])
    assert state.failure is not None and not state.is_over
    assert _allowed(state) == set(range(256)), "its token is thrown away, whatever it is"


def test_a_state_too_complex_for_a_step_fails_instead_of_holding_it_up() -> None:
    state = state_of(Grammar(kind=GrammarKind.REGEX, text="[x-z]{3}((a{100}){100}){100}b"))
    for _ in range(3):
        assert state.failure is None and _allowed(state) == {*ids_of("xyz")}
        state.accept(ids_of("y")[0])
    for _ in range(9):
        state.mask()
        state.accept(ids_of("a")[0])
    assert state.failure is not None and "lexer error" in state.failure


BROKEN = [
    (GrammarKind.JSON_SCHEMA, '{"type":"nonsense"}'),
    (GrammarKind.JSON_SCHEMA, "not json"),
    (GrammarKind.JSON_SCHEMA, '{"$ref":"#/nowhere"}'),
    (GrammarKind.JSON_SCHEMA, '{"not":{}}'),
    (GrammarKind.REGEX, "(["),
    (GrammarKind.LARK, "start: nowhere"),
    (GrammarKind.CHOICE, "not json"),
]


@pytest.mark.parametrize(("kind", "text"), BROKEN)
def test_a_broken_grammar_says_why(kind: GrammarKind, text: str) -> None:
    with pytest.raises(GrammarError) as caught:
        LlguidanceBackend(bytes_vocabulary(), 256).compile(Grammar(kind=kind, text=text))
    assert str(caught.value) and "<" not in str(caught.value)


def test_white_space_is_one_space_unless_said_otherwise() -> None:
    schema = '{"type":"array","items":{"const":1},"minItems":2,"maxItems":2}'
    assert _allowed(_after(Grammar(kind=GrammarKind.JSON_SCHEMA, text=schema), "[1, ")) == {*ids_of("1")}
    none = Grammar(kind=GrammarKind.JSON_SCHEMA, text=schema, whitespace_pattern="")
    assert _allowed(_after(none, "[1,")) == {*ids_of("1")}
    lines = Grammar(kind=GrammarKind.JSON_SCHEMA, text=schema, whitespace_pattern="\\n?")
    assert _allowed(_after(lines, "[1,")) == {*ids_of("1\n")}


def test_a_vocabulary_smaller_than_the_logits_leaves_the_rest_out() -> None:
    state = state_of(WORDS, vocab_size=300)
    assert max(_allowed(state, 300)) < 260


def test_a_grammar_crosses_the_wire() -> None:
    sampling = SamplingParams(seed=1, grammar=OBJECT)
    message = Reserve(request_id=1, transfer_id=2, epoch=0, prefill_worker_id="p", prompt=(1,), sampling=sampling)
    assert decode(encode(message)) == message
    long = Grammar(kind=GrammarKind.LARK, text="x" * (1 << 16))
    message = msgspec.structs.replace(message, sampling=SamplingParams(seed=1, grammar=long))
    assert decode(encode(message)) == message


# --- the worker's compiler ---


def _bound(grammar: Grammar) -> SamplingParams:
    return SamplingParams(seed=0, eos_token_ids=(EOS_ID,), grammar=grammar)


async def test_the_compiler_compiles_each_grammar_once_and_fails_alone(tmp_path: Path) -> None:
    compiler = GrammarCompiler("auto", byte_level_gguf(tmp_path / "tiny.gguf"), 300)
    broken = Grammar(kind=GrammarKind.REGEX, text="(")
    sequences = [compiler.state_of(_bound(g), ()) for g in (OBJECT, broken, OBJECT, WORDS, OBJECT)]
    found = await asyncio.gather(*sequences, return_exceptions=True)
    assert [isinstance(state, GrammarState) for state in found] == [True, False, True, True, True]
    assert isinstance(found[1], GrammarError) and "unclosed" in str(found[1])
    assert len({id(state) for state in found}) == 5 and len(compiler._kept) == 3
    assert await compiler.state_of(SamplingParams(seed=0), ()) is None
    state = await compiler.state_of(_bound(WORDS), byte_ids("abc d"))
    assert state is not None and byte_ids("e")[0] in _allowed(state, 300)
    with pytest.raises(GrammarError, match="after token"):
        await compiler.state_of(_bound(WORDS), byte_ids("a1"))
    with pytest.raises(GrammarError, match="empty output"):
        await compiler.state_of(_bound(Grammar(kind=GrammarKind.REGEX, text="")), ())


async def test_a_model_without_a_vocabulary_fails_requests_that_need_one(tmp_path: Path) -> None:
    compiler = GrammarCompiler("auto", tmp_path, 300)
    with pytest.raises(GrammarUnavailable, match="no tokenizer.json"):
        await compiler.state_of(_bound(WORDS), ())


async def test_the_compiler_forgets_the_oldest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.grammar_compiler.MAX_KEPT", 2)
    compiler = GrammarCompiler("auto", byte_level_gguf(tmp_path / "tiny.gguf"), 300)
    for text in ("a+", "b+", "a+", "c+"):
        await compiler.state_of(_bound(Grammar(kind=GrammarKind.REGEX, text=text)), ())
    assert [grammar.text for grammar in compiler._kept] == ["a+", "c+"]
