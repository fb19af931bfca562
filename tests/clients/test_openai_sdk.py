"""OpenAI's own SDK: chat, completions, responses, tools, structured output, helpers, errors and retries."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import openai
import pydantic
import pytest

from tests.clients.conftest import MAX_NUM_REQUESTS
from tests.e2e.server import Server

pytestmark = [pytest.mark.e2e, pytest.mark.model]

MODEL = "smollm2"
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FUNCTION: dict[str, Any] = {"name": "forecast", "description": "Weather of some days.", "parameters": PARAMETERS}
TOOL: Any = {"type": "function", "function": FUNCTION}
FLAT_TOOL: Any = {"type": "function", "strict": True, **FUNCTION}
ASKED: list[Any] = [{"role": "user", "content": "Weather in Paris for 3 days?"}]


class City(pydantic.BaseModel):
    """What the parsing helpers ask for."""

    name: Literal["Paris", "Rome", "Oslo"]
    is_capital: bool


def check_arguments(text: str) -> None:
    """Hold the arguments of a call against their schema."""
    arguments = json.loads(text)
    assert set(arguments) == {"city", "days"} and arguments["city"] in ("Paris", "Rome") and 1 <= arguments["days"] <= 9


# --- chat and completions ---


async def test_chat_whole_streamed_and_by_the_helper_say_the_same(client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 12}
    whole = await client.chat.completions.create(**asked)
    text = whole.choices[0].message.content
    assert text and "Paris" in text
    streamed = await client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in streamed]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage == whole.usage or chunks[-1].usage is not None
    async with client.chat.completions.stream(**asked) as stream:
        kinds = {event.type async for event in stream}
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == text and {"chunk", "content.delta", "content.done"} <= kinds


async def test_completions_with_logprobs_and_several_prompts(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model="gpt-4o-mini", prompt=["One, two,", "A, B,"], max_tokens=3, temperature=0, logprobs=2, seed=-5
    )
    assert answer.model == "gpt-4o-mini" and [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.logprobs is not None and choice.logprobs.tokens is not None
        assert "".join(choice.logprobs.tokens) == choice.text


async def test_models_and_their_names(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["smollm2", "gpt-4o-mini"]
    assert (await client.models.retrieve("gpt-4o-mini")).owned_by == "baton"


async def test_the_request_id_is_the_clients_or_ours(client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "max_tokens": 1}
    given = await client.chat.completions.create(**asked, extra_headers={"X-Request-ID": "mine-1"})
    assert given._request_id == "mine-1" and given.id == "chatcmpl-mine-1"
    assert (await client.chat.completions.create(**asked))._request_id


# --- structured output ---


async def test_chat_is_parsed_into_a_model(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.parse(
        model=MODEL, messages=QUESTION, response_format=City, temperature=0, max_tokens=40
    )
    assert isinstance(answer.choices[0].message.parsed, City)
    async with client.chat.completions.stream(
        model=MODEL, messages=QUESTION, response_format=City, temperature=0, max_tokens=40
    ) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.parsed == answer.choices[0].message.parsed


async def test_a_response_is_parsed_into_a_model(client: openai.AsyncOpenAI) -> None:
    response = await client.responses.parse(
        model=MODEL, input="Name a capital.", text_format=City, temperature=0, max_output_tokens=40
    )
    assert isinstance(response.output_parsed, City)


# --- responses ---


async def test_responses_whole_and_by_the_helper_say_the_same(client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 12}
    whole = await client.responses.create(**asked, instructions="Be brief.", metadata={"a": "b"}, store=False)
    assert whole.output_text and whole.usage is not None and whole.metadata == {"a": "b"}
    async with client.responses.stream(**asked, instructions="Be brief.") as stream:
        kinds = [event.type async for event in stream]
        assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete")
    text = ""
    async for event in await client.responses.create(**asked, instructions="Be brief.", stream=True):
        text += event.delta if event.type == "response.output_text.delta" else ""
    assert text == whole.output_text


async def test_a_response_calls_and_is_told_the_result(client: openai.AsyncOpenAI) -> None:
    create: Any = client.responses.create
    asked: dict[str, Any] = {"model": MODEL, "tools": [FLAT_TOOL], "temperature": 0, "max_output_tokens": 60}
    one = {"type": "function", "name": "forecast"}
    first = await create(**asked, input=ASKED, tool_choice=one)
    [call] = first.output
    assert call.type == "function_call" and call.name == "forecast"
    check_arguments(call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    second = await create(
        **asked, input=[*ASKED, *(item.to_dict() for item in first.output), result], tool_choice="none"
    )
    assert second.output_text
    events = [event async for event in await create(**asked, input=ASKED, tool_choice=one, stream=True)]
    fragments = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(fragments) == call.arguments and len(fragments) > 1


# --- tools in chat ---


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "forecast"}}])
async def test_a_forced_call_obeys_its_schema(client: openai.AsyncOpenAI, choice: Any) -> None:
    other: Any = {"type": "function", "function": {"name": "greet", "parameters": PARAMETERS}}
    asked: dict[str, Any] = {"model": MODEL, "messages": ASKED, "temperature": 0, "max_tokens": 80}
    answer = await client.chat.completions.create(
        **asked, tools=[TOOL, other], tool_choice=choice, parallel_tool_calls=False
    )
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls" and message.content is None and message.tool_calls
    [call] = message.tool_calls
    assert call.type == "function" and call.function.name in (
        ("forecast",) if choice != "required" else ("forecast", "greet")
    )
    check_arguments(call.function.arguments)
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    told = await client.chat.completions.create(
        model=MODEL, messages=[*ASKED, message.to_dict(), result], tools=[TOOL], max_tokens=5
    )
    assert told.choices[0].message.content is not None or told.choices[0].message.tool_calls


async def test_the_helper_gathers_a_streamed_call(client: openai.AsyncOpenAI) -> None:
    strict: Any = {"type": "function", "function": {**FUNCTION, "strict": True}}
    async with client.chat.completions.stream(
        model=MODEL, messages=ASKED, tools=[strict], tool_choice="required", parallel_tool_calls=False, temperature=0,
        max_tokens=80,
    ) as stream:  # fmt: skip
        kinds = {event.type async for event in stream}
        final = await stream.get_final_completion()
    [call] = final.choices[0].message.tool_calls or []
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    check_arguments(call.function.arguments)


async def test_a_model_that_may_call_is_well_behaved_either_way(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL, messages=ASKED, tools=[TOOL], temperature=0, max_tokens=60
    )
    choice = answer.choices[0]
    assert (choice.finish_reason == "tool_calls") == bool(choice.message.tool_calls)
    assert "<tool_call>" not in (choice.message.content or "") or choice.finish_reason in ("length", "stop")


# --- errors, keys and retries ---


async def test_errors_are_those_that_the_sdk_knows(client: openai.AsyncOpenAI, server: Server) -> None:
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(model="gpt-9", messages=QUESTION)
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="tools"):
        broken: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}
        await client.chat.completions.create(model=MODEL, messages=QUESTION, tools=[broken], tool_choice="required")
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="sk-wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            await stranger.models.list()


async def test_tenants_do_not_find_each_others_prefixes(server: Server) -> None:
    prompt = " ".join(f"tenant {i}" for i in range(60))
    cached = []
    for key in ("sk-alice", "sk-alice", "sk-bob", "sk-plain"):
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=key) as one:
            answer = await one.completions.create(model=MODEL, prompt=prompt, max_tokens=1)
            assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
            cached.append(answer.usage.prompt_tokens_details.cached_tokens or 0)
    assert cached[1] > 0 and cached[0] == cached[2] == cached[3] == 0


async def test_the_sdk_comes_back_after_429(client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": QUESTION}
    streams = [
        await client.chat.completions.create(**asked, stream=True, max_tokens=1000, extra_body={"ignore_eos": True})
        for _ in range(MAX_NUM_REQUESTS)
    ]
    with pytest.raises(openai.RateLimitError) as caught:
        await client.chat.completions.create(**asked, max_tokens=1)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    retrying = asyncio.create_task(client.with_options(max_retries=10).chat.completions.create(**asked, max_tokens=1))
    await asyncio.sleep(0.2)
    for stream in streams:
        await stream.close()
    assert (await retrying).choices[0].finish_reason == "length"
