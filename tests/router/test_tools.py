"""Tools in chat: what the model is told, and what its client gets."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from protocol.errors import RequestRejected
from protocol.wire import Reserve
from router.api import ChatRequest, parse
from router.intake import Intake
from router.tokenizer import Tokenizer
from router.tools import tool_use
from tests.router.tiny import byte_level_gguf
from tests.router.workers import CHAT, LENGTH, Stage, answer, events, staged

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]},
    },
}
HI = [{"role": "user", "content": "hi"}]
SAID = 'So:\n<tool_call>\n{"name": "look", "arguments": {"at": "x"}}\n</tool_call>'
CALLING: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "x"}'}},
        {"id": "c2", "type": "function", "function": {"name": "look", "arguments": ""}},
    ]}  # fmt: skip
PAST: list[dict[str, Any]] = [
    *HI,
    CALLING,
    {"role": "tool", "tool_call_id": "c1", "content": "seen"},
    {"role": "tool", "tool_call_id": "c2", "content": "unseen"},
]
KNOWING = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|start|>{{ m['role'] }}: {{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments.at }}]{% endfor %}<|stop|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant: {% endif %}"
)


def prompt(tokenizer: Tokenizer, **fields: Any) -> str:
    """Return the text that a chat comes to."""
    body = json.dumps({"model": "m", "messages": HI, **fields}).encode()
    job = Intake(tokenizer, ("m",)).job(parse(body, ChatRequest), 4096)
    return tokenizer.decode(job.prompts[0].token_ids, skip_special=False)


# --- what the model is told ---


def test_a_template_without_tools_gets_them_in_the_system_message(tokenizer: Tokenizer) -> None:
    text = prompt(tokenizer, tools=[TOOL])
    assert text.startswith("<|start|>system: You may call one or more functions")
    tool = json.loads(text.partition("<tools>\n")[2].partition("\n</tools>")[0])
    assert tool == TOOL
    assert "Call at most one function." in prompt(tokenizer, tools=[TOOL], parallel_tool_calls=False)
    own = [{"role": "system", "content": "Be kind."}, *HI]
    assert prompt(tokenizer, messages=own, tools=[TOOL]).startswith("<|start|>system: Be kind.\n\nYou may call")
    plain = prompt(tokenizer)
    assert plain == prompt(tokenizer, tools=[TOOL], tool_choice="none") == prompt(tokenizer, tools=[])


def test_numbers_of_parameters_are_told_as_they_are(tokenizer: Tokenizer, tmp_path: Path) -> None:
    bounds = {"type": "number", "minimum": 0.1, "maximum": 1e21, "multipleOf": 9007199254740993}
    tool = {"type": "function", "function": {"name": "look", "parameters": {"properties": {"at": bounds}}}}
    told = prompt(tokenizer, tools=[tool]).partition("<tools>\n")[2].partition("\n</tools>")[0]
    assert json.loads(told) == tool
    knowing = Tokenizer(byte_level_gguf(tmp_path / "knowing.gguf", chat_template=KNOWING))
    assert json.loads(prompt(knowing, tools=[tool]).partition("<|start|>")[0]) == [tool]


def test_past_calls_and_results_are_written_where_the_template_cannot(tokenizer: Tokenizer) -> None:
    assert prompt(tokenizer, messages=PAST) == (
        '<|start|>user: hi<|stop|><|start|>assistant: <tool_call>\n{"name": "look", "arguments": {"at": "x"}}\n'
        '</tool_call>\n<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call><|stop|>'
        "<|start|>user: <tool_response>\nseen\n</tool_response>\n<tool_response>\nunseen\n</tool_response><|stop|>"
        "<|start|>assistant: "
    )


def test_a_template_that_knows_tools_is_given_them(tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_level_gguf(tmp_path / "knowing.gguf", chat_template=KNOWING))
    text = prompt(tokenizer, messages=PAST, tools=[TOOL])
    assert text.startswith(json.dumps([TOOL]) + "<|start|>user: hi<|stop|>")
    assert "<|start|>assistant: [look x][look ]<|stop|><|start|>tool: seen<|stop|>" in text


# What a model once made of its arguments, and how it is told again.
MALFORMED: list[tuple[Any, str]] = [
    ('{"at": "x"', '{"at": "x"'),
    ("x, please", "x, please"),
    ("[1, 2]", "[1, 2]"),
    ("5", "5"),
    ("", "{}"),
    ("null", "{}"),
    (None, "{}"),
    ([1], "[1]"),
    ({"at": 0.5}, '{"at": 0.5}'),
    ("[" * 100 + "]" * 100, "[" * 100 + "]" * 100),
    ('{"a": 1e999}', '{"a": 1e999}'),
    ('"\\ud800"', '"\\ud800"'),
]


@pytest.mark.parametrize(("arguments", "told"), MALFORMED)
def test_malformed_arguments_of_the_past_are_told_as_they_are(
    tokenizer: Tokenizer, tmp_path: Path, arguments: Any, told: str
) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": arguments}}
    messages = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert f'<tool_call>\n{{"name": "look", "arguments": {told}}}\n</tool_call>' in prompt(tokenizer, messages=messages)
    for template in (KNOWING, KNOWING.replace("c.function.arguments.at", "c.function.arguments | items | list")):
        knowing = Tokenizer(byte_level_gguf(tmp_path / "knowing.gguf", chat_template=template))
        assert "<|start|>assistant: [look " in prompt(knowing, messages=messages, tools=[TOOL])
    del call["function"]["arguments"]  # type: ignore[attr-defined]
    assert '"arguments": {}}' in prompt(tokenizer, messages=messages)


def test_the_last_message_is_continued(tokenizer: Tokenizer) -> None:
    messages = [*HI, {"role": "assistant", "content": "The answer is"}]
    assert prompt(tokenizer, messages=messages, continue_final_message=True).endswith("assistant: The answer is")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "web_search"}]}, "tools"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tools": [TOOL, TOOL]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "x" * 65}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "string"}}}]}, "tools"),
    ({"tools": [TOOL] * 129}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "c1"}]}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
    ({"messages": [{**CALLING, "role": "user", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "assistant", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "a", "arguments": 5}}]}]}, "messages"),
    ({"messages": [*HI, {"role": "assistant", "content": None}], "continue_final_message": True}, "messages"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), BAD)
def test_what_cannot_be_called_is_refused(tokenizer: Tokenizer, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestRejected) as caught:
        prompt(tokenizer, **fields)
    assert caught.value.param == param and param in str(caught.value)


def test_parameters_nested_too_deeply_are_refused(tokenizer: Tokenizer) -> None:
    parameters: dict[str, Any] = {}
    for _ in range(300):
        parameters = {"not": parameters}
    with pytest.raises(RequestRejected, match="64 levels"):
        prompt(tokenizer, tools=[{"type": "function", "function": {"name": "a", "parameters": parameters}}])


# --- calls that are forced ---


def test_a_forced_call_is_bound_by_a_grammar(tokenizer: Tokenizer) -> None:
    other = {"type": "function", "function": {"name": "wait"}}
    both = grammar_of(tools=[TOOL, other], tool_choice="required")
    assert [accepts(both, text) for text in (
        '[{"name": "look", "arguments": {"at": "x"}}]',
        '[{"name": "wait", "arguments": {}}, {"name": "look", "arguments": {"at": "x"}}]',
        '[{"name": "look", "arguments": {}}]',
        '[{"name": "dance", "arguments": {}}]',
        '[]', 'hello',
    )] == [True, True, False, False, False, False]  # fmt: skip
    one = grammar_of(tools=[TOOL, other], tool_choice="required", parallel_tool_calls=False)
    assert not accepts(one, '[{"name": "wait", "arguments": {}}, {"name": "wait", "arguments": {}}]')
    choice = {"type": "function", "function": {"name": "wait"}}
    named = grammar_of(tools=[TOOL, other], tool_choice=choice)
    assert accepts(named, '[{"name": "wait", "arguments": {}}]')
    assert not accepts(named, '[{"name": "look", "arguments": {"at": "x"}}]')
    assert grammar_of(tools=[TOOL]) is None
    free = {"type": "function", "function": {"name": "free", "parameters": {"description": "anything"}}}
    untyped = grammar_of(tools=[free], tool_choice="required")
    assert accepts(untyped, '[{"name": "free", "arguments": {"a": 1}}]')
    assert not accepts(untyped, '[{"name": "free", "arguments": "text"}]'), "arguments are an object, said or not"


def test_schemas_that_refer_to_themselves_are_moved_as_they_are() -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}, "value": {"type": "integer"}}}
    parameters = {"$ref": "#/$defs/node", "$defs": {"node": {**node, "additionalProperties": False}}}
    tool = {"type": "function", "function": {"name": "look", "parameters": parameters}}
    grammar = grammar_of(tools=[TOOL | {"function": {"name": "other"}}, tool], tool_choice="required")
    assert accepts(grammar, '[{"name": "look", "arguments": {"next": {"next": {"value": 5}}}}]')
    assert not accepts(grammar, '[{"name": "look", "arguments": {"next": {"next": {"value": "x"}}}}]')


def grammar_of(**fields: Any) -> dict[str, Any] | None:
    """Return the JSON schema that binds the answer to a chat."""
    request = parse(json.dumps({"model": "m", "messages": HI, **fields}).encode(), ChatRequest)
    use = tool_use(request.tools, request.tool_choice, request.parallel_tool_calls)
    assert use is not None
    grammar = use.grammar()
    return None if grammar is None else json.loads(grammar.text)


def accepts(schema: dict[str, Any] | None, text: str) -> bool:
    """Whether a text obeys a schema."""
    assert schema is not None
    try:
        return bool(jsonschema.Draft202012Validator(schema).is_valid(json.loads(text)))
    except ValueError:
        return False


async def test_a_forced_call_streams_its_arguments(tmp_path: Path) -> None:
    path = byte_level_gguf(tmp_path / "tiny.gguf")
    # The first grammar waits for a process that tries it, and these workers have no heart.
    async with staged(Tokenizer(path), model_path=str(path), lease_ttl_s=60.0) as stage:
        await _check_forced_call(stage)


async def _check_forced_call(stage: Stage) -> None:
    prefill, decode = await stage.pair(max_model_len=4096, num_blocks=4000)
    body = {"model": "m", "messages": HI, "tools": [TOOL], "tool_choice": "required", "stream": True}
    asked = asyncio.create_task(stage.http.post(f"{stage.url}{CHAT}", json=body))
    async with asyncio.timeout(60):
        while not decode.heard(Reserve):
            assert not asked.done(), await asked
            await asyncio.sleep(0.01)
    reserve = await answer(prefill, decode, '[{"name": "look", "arguments": {"at": "x"}}]')
    assert reserve.sampling.grammar is not None
    chunks = (await events(await asked))[:-1]
    calls = [c for chunk in chunks for c in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert calls[0]["function"] == {"name": "look", "arguments": ""}
    fragments = [call["function"]["arguments"] for call in calls[1:]]
    assert len(fragments) > 5 and "".join(fragments) == '{"at": "x"}'
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert not any(chunk["choices"][0]["delta"].get("content") for chunk in chunks)


# --- what the client gets ---


async def test_a_whole_answer_with_a_call(stage: Stage) -> None:
    prefill, decode = await stage.pair(max_model_len=4096, num_blocks=4000)
    body = {"model": "m", "messages": HI, "tools": [TOOL]}
    asked = asyncio.create_task(stage.post(CHAT, body))
    await answer(prefill, decode, SAID)
    choice = (await asked)[1]["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] == "So:"
    [call] = message["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"] == {"name": "look", "arguments": '{"at": "x"}'}


async def test_an_answer_without_a_call_is_as_ever(stage: Stage) -> None:
    prefill, decode = await stage.pair(max_model_len=4096, num_blocks=4000)
    asked = asyncio.create_task(stage.post(CHAT, {"model": "m", "messages": HI, "tools": [TOOL]}))
    await answer(prefill, decode, "no need <tool_call>")
    choice = (await asked)[1]["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"] == "no need <tool_call>"
    assert "tool_calls" not in choice["message"]


@pytest.mark.parametrize("is_cut", [False, True])
async def test_a_stream_with_a_call(stage: Stage, is_cut: bool) -> None:
    prefill, decode = await stage.pair(max_model_len=4096, num_blocks=4000)
    body = {"model": "m", "messages": HI, "tools": [TOOL], "stream": True, "return_token_ids": True}
    asked = asyncio.create_task(stage.http.post(f"{stage.url}{CHAT}", json=body))
    text = SAID[:-5] if is_cut else SAID
    await answer(prefill, decode, text, *([LENGTH] if is_cut else []))
    chunks = (await events(await asked))[:-1]
    choices = [c["choices"][0] for c in chunks]
    deltas = [c["delta"] for c in choices]
    assert deltas[0]["role"] == "assistant" and sum("role" in d for d in deltas) == 1
    content = "".join(d.get("content") or "" for d in deltas)
    calls = [c for d in deltas for c in d.get("tool_calls", [])]
    assert [c["finish_reason"] for c in choices][:-1] == [None] * (len(choices) - 1)
    assert sum(len(c["token_ids"]) for c in choices) == len(text) + (not is_cut), "every token is reported once"
    if is_cut:
        assert content == text and calls == [] and choices[-1]["finish_reason"] == "length"
        return
    assert content == "So:" and choices[-1]["finish_reason"] == "tool_calls"
    first, *more = calls
    assert first["index"] == 0 and first["type"] == "function" and first["id"].startswith("call_")
    assert first["function"] == {"name": "look", "arguments": ""}
    assert "".join(c["function"]["arguments"] for c in more) == '{"at": "x"}'
    assert all(set(c) == {"index", "function"} for c in more)


async def test_a_stream_with_calls_cannot_be_resumed(stage: Stage) -> None:
    await stage.pair(max_model_len=4096, num_blocks=4000)
    headers = {"X-Request-ID": "x", "X-Resume-For": "5"}
    for path, fields in ((CHAT, {"messages": HI, "tools": [TOOL]}), ("/v1/responses", {"input": "hi"})):
        status, body, _ = await stage.post(path, {"model": "m", "stream": True, **fields}, headers=headers)
        assert status == 400 and body["error"]["param"] == "X-Resume-For"
