"""Instructor against a running server: each of its modes, partial objects and iterables, retries not needed."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import instructor
import openai
from instructor.core.exceptions import IncompleteOutputException, InstructorRetryException
from pydantic import BaseModel, Field

MESSAGES: list[Any] = [{"role": "user", "content": "Judge: eight years of Python, led a team of five in Paris."}]


class Verdict(BaseModel):
    """What a judge of a candidate answers."""

    fits: bool
    level: Literal["junior", "senior"]
    city: str = Field(max_length=20)


def _sdk(target: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=target.url, api_key="none", timeout=300, max_retries=0)


def _asked(target: Any) -> dict[str, Any]:
    return {"model": target.model, "messages": MESSAGES, "max_tokens": 120, "temperature": 0}


def _judged(target: Any, mode: instructor.Mode) -> None:
    client = instructor.from_openai(_sdk(target), mode=mode)
    verdict = client.chat.completions.create(response_model=Verdict, max_retries=0, **_asked(target))
    assert verdict.level in ("junior", "senior")


def check_tools(target: Any) -> None:
    """A forced call."""
    _judged(target, instructor.Mode.TOOLS)


def check_tools_strict(target: Any) -> None:
    """A forced call with `strict`."""
    _judged(target, instructor.Mode.TOOLS_STRICT)


def check_json_schema(target: Any) -> None:
    """`response_format: json_schema`."""
    _judged(target, instructor.Mode.JSON_SCHEMA)


def check_json_object(target: Any) -> None:
    """`response_format: json_object` with the schema in the prompt: JSON, though a small model may miss the schema."""
    client = instructor.from_openai(_sdk(target), mode=instructor.Mode.JSON)
    found: list[Any] = []
    client.on("completion:response", found.append)
    try:
        client.chat.completions.create(response_model=Verdict, max_retries=0, **_asked(target))
    except (InstructorRetryException, IncompleteOutputException):
        pass
    (choice,) = found[0].choices
    assert choice.message.content.startswith("{"), choice
    assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


def check_partial_objects_grow(target: Any) -> None:
    """Every partial object is a prefix of the last."""
    client = instructor.from_openai(_sdk(target), mode=instructor.Mode.JSON_SCHEMA)
    found = list(client.chat.completions.create_partial(response_model=Verdict, max_retries=0, **_asked(target)))
    assert len(found) > 3
    assert found[0].city is None and found[-1].city is not None
    Verdict.model_validate(found[-1].model_dump())


async def check_async_client(target: Any) -> None:
    """The asynchronous client, three at once."""
    sdk = openai.AsyncOpenAI(base_url=target.url, api_key="none", timeout=300, max_retries=0)
    client = instructor.from_openai(sdk, mode=instructor.Mode.TOOLS)
    verdicts = await asyncio.gather(
        *(client.chat.completions.create(response_model=Verdict, max_retries=0, **_asked(target)) for _ in range(3))
    )
    assert len({verdict.model_dump_json() for verdict in verdicts}) == 1, verdicts


async def check_a_stream_that_is_left_is_aborted(target: Any) -> int:
    """Leaves partial objects at the third; the answer that they grow to is thousands of tokens."""

    class Verdicts(BaseModel):
        verdicts: list[Verdict] = Field(min_length=200)

    asked = _asked(target) | {"max_tokens": 4000}
    async with openai.AsyncOpenAI(base_url=target.url, api_key="none", timeout=300, max_retries=0) as sdk:
        client = instructor.from_openai(sdk, mode=instructor.Mode.JSON_SCHEMA)
        seen = 0
        async for _ in client.chat.completions.create_partial(response_model=Verdicts, max_retries=0, **asked):
            seen += 1
            if seen == 3:
                break
    return 1
