"""xgrammar behind the same interface allows what llguidance does; skipped where the extra is not installed."""

from __future__ import annotations

import pytest

from engine.grammar import GrammarBackend, GrammarState, allowed_tokens
from engine.grammar_llguidance import LlguidanceBackend
from protocol.errors import GrammarError
from protocol.request import Grammar, GrammarKind, SamplingParams
from tests.engine.bytes_vocabulary import EOS_ID, OBJECT, WORDS, bytes_vocabulary, ids_of

pytest.importorskip("xgrammar", reason="the extra xgrammar is not installed", exc_type=ImportError)

from engine.grammar_xgrammar import XgrammarBackend  # noqa: E402

CHOICE = Grammar(kind=GrammarKind.CHOICE, text='["yes","no","nope"]')
DOCUMENTS = [(OBJECT, '{"a": 12, "b": "yy"}'), (OBJECT, '{"a":-1,"b":"x"}'), (WORDS, "abc de f"), (CHOICE, "nope")]


def _trace(backend: GrammarBackend, grammar: Grammar, text: str) -> list[tuple[bool, bool, bool]]:
    """Return, along a document, whether its token is allowed, whether EOS is, and whether it is over afterwards."""
    sampling = SamplingParams(seed=0, eos_token_ids=(EOS_ID,), grammar=grammar)
    state, found = GrammarState(backend.compile(grammar).matcher(), sampling, 8), []
    for token_id in ids_of(text):
        allowed = allowed_tokens(state.mask(), 256)
        state.accept(token_id)
        found.append((bool(allowed[token_id]), bool(allowed[EOS_ID]), state.is_over))
    assert state.failure is None
    return found


@pytest.mark.parametrize(("grammar", "text"), DOCUMENTS)
def test_both_libraries_agree_along_a_document(grammar: Grammar, text: str) -> None:
    found = _trace(XgrammarBackend(bytes_vocabulary(), 256), grammar, text)
    assert found == _trace(LlguidanceBackend(bytes_vocabulary(), 256), grammar, text)
    assert all(is_allowed for is_allowed, _, _ in found)


def test_what_it_does_not_know_it_says() -> None:
    backend = XgrammarBackend(bytes_vocabulary(), 256)
    with pytest.raises(GrammarError, match="Lark"):
        backend.compile(Grammar(kind=GrammarKind.LARK, text='start: "a"'))
    with pytest.raises(GrammarError):
        backend.compile(Grammar(kind=GrammarKind.REGEX, text="((("))
    state = GrammarState(backend.compile(WORDS).matcher(), SamplingParams(seed=0, eos_token_ids=(EOS_ID,)), 8)
    state.accept(ids_of("?")[0])
    assert state.failure is not None
