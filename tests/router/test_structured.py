"""Structured output at the router: every way to ask for it, and a child process that may die of it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from protocol.errors import GrammarError, InvalidRequest, NotReady
from protocol.request import Grammar, GrammarKind
from protocol.wire import Reserve
from router.api import ChatRequest, CompletionRequest, parse
from router.grammar_checks import GrammarChecks
from router.intake import Intake
from router.structured import MAX_NESTING, Structured, structured_output
from router.tokenizer import Tokenizer
from tests.router.tiny import byte_ids, byte_level_gguf
from tests.router.workers import CHAT, HI, STOP, Stage, staged

OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}}
TEXT = '{"type":"object","properties":{"a":{"type":"integer"}}}'
SCHEMA, REGEX, CHOICE, LARK = GrammarKind.JSON_SCHEMA, GrammarKind.REGEX, GrammarKind.CHOICE, GrammarKind.LARK


def _asked(**fields: Any) -> Structured | None:
    return structured_output(parse(json.dumps({**HI, **fields}).encode(), ChatRequest))


def _format(schema: Any = OBJECT, **fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, **fields}}}


WAYS: list[tuple[dict[str, Any], GrammarKind, str, str | None]] = [
    ({"response_format": {"type": "json_object"}}, SCHEMA, '{"type":"object"}', None),
    (_format(), SCHEMA, TEXT, None),
    (_format(strict=True, description="d"), SCHEMA, TEXT, None),
    (_format(schema=True), SCHEMA, "true", None),
    ({"structured_outputs": {"json": OBJECT}}, SCHEMA, TEXT, None),
    ({"structured_outputs": {"json": json.dumps(OBJECT)}}, SCHEMA, TEXT, None),
    ({"structured_outputs": {"json": OBJECT, "whitespace_pattern": "\\n?"}}, SCHEMA, TEXT, "\\n?"),
    ({"structured_outputs": {"json": OBJECT, "disable_any_whitespace": True}}, SCHEMA, TEXT, ""),
    (
        {"structured_outputs": {"json": OBJECT, "disable_additional_properties": True}},
        SCHEMA,
        TEXT[:-1] + ',"additionalProperties":false}',
        None,
    ),
    ({"structured_outputs": {"json_object": True}}, SCHEMA, '{"type":"object"}', None),
    ({"structured_outputs": {"regex": "a+"}}, REGEX, "a+", None),
    ({"structured_outputs": {"choice": ["é", "b"]}}, CHOICE, '["é","b"]', None),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, LARK, 'start: "a"', None),
    ({"guided_json": OBJECT}, SCHEMA, TEXT, None),
    ({"guided_json": json.dumps(OBJECT), "guided_whitespace_pattern": " *"}, SCHEMA, TEXT, " *"),
    ({"guided_regex": "a+"}, REGEX, "a+", None),
    ({"guided_choice": ["a", "b"]}, CHOICE, '["a","b"]', None),
    ({"guided_grammar": 'root ::= "a"'}, LARK, 'root ::= "a"', None),
]


@pytest.mark.parametrize(("fields", "kind", "text", "pattern"), WAYS)
def test_every_way_comes_to_a_grammar(
    fields: dict[str, Any], kind: GrammarKind, text: str, pattern: str | None
) -> None:
    expected = Structured(Grammar(kind=kind, text=text, whitespace_pattern=pattern), next(iter(fields)))
    assert _asked(**fields) == expected
    body = json.dumps({"model": "m", "prompt": "x", **fields}).encode()
    assert structured_output(parse(body, CompletionRequest)) == expected


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}, {"guided_json": None}])
def test_most_requests_ask_for_nothing(fields: dict[str, Any]) -> None:
    assert _asked(**fields) is None


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


BAD: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "structural_tag", "structures": []}}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "response_format"),
    ({"response_format": "json"}, "response_format"),
    (_format(schema=[]), "response_format"),
    (_format(schema=_nested(MAX_NESTING)), "response_format"),
    (_format(schema={"enum": ["x" * (1 << 16)]}), "response_format"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs"),
    ({"structured_outputs": {"json": "no json"}}, "structured_outputs"),
    ({"structured_outputs": {"json": "[" * 100_000}}, "structured_outputs"),
    ({"structured_outputs": {"json": '"text"'}}, "structured_outputs"),
    ({"structured_outputs": {"json": '{"type": "object", "type": "string"}'}}, "structured_outputs"),
    ({"guided_json": '{"enum": [{"a": 1, "\\u0061": 2}]}'}, "guided_json"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs"),
    ({"structured_outputs": {"choice": [""]}}, "structured_outputs"),
    ({"guided_choice": ["a"] * 1025}, "guided_choice"),
    ({"guided_choice": [1]}, "guided_choice"),
    ({"guided_regex": ""}, "guided_regex"),
    ({"guided_regex": "a" * ((1 << 16) + 1)}, "guided_regex"),
    ({"guided_regex": "é" * (1 << 16)}, "guided_regex"),
    ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
    ({"guided_choice": ["a"], "response_format": {"type": "json_object"}}, "guided_choice"),
    ({"guided_regex": "a", "guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
]


@pytest.mark.parametrize(("fields", "param"), BAD)
def test_what_cannot_be_asked_for_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        _asked(**fields)
    assert caught.value.param == param and param in str(caught.value)


def test_fields_of_other_servers_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="structural_tag"):
        _asked(structural_tag={"x": 1})
    with pytest.raises(InvalidRequest, match="guided_decoding_backend"):
        _asked(guided_decoding_backend="outlines")


def test_every_choice_gets_the_grammar(tokenizer: Tokenizer) -> None:
    body = {"model": "m", "prompt": ["a", "b"], "n": 2, "guided_regex": "a+"}
    job = Intake(tokenizer, ["m"]).job(parse(json.dumps(body).encode(), CompletionRequest), 64)
    assert job.grammar_field == "guided_regex" and len(job.choices) == 4
    assert {choice.sampling.grammar for choice in job.choices} == {Grammar(kind=REGEX, text="a+")}


# --- the child process ---


@pytest_asyncio.fixture
async def checks(tmp_path: Path) -> AsyncIterator[GrammarChecks]:
    """Checks for the small vocabulary."""
    checks = GrammarChecks(str(byte_level_gguf(tmp_path / "tiny.gguf")))
    yield checks
    await checks.close()


async def test_good_grammars_pass_as_they_are(checks: GrammarChecks) -> None:
    for kind, text in ((SCHEMA, TEXT), (REGEX, "a+"), (CHOICE, '["a","é"]'), (LARK, 'start: "a" | "b"')):
        grammar = Grammar(kind=kind, text=text)
        assert await checks.check(grammar) is grammar
    gbnf = await checks.check(Grammar(kind=LARK, text='root ::= "a" | "b"'))
    assert "start:" in gbnf.text and "::=" not in gbnf.text, "workers get Lark"


HOSTILE: list[tuple[GrammarKind, str, str]] = [
    (SCHEMA, '{"type":"nonsense"}', "Invalid type"),
    (SCHEMA, '{"$ref":"#"}', "no output obeys"),
    (SCHEMA, '{"allOf":[{"$ref":"#/$defs/a"}],"$defs":{"a":{"anyOf":[{"$ref":"#/$defs/a"}]}}}', ""),
    (SCHEMA, '{"$ref":"#/nowhere"}', "nowhere"),
    (SCHEMA, '{"$ref":"https://example.org/schema.json"}', ""),
    (SCHEMA, '{"unevaluatedProperties":false,"type":"object"}', "unevaluatedProperties"),
    (SCHEMA, '{"type":"string","pattern":"^(a{1000}){1000}$"}', ""),
    (SCHEMA, '{"type":"string","pattern":"("}', ""),
    (SCHEMA, json.dumps({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}}), ""),
    (REGEX, "((a{100}){100}){100}b", "lexer"),
    (REGEX, "(a{1000}){1000}", "lexer"),
    (REGEX, "(((", "unclosed group"),
    (REGEX, "()", "empty output"),
    (LARK, "start: start start", ""),
    (LARK, "start: a\na: nowhere", "nowhere"),
    (LARK, "root ::= (", "neither Lark nor GBNF"),
    (LARK, "root ::= [\\d]", "neither Lark nor GBNF"),
    (LARK, 'rootx [a]: "x"', "1("),
    (LARK, 'root ::= ' + "(" * 5000 + '"a"' + ")" * 5000, ""),
]  # fmt: skip


async def test_broken_and_hostile_grammars_are_refused_with_a_reason(checks: GrammarChecks) -> None:
    for kind, text, reason in HOSTILE:
        with pytest.raises(GrammarError) as caught:
            await checks.check(Grammar(kind=kind, text=text))
        assert reason in str(caught.value) and 0 < len(str(caught.value)) < 400, text[:60]
    assert await checks.check(Grammar(kind=REGEX, text="b+"))


async def test_what_only_cannot_be_read_ends_no_child(checks: GrammarChecks) -> None:
    assert await checks.check(Grammar(kind=REGEX, text="c+"))
    before = {child._process.pid for child in checks._free}
    for text in ("root ::= (", "root ::= [\\d]", '?start: "a" b', "::=", "a ::= b\nb", "root ::= a", 'a ::= "b"'):
        with pytest.raises(GrammarError) as caught:
            await checks.check(Grammar(kind=LARK, text=text))
        assert "too much" not in str(caught.value), text
    assert before <= {child._process.pid for child in checks._free}


async def test_verdicts_are_kept_and_shared(checks: GrammarChecks) -> None:
    good, bad = Grammar(kind=REGEX, text="a+"), Grammar(kind=REGEX, text="(")
    found = await asyncio.gather(*(checks.check(g) for g in (good, bad) * 20), return_exceptions=True)
    assert found[::2] == [good] * 20 and all(isinstance(error, GrammarError) for error in found[1::2])
    child = checks._free[-1]
    os.kill(child._process.pid, signal.SIGSTOP)  # nobody asks it again
    assert await checks.check(good) is good
    with pytest.raises(GrammarError, match="unclosed"):
        await checks.check(bad)


async def test_a_child_that_dies_or_hangs_takes_nobody_along(
    checks: GrammarChecks, monkeypatch: pytest.MonkeyPatch
) -> None:
    await checks.check(Grammar(kind=REGEX, text="a"))
    os.kill(checks._free[-1]._process.pid, signal.SIGKILL)
    assert await checks.check(Grammar(kind=REGEX, text="b")), "the next child is asked"
    monkeypatch.setattr("router.grammar_checks.CHECK_BUDGET_S", 0.2)
    os.kill(checks._free[-1]._process.pid, signal.SIGSTOP)
    with pytest.raises(NotReady):
        await checks.check(Grammar(kind=REGEX, text="d"))
    monkeypatch.undo()
    assert await checks.check(Grammar(kind=REGEX, text="e"))


async def test_a_model_without_vocabulary_says_so(tmp_path: Path) -> None:
    checks = GrammarChecks(str(tmp_path))
    try:
        with pytest.raises(NotReady, match="no tokenizer.json"):
            await checks.check(Grammar(kind=REGEX, text="a"))
    finally:
        await checks.close()


# --- over HTTP ---


@pytest_asyncio.fixture
async def served(tokenizer: Tokenizer, tmp_path: Path) -> AsyncIterator[Stage]:
    """A router whose model has files, and whose child is ready: its start may take long on a busy machine."""
    async with staged(tokenizer, model_path=str(byte_level_gguf(tmp_path / "tiny.gguf"))) as stage:
        await stage.router.core.grammars.check(Grammar(kind=REGEX, text="a"))
        yield stage


async def test_a_broken_schema_is_a_400_that_names_its_field(served: Stage) -> None:
    await served.pair()
    for fields, param in (
        (_format(schema={"type": "nonsense"}), "response_format"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs"),
    ):
        status, body, _ = await served.post(CHAT, {**HI, **fields})
        assert status == 400 and body["error"]["param"] == param and param in body["error"]["message"]
    assert not served.workers[0].received or not served.workers[1].heard(Reserve)


async def test_the_token_that_completes_a_grammar_is_text(served: Stage) -> None:
    prefill, decode = await served.pair()
    asked = asyncio.create_task(served.post(CHAT, {**HI, "guided_choice": ["ok", "no"]}))
    reserve = await decode.hear(Reserve)
    assert reserve.sampling.grammar == Grammar(kind=CHOICE, text='["ok","no"]')
    first = await prefill.first(byte_ids("o")[0])
    assert first.sampling.grammar == reserve.sampling.grammar
    decode.emit(reserve, byte_ids("k"), finish=STOP)
    status, body, _ = await asked
    choice = body["choices"][0]
    assert status == 200 and choice["message"]["content"] == "ok" and choice["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 2
