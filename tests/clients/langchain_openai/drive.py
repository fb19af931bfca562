"""LangChain's ChatOpenAI against a running server: chat, streams, forced calls, schemas, responses, completions."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

QUESTION = "Write one sentence about the sea."
NUM_TOKENS = 16


class Verdict(BaseModel):
    """What a judge of a candidate answers."""

    fits: bool = Field(description="whether the candidate fits")
    level: Literal["junior", "senior"] = Field(description="how senior")


@tool
def search_jobs(city: str, remote: bool) -> str:
    """Search jobs in a city."""
    return f"{city}: {remote}"


def _chat(target: Any, **options: Any) -> ChatOpenAI:
    common: dict[str, Any] = {"temperature": 0, "timeout": 300, "max_retries": 0, "max_tokens": NUM_TOKENS}
    return ChatOpenAI(base_url=target.url, api_key="none", model=target.model, **(common | options))


def check_chat(target: Any) -> None:
    """A message and what it cost."""
    message = _chat(target).invoke([("system", "Be brief."), ("human", QUESTION)])
    assert str(message.content).strip()
    assert message.usage_metadata["output_tokens"] == NUM_TOKENS
    assert message.response_metadata["finish_reason"] == "length"


def check_a_stream_comes_token_by_token(target: Any) -> None:
    """As many pieces as tokens, the same text as at once, usage at the end."""
    chat = _chat(target, stream_usage=True)
    chunks = list(chat.stream(QUESTION))
    pieces = [str(chunk.content) for chunk in chunks if chunk.content]
    assert len(pieces) == NUM_TOKENS, pieces
    assert "".join(pieces) == chat.invoke(QUESTION).content
    assert sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks) == NUM_TOKENS


async def check_a_batch_at_once(target: Any) -> None:
    """Four questions at once answer as one by one."""
    found = await _chat(target).abatch([QUESTION] * 4)
    assert len({str(message.content) for message in found}) == 1


def check_forced_tool_choice(target: Any) -> None:
    """By name, and `any`; arguments are parsed by LangChain itself."""
    for choice in ("search_jobs", "any"):
        chat = _chat(target, max_tokens=150)
        bound = chat.bind_tools([search_jobs], tool_choice=choice, parallel_tool_calls=False)
        message = bound.invoke("Jobs in Oslo?")
        (call,) = message.tool_calls
        assert call["name"] == "search_jobs" and isinstance(call["args"]["remote"], bool), call
        assert not message.invalid_tool_calls


def check_streamed_call(target: Any) -> None:
    """The chunks of a call add up to one that parses."""
    chat = _chat(target, max_tokens=150).bind_tools([search_jobs], tool_choice="search_jobs")
    gathered = None
    for chunk in chat.stream("Jobs in Oslo?"):
        gathered = chunk if gathered is None else gathered + chunk
    (call,) = gathered.tool_calls
    assert set(call["args"]) == {"city", "remote"}


def check_structured_output(target: Any) -> None:
    """Both ways that bind an answer to a class, and some JSON object, which a small model may not bring to an end."""
    chat = _chat(target, max_tokens=100)
    for method in ("json_schema", "function_calling"):
        verdict = chat.with_structured_output(Verdict, method=method).invoke("Eight years of Python: judge.")
        assert isinstance(verdict, Verdict), method
    bound = chat.bind(response_format={"type": "json_object"})
    try:
        assert isinstance(json.loads(str(bound.invoke("Judge eight years of Python in JSON.").content)), dict)
    except openai.LengthFinishReasonError as error:
        assert str(error.completion.choices[0].message.content).startswith("{")


def check_responses_api(target: Any) -> None:
    """The same question through /v1/responses, whole and streamed."""
    chat = _chat(target, use_responses_api=True)
    whole = chat.invoke(QUESTION).text
    assert str(whole).strip()
    assert "".join(str(chunk.text) for chunk in chat.stream(QUESTION)) == str(whole)


def check_completions(target: Any) -> None:
    """The older endpoint."""
    llm = OpenAI(base_url=target.url, api_key="none", model=target.model, max_tokens=8, temperature=0, max_retries=0)
    assert llm.invoke("The sea is").strip()
    assert len(list(llm.stream("The sea is"))) >= 8


async def check_a_stream_that_is_left_is_aborted(target: Any) -> int:
    """Closes the stream after three pieces of thousands."""
    stream = _chat(target, max_tokens=4000, extra_body={"ignore_eos": True}).astream(QUESTION)
    seen = 0
    async for _ in stream:
        seen += 1
        if seen == 3:
            break
    await stream.aclose()
    return 1
