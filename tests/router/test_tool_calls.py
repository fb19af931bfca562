"""Calls in what a model says: found however the text is cut, and nothing else taken for one."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.call_shapes import SaidCalls
from router.tool_calls import CallParser, ForcedCallParser, FreeCallParser

NAMES = ("look", "sum")
LOOK = '<tool_call>\n{"name": "look", "arguments": {"at": "Łódź {[\\" x"}}\n</tool_call>'
SUM = '<tool_call>{"name":"sum","arguments":{"of":[1,2,{"a":null}]}}</tool_call>'


def said(parser: CallParser, pieces: Iterable[str]) -> SaidCalls:
    """Feed a text in pieces."""
    found = SaidCalls()
    for piece in pieces:
        found.add(parser.feed(piece))
    found.add(parser.flush())
    return found


def cuts(text: str, seed: int) -> list[str]:
    """Cut a text in places that a seed chooses."""
    rng = random.Random(seed)
    places = sorted({0, len(text), *(rng.randrange(len(text) + 1) for _ in range(rng.randrange(1, 30)))})
    return [text[a:b] for a, b in zip(places, places[1:], strict=False)]


FREE: list[tuple[str, str, list[tuple[str, object]]]] = [
    ("hello < there", "hello < there", []),
    (LOOK, "", [("look", {"at": 'Łódź {[" x'})]),
    (f"I shall look.\n\n{LOOK}\n", "I shall look.", [("look", {"at": 'Łódź {[" x'})]),
    (LOOK + "\n" + SUM, "", [("look", {"at": 'Łódź {[" x'}), ("sum", {"of": [1, 2, {"a": None}]})]),
    ('<tool_call>{"name": "sum", "parameters": {}}</tool_call>', "", [("sum", {})]),
    ('<tool_call>{"name": "sum"}</tool_call>', "", [("sum", {})]),
    # What is no call is content, word for word.
    ('a\n<tool_call>{"name": "other", "arguments": {}}</tool_call> b',) * 2 + ([],),
    ("a\n<tool_call>{broken</tool_call>",) * 2 + ([],),
    ("a\n<tool_call>[1]</tool_call>",) * 2 + ([],),
    ('<tool_call>{"name": 5}</tool_call>',) * 2 + ([],),
    ('<tool_call>{"name": "sum", "arguments": "x"}</tool_call>',) * 2 + ([],),
    ('a \n<tool_call>{"name": "sum", "arguments": {}}',) * 2 + ([],),
    ("ends with a beginning <tool_c",) * 2 + ([],),
    ("ends with blanks \n ",) * 2 + ([],),
    ("<tool_call>" + "[" * 5000 + "</tool_call>",) * 2 + ([],),
]


@pytest.mark.parametrize(("text", "content", "calls"), FREE)
def test_calls_of_a_model_that_may_call(text: str, content: str, calls: list[tuple[str, object]]) -> None:
    for seed in range(40):
        found = said(FreeCallParser(NAMES), [text] if seed == 0 else cuts(text, seed))
        pairs = zip(found.names, found.arguments, strict=True)
        assert (found.content, [(n, json.loads(a)) for n, a in pairs]) == (content, calls)
    assert said(FreeCallParser(NAMES), text).content == content, "one character at a time"


def test_only_the_first_call_counts_where_one_is_allowed() -> None:
    found = said(FreeCallParser(NAMES, is_parallel=False), [LOOK + SUM])
    assert found.names == ["look"] and found.content == ""


def test_content_is_not_held_back_without_reason() -> None:
    parser = FreeCallParser(NAMES)
    assert [str(parser.feed(piece)) for piece in ("one", " two", " <", "b")] == [
        "[Content(text='one')]", "[Content(text=' two')]", "[]", "[Content(text=' <b')]",
    ]  # fmt: skip


@given(st.text(alphabet='<tool_cal>/{}" \nnamesu:,', max_size=120), st.integers(0, 1000))
def test_any_text_comes_out_as_it_went_in_however_it_is_cut(text: str, seed: int) -> None:
    whole, pieces = said(FreeCallParser(NAMES), [text]), said(FreeCallParser(NAMES), cuts(text, seed))
    assert whole == pieces and (whole.names or whole.content == text)


FORCED = ' [ {"name": "look", "arguments": {"at": "]}\\\\\\" {"}} , {"name":"sum","arguments":{"of":[[1],{}]}}]'


def test_forced_calls_are_told_as_they_come() -> None:
    for seed in range(60):
        found = said(ForcedCallParser(), cuts(FORCED, seed))
        assert found.names == ["look", "sum"] and found.content == ""
        assert [json.loads(a) for a in found.arguments] == [{"at": ']}\\" {'}, {"of": [[1], {}]}]
    parser = ForcedCallParser()
    told = [parser.feed(char) for char in FORCED]
    assert sum(len(parts) for parts in told) > 30, "arguments are not held back"


def test_a_forced_call_that_is_cut_off_has_begun() -> None:
    end = FORCED.index("]}")
    found = said(ForcedCallParser(), [FORCED[:end]])
    assert found.names == ["look"] and found.arguments == ['{"at": "']
    assert said(ForcedCallParser(), [FORCED[:12]]).names == []
