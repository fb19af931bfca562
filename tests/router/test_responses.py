"""/v1/responses: what the model is told, and what its client gets, read by the SDK's own types."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from protocol.errors import RequestRejected
from protocol.request import TokenLogprobs
from protocol.wire import GrammarFailed, Reserve, TransferFailed
from router.api import parse
from router.intake import Intake
from router.response_request import ResponsesRequest
from router.tokenizer import Tokenizer
from tests.router.tiny import byte_id
from tests.router.workers import LENGTH, STOP, ScriptedWorker, Stage, answer, staged

PATH = "/v1/responses"
TOOL = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}
CALL = '<tool_call>{"name": "look", "arguments": {"at": "x"}}</tool_call>'
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
ROOM: dict[str, Any] = {"max_model_len": 4096, "num_blocks": 4000}


@pytest_asyncio.fixture
async def stage(tokenizer: Tokenizer) -> AsyncIterator[Stage]:
    """A router whose workers may be silent for as long as an SDK takes to load."""
    async with staged(tokenizer, lease_ttl_s=60.0) as stage:
        yield stage


def prompt(tokenizer: Tokenizer, **fields: Any) -> str:
    """Return the text that a request comes to."""
    body = json.dumps({"model": "m", **fields}).encode()
    job = Intake(tokenizer, ("m",)).job(parse(body, ResponsesRequest), 4096)
    return tokenizer.decode(job.prompts[0].token_ids, skip_special=False)


async def streamed(stage: Stage, body: dict[str, Any], *said: Any) -> list[dict[str, Any]]:
    """Ask for a stream, let workers say something, and return the events."""
    prefill, decode = await stage.pair(**ROOM)
    asked = asyncio.create_task(stage.http.post(f"{stage.url}{PATH}", json={"model": "m", "stream": True, **body}))
    await answer(prefill, decode, *said)
    found, lines = [], (await (await asked).text()).split("\n")
    for name, data, blank in zip(lines[::3], lines[1::3], lines[2::3], strict=False):
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}" and blank == ""
        EVENT.validate_python(event)
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


# --- what the model is told ---


def test_input_as_text_and_as_items(tokenizer: Tokenizer) -> None:
    assert prompt(tokenizer, input="hi") == "<|start|>user: hi<|stop|><|start|>assistant: "
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "c", "annotations": []}]},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "look", "arguments": '{"at":"x"}'},
        {"type": "function_call", "call_id": "c2", "name": "look", "arguments": "{}", "status": "completed"},
        {"type": "function_call_output", "call_id": "c1", "output": "d"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "e"}]},
    ]  # fmt: skip
    assert prompt(tokenizer, input=items, instructions="I", store=True, metadata={"a": "b"}) == (
        "<|start|>system: I<|stop|><|start|>user: a\nb<|stop|><|start|>assistant: c\n"
        '<tool_call>\n{"name": "look", "arguments": {"at": "x"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call><|stop|><|start|>user: <tool_response>\nd\n'
        "</tool_response>\n<tool_response>\ne\n</tool_response><|stop|><|start|>assistant: "
    )


BAD: list[tuple[dict[str, Any], str]] = [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"conversation": {"id": "c"}}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"background": True}, "background"),
    ({"truncation": "auto"}, "truncation"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"n": 2}, "n"),
    ({"return_token_ids": True}, "return_token_ids"),
    ({"include": ["file_search_call.results"]}, "include"),
    ({"tools": [{"type": "web_search"}]}, "tools"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
    ({"input": []}, "input"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input"),
    ({"input": [{"role": "user"}]}, "input"),
    ({"input": [{"content": "x"}]}, "input"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
    ({"input": [{"type": "function_call", "name": "look"}]}, "input"),
    ({"input": [{"type": "function_call_output", "call_id": "c1", "output": "x"}]}, "input"),
    ({"text": {"format": {"type": "xml"}}}, "text.format"),
    ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 5000}, "max_output_tokens"),
    ({"metadata": {"a": 5}}, "metadata"),
    ({"temperature": -1}, "temperature"),
    ({"top_logprobs": 21}, "top_logprobs"),
]


@pytest.mark.parametrize(("fields", "param"), BAD)
def test_what_is_not_supported_is_refused(tokenizer: Tokenizer, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestRejected) as caught:
        prompt(tokenizer, **{"input": "hi", **fields})
    assert caught.value.status == 400 and caught.value.param == param and param in str(caught.value)


# --- what the client gets ---


async def test_the_sdk_reads_a_whole_answer(stage: Stage) -> None:
    prefill, decode = await stage.pair(**ROOM)
    client = openai.AsyncOpenAI(base_url=f"{stage.url}/v1", api_key="unused")
    await client.models.list()
    asked = asyncio.create_task(client.responses.create(model="m", input="hi", instructions="be kind", user="u"))
    await answer(prefill, decode, "well")
    response = await asked
    Response.model_validate(response.to_dict(), strict=True)
    assert response.output_text == "well" and response.status == "completed"
    assert response.instructions == "be kind" and response.id.startswith("resp_")
    assert response.usage is not None and response.usage.output_tokens == 5
    asked = asyncio.create_task(client.responses.create(model="m", input="hi", max_output_tokens=4))
    await answer(prefill, decode, "well", LENGTH)
    response = await asked
    assert response.status == "incomplete" and response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    await client.close()


async def test_a_whole_answer_with_a_call(stage: Stage) -> None:
    prefill, decode = await stage.pair(**ROOM)
    asked = asyncio.create_task(stage.post(PATH, {"model": "m", "input": "hi", "tools": [TOOL]}))
    await answer(prefill, decode, "So: " + CALL)
    _, body, _ = await asked
    response = Response.model_validate(body, strict=True)
    message, call = response.output
    assert message.type == "message" and response.output_text == "So:"
    assert call.type == "function_call" and call.name == "look" and json.loads(call.arguments) == {"at": "x"}


async def test_numbers_of_a_schema_come_back_as_they_were(stage: Stage) -> None:
    prefill, _ = await stage.pair(**ROOM)
    bounds = {"type": "object", "properties": {"a": {"minimum": 0.1, "maximum": 9007199254740993, "multipleOf": 1e-7}}}
    body = {"model": "m", "input": "x", "tools": [{"type": "function", "name": "f", "parameters": bounds}]}
    asked = asyncio.create_task(stage.post(PATH, body))
    await prefill.first(2, STOP)
    assert (await asked)[1]["tools"][0]["parameters"] == bounds


async def test_events_of_a_text(stage: Stage) -> None:
    events = await streamed(stage, {"input": "hi"}, "ab")
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert [event["delta"] for event in events[4:6]] == ["a", "b"] and events[6]["text"] == "ab"
    last = Response.model_validate(events[-1]["response"], strict=True)
    assert last.output_text == "ab" and last.status == "completed" and last.usage is not None
    assert last.output[0].id == events[2]["item"]["id"] == events[4]["item_id"]


async def test_events_of_text_and_call_that_are_cut_off(stage: Stage) -> None:
    events = await streamed(stage, {"input": "hi", "tools": [TOOL]}, f"a\n{CALL}{CALL}<tool_call>{{", LENGTH)
    kinds = [event["type"].removeprefix("response.") for event in events]
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    text = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
            "output_item.done"]  # fmt: skip
    assert kinds == ["created", "in_progress", *text, *call, *call, *text, "incomplete"]
    assert [event["output_index"] for event in events if "output_index" in event] == [0] * 6 + [1] * 4 + [2] * 4 + [
        3
    ] * 6
    output = Response.model_validate(events[-1]["response"], strict=True).output
    assert [item.type for item in output] == ["message", "function_call", "function_call", "message"]
    assert [item.status for item in output] == ["completed", "completed", "completed", "incomplete"]  # type: ignore[union-attr]


async def test_an_answer_without_text_is_an_empty_message(stage: Stage) -> None:
    prefill, _ = await stage.pair(**ROOM)
    asked = asyncio.create_task(
        stage.http.post(f"{stage.url}{PATH}", json={"model": "m", "input": "x", "stream": True})
    )
    await prefill.first(2, STOP)
    text = await (await asked).text()
    assert text.count("event: response.output_item.done") == 1 and "response.completed" in text


async def test_log_probabilities_come_with_the_text(stage: Stage) -> None:
    prefill, _ = await stage.pair(**ROOM)
    body = {"model": "m", "input": "hi", "max_output_tokens": 1, "top_logprobs": 1}
    asked = asyncio.create_task(stage.post(PATH, {**body, "include": ["message.output_text.logprobs"]}))
    await prefill.first(byte_id("a"), LENGTH, logprobs=TokenLogprobs(-0.5, ((byte_id("a"), -0.5),)))
    [part] = (await asked)[1]["output"][0]["content"]
    assert part["text"] == "a" and part["logprobs"][0]["token"] == "a" and part["logprobs"][0]["logprob"] == -0.5
    assert part["logprobs"][0]["top_logprobs"] == [{"token": "a", "logprob": -0.5, "bytes": [97]}]


async def test_the_sdks_streaming_helper(stage: Stage) -> None:
    prefill, decode = await stage.pair(**ROOM)
    client = openai.AsyncOpenAI(base_url=f"{stage.url}/v1", api_key="unused")
    await client.models.list()

    async def read() -> tuple[list[str], Any]:
        async with client.responses.stream(model="m", input="hi") as stream:
            kinds: list[str] = [event.type async for event in stream]
            return kinds, await stream.get_final_response()

    reading = asyncio.create_task(read())
    await answer(prefill, decode, "well")
    kinds, final = await reading
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed" and final.output_text == "well"
    await client.close()


async def test_a_stream_that_fails_says_so(stage: Stage) -> None:
    prefill, decode = await stage.pair(**ROOM)
    asked = asyncio.create_task(
        stage.http.post(f"{stage.url}{PATH}", json={"model": "m", "input": "x", "stream": True})
    )
    await _fail_after_one_token(prefill, decode)
    for _ in range(4):
        prefill_message = await prefill.first(byte_id("a"))
        prefill.say(TransferFailed(transfer_id=prefill_message.transfer_id, reason="test"))
    text = await (await asked).text()
    event = json.loads(text.strip().rsplit("data: ", 1)[1])
    EVENT.validate_python(event)
    assert event["type"] == "response.failed" and event["response"]["error"]["code"] == "server_error"
    assert event["response"]["output"][0]["status"] == "incomplete"


async def test_a_failed_grammar_is_no_fault_of_the_server(stage: Stage) -> None:
    prefill, decode = await stage.pair()
    body = {"model": "m", "input": "hi", "stream": True}
    asked = asyncio.create_task(stage.http.post(f"{stage.url}/v1/responses", json=body))
    reserve = await decode.hear(Reserve)
    await prefill.first(byte_id("a"))
    decode.say(GrammarFailed(transfer_id=reserve.transfer_id, reason="grammar: too costly"))
    text = await (await asked).text()
    event = json.loads(text.strip().rsplit("data: ", 1)[1])
    EVENT.validate_python(event)
    assert event["type"] == "response.failed" and event["response"]["error"]["code"] == "invalid_prompt"


async def _fail_after_one_token(prefill: ScriptedWorker, decode: ScriptedWorker) -> None:
    reserve = await decode.hear(Reserve)
    await prefill.first(byte_id("a"))
    decode.emit(reserve, [byte_id("b")])
    decode.say(TransferFailed(transfer_id=reserve.transfer_id, reason="test"))


def test_the_form_of_the_text_binds_the_answer(tokenizer: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    body = json.dumps({"model": "m", "input": "hi", "text": {"format": form}}).encode()
    job = Intake(tokenizer, ("m",)).job(parse(body, ResponsesRequest), 4096)
    grammar = job.choices[0].sampling.grammar
    assert grammar is not None and json.loads(grammar.text) == schema and job.grammar_field == "text.format"
