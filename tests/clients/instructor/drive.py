"""Instructor against a running server: each of its modes, partial objects and iterables, retries not needed."""

from __future__ import annotations

from typing import Any, Literal

import instructor
import openai
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
    """`response_format: json_object` with the schema in the prompt: some JSON object, whether or not the right one."""
    client = instructor.from_openai(_sdk(target), mode=instructor.Mode.JSON)
    answer = client.chat.completions.create(response_model=dict[str, Any] | None, max_retries=0, **_asked(target))
    assert answer is not None


def check_partial_objects_grow(target: Any) -> None:
    """Every partial object is a prefix of the last."""
    client = instructor.from_openai(_sdk(target), mode=instructor.Mode.JSON_SCHEMA)
    found = list(client.chat.completions.create_partial(response_model=Verdict, max_retries=0, **_asked(target)))
    assert len(found) > 3
    assert found[0].city is None and found[-1].city is not None
    Verdict.model_validate(found[-1].model_dump())


async def check_async_client(target: Any) -> None:
    """The asynchronous client, three at once."""
    import asyncio

    sdk = openai.AsyncOpenAI(base_url=target.url, api_key="none", timeout=300, max_retries=0)
    client = instructor.from_openai(sdk, mode=instructor.Mode.TOOLS)
    verdicts = await asyncio.gather(
        *(client.chat.completions.create(response_model=Verdict, max_retries=0, **_asked(target)) for _ in range(3))
    )
    assert verdicts[0] == verdicts[1] == verdicts[2]


def check_a_stream_that_is_left_is_aborted(target: Any) -> int:
    """Leaves an iterable of objects at the first; what it would still have said is thousands of tokens."""
    client = instructor.from_openai(_sdk(target), mode=instructor.Mode.JSON_SCHEMA)

    class Verdicts(BaseModel):
        verdicts: list[Verdict] = Field(min_length=200)

    asked = _asked(target) | {"max_tokens": 4000}
    partial = client.chat.completions.create_partial(response_model=Verdicts, max_retries=0, **asked)
    next(partial)
    partial.close()
    return 1
