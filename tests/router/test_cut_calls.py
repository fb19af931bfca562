"""A call that the client's own `stop` or `stop_token_ids` cut is not made: no `tool_calls`, nothing "completed"."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from protocol.request import Grammar, GrammarKind
from protocol.wire import Reserve
from router.tokenizer import Tokenizer
from tests.router.tiny import byte_ids, byte_level_gguf
from tests.router.workers import CHAT, LENGTH, STOP, Stage, answer, events, staged

NAMED = {"type": "function", "function": {"name": "look"}}
LOOK, WAIT = '{"name": "look", "arguments": {"at": "x"}}', '{"name": "wait", "arguments": {}}'
BOTH = f"[{LOOK}, {WAIT}]"
FREE = f"So: <tool_call>{LOOK}</tool_call>"
(QUOTE,) = byte_ids('"')
(BRACE,) = byte_ids("}")
TO_QUOTE, TO_BRACE = BOTH[: BOTH.index('"at') + 1], BOTH[: BOTH.index("}") + 1]
KEPT = {"include_stop_str_in_output": True}

# fields, what the model writes, how its worker ends it, then: finish and stop reason, and each call's arguments.
Case = tuple[dict[str, Any], str, Any, tuple[str, Any], list[str]]
REQUIRED: dict[str, Any] = {"tool_choice": "required"}
CASES: list[Case] = [
    (REQUIRED, BOTH, STOP, ("tool_calls", None), ['{"at": "x"}', "{}"]),
    ({**REQUIRED, "stop": "zzz"}, BOTH, STOP, ("tool_calls", None), ['{"at": "x"}', "{}"]),
    ({**REQUIRED, "stop": '"at'}, BOTH, STOP, ("stop", '"at'), ["{"]),
    ({**REQUIRED, "stop": ["at", "x"]}, BOTH, STOP, ("stop", "at"), ['{"']),
    ({**REQUIRED, "stop": "at", **KEPT}, BOTH, STOP, ("stop", "at"), ['{"at']),
    ({**REQUIRED, "stop": '"name'}, BOTH, STOP, ("stop", '"name'), []),
    ({**REQUIRED, "stop": ", {"}, BOTH, STOP, ("stop", ", {"), ['{"at": "x"}']),
    ({**REQUIRED, "stop": "wai"}, BOTH, STOP, ("stop", "wai"), ['{"at": "x"}']),
    ({**REQUIRED, "stop": "{}"}, BOTH, STOP, ("stop", "{}"), ['{"at": "x"}']),
    ({**REQUIRED, "stop": "]"}, BOTH, STOP, ("stop", "]"), ['{"at": "x"}', "{}"]),
    ({**REQUIRED, "stop": "]", **KEPT}, BOTH, STOP, ("tool_calls", "]"), ['{"at": "x"}', "{}"]),
    ({**REQUIRED, "stop_token_ids": [QUOTE], "min_tokens": 31}, TO_QUOTE, STOP, ("stop", QUOTE), ["{"]),
    ({**REQUIRED, "stop_token_ids": [BRACE], "min_tokens": 33}, TO_BRACE, STOP, ("stop", BRACE), ['{"at": "x"']),
    (REQUIRED, BOTH[: BOTH.index('":', 30)], LENGTH, ("length", None), ['{"at']),
    ({"tool_choice": NAMED, "stop": "x"}, f"[{LOOK}]", STOP, ("stop", "x"), ['{"at": "']),
    ({"tool_choice": NAMED}, f"[{LOOK}]", STOP, ("tool_calls", None), ['{"at": "x"}']),
    ({}, FREE, STOP, ("tool_calls", None), ['{"at": "x"}']),
    ({"stop": "at"}, FREE, STOP, ("stop", "at"), []),
    ({"stop": " done"}, FREE + " It is done", STOP, ("tool_calls", " done"), ['{"at": "x"}']),
    ({"stop": "wait"}, FREE + f"<tool_call>{WAIT}</tool_call>", STOP, ("stop", "wait"), ['{"at": "x"}']),
    ({"stop": "call>"}, FREE.replace("So: ", "", 1), STOP, ("stop", "call>"), []),
    ({}, FREE + "<tool_call>{", STOP, ("tool_calls", None), ['{"at": "x"}']),
    ({"stop": "wait", "parallel_tool_calls": False}, FREE + f"<tool_call>{WAIT}</tool_call>", STOP,
     ("tool_calls", "wait"), ['{"at": "x"}']),
]  # fmt: skip


def _tools(is_flat: bool) -> list[dict[str, Any]]:
    at = {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]}
    functions: list[dict[str, Any]] = [{"name": "look", "parameters": at}, {"name": "wait"}]
    if is_flat:
        return [{"type": "function", **function} for function in functions]
    return [{"type": "function", "function": function} for function in functions]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    """A router with a pair of workers, and a child that is ready."""
    path: Path = byte_level_gguf(tmp_path_factory.mktemp("cut") / "tiny.gguf")
    async with staged(Tokenizer(path), model_path=str(path), lease_ttl_s=600.0) as stage:
        await stage.router.core.grammars.check(Grammar(kind=GrammarKind.REGEX, text="a"))
        await stage.pair(max_model_len=4096, num_blocks=40_000)
        yield stage


async def _asked(stage: Stage, path: str, body: dict[str, Any], text: str, finish: Any) -> Any:
    """Return what comes to a request whose model writes a text; of a stream its events."""
    prefill, decode = stage.workers
    asked = asyncio.create_task(stage.http.post(f"{stage.url}{path}", json={"model": "m", **body}))
    if "stop_token_ids" in body:
        reserve = await decode.hear(Reserve)
        ids = byte_ids(text)
        await prefill.first(ids[0])
        decode.emit(reserve, ids[1:], finish=finish)
    else:
        await answer(prefill, decode, text, finish)
    response = await asked
    assert response.status == 200, await response.text()
    return await events(response) if body.get("stream") else await response.json()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("case", CASES)
async def test_chat_says_what_ended_it(stage: Stage, case: Case) -> None:
    fields, text, finish, reasons, arguments = case
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": _tools(False), **fields}
    choice = (await _asked(stage, CHAT, body, text, finish))["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == reasons
    assert [call["function"]["arguments"] for call in choice["message"].get("tool_calls", [])] == arguments
    streamed = await _asked(stage, CHAT, {**body, "stream": True}, text, finish)
    choices = [chunk["choices"][0] for chunk in streamed[:-1]]
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == reasons
    told: dict[int, str] = {}
    for call in (call for choice in choices for call in choice["delta"].get("tool_calls", [])):
        told[call["index"]] = told.get(call["index"], "") + call["function"].get("arguments", "")
    assert list(told.values()) == arguments


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("case", [case for case in CASES if "include_stop_str_in_output" not in case[0]])
async def test_responses_say_that_they_are_incomplete(stage: Stage, case: Case) -> None:
    fields, text, finish, reasons, arguments = case
    choice = {"tool_choice": {"type": "function", "name": "look"}} if fields.get("tool_choice") == NAMED else {}
    body = {"input": "hi", "tools": _tools(True), **fields, **choice}
    whole = await _asked(stage, "/v1/responses", body, text, finish)
    streamed = await _asked(stage, "/v1/responses", {**body, "stream": True}, text, finish)
    status = "completed" if reasons[0] == "tool_calls" else "incomplete"
    assert streamed[-1]["type"] == f"response.{status}"
    for response in (whole, streamed[-1]["response"]):
        assert response["status"] == status
        details = {"reason": "max_output_tokens"} if reasons[0] == "length" else None
        assert response["incomplete_details"] == details
        calls = [item for item in response["output"] if item["type"] == "function_call"]
        assert [call["arguments"] for call in calls] == arguments
        for call in calls:
            assert (call["status"] == "completed") == _is_object(call["arguments"])


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
