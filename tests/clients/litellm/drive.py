"""LiteLLM against a running server: `openai/` and `hosted_vllm/`, streams, forced calls, schemas, errors, aborts."""

from __future__ import annotations

import json
from typing import Any, Literal

import litellm
from pydantic import BaseModel, Field

MESSAGES = [{"role": "user", "content": "Write one sentence about the sea."}]
NUM_TOKENS = 16
TOOL = {
    "type": "function",
    "function": {
        "name": "search_jobs",
        "description": "Search jobs by city and title",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "level": {"type": "string", "enum": ["junior", "senior"]},
            },
            "required": ["city", "level"],
            "additionalProperties": False,
        },
    },
}


class Verdict(BaseModel):
    """What a judge of a candidate answers."""

    fits: bool
    level: Literal["junior", "senior"]
    years: int = Field(ge=0, le=60)


def _asked(target: Any, provider: str = "openai", **options: Any) -> dict[str, Any]:
    common = {"api_base": target.url, "api_key": "none", "temperature": 0, "timeout": 300, "num_retries": 0}
    return {"model": f"{provider}/{target.model}", "messages": MESSAGES, **common, **options}


def check_both_providers_say_the_same(target: Any) -> None:
    """One model behind two of LiteLLM's providers."""
    answers = [litellm.completion(**_asked(target, p, max_tokens=NUM_TOKENS)) for p in ("openai", "hosted_vllm")]
    texts = [answer.choices[0].message.content for answer in answers]
    assert texts[0] == texts[1] and texts[0].strip(), texts
    assert all(answer.usage.completion_tokens == NUM_TOKENS for answer in answers)
    assert answers[0].choices[0].finish_reason == "length"


def check_a_stream_comes_token_by_token(target: Any) -> None:
    """As many pieces as tokens, the same text as at once, usage at the end."""
    whole = litellm.completion(**_asked(target, max_tokens=NUM_TOKENS))
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(litellm.completion(**_asked(target, max_tokens=NUM_TOKENS, **options)))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) == NUM_TOKENS, pieces
    assert litellm.stream_chunk_builder(chunks, messages=MESSAGES).usage.completion_tokens == NUM_TOKENS


def check_a_forced_call_has_arguments_that_parse(target: Any) -> None:
    """The call is the one that was forced, whole and streamed."""
    choice = {"type": "function", "function": {"name": "search_jobs"}}
    asked = _asked(target, tools=[TOOL], tool_choice=choice, max_tokens=100)
    (call,) = litellm.completion(**asked).choices[0].message.tool_calls
    chunks = list(litellm.completion(**asked, stream=True))
    (streamed,) = litellm.stream_chunk_builder(chunks, messages=MESSAGES).choices[0].message.tool_calls
    for found in (call, streamed):
        assert found.function.name == "search_jobs"
        assert json.loads(found.function.arguments)["level"] in ("junior", "senior")
    assert call.function.arguments == streamed.function.arguments


def check_an_answer_obeys_its_schema(target: Any) -> None:
    """A pydantic class as response_format."""
    answer = litellm.completion(**_asked(target, response_format=Verdict, max_tokens=100))
    Verdict.model_validate_json(answer.choices[0].message.content)


def check_text_completion(target: Any) -> None:
    """The older endpoint, through `text-completion-openai/`."""
    asked = _asked(target, "text-completion-openai", max_tokens=NUM_TOKENS, prompt="The sea is")
    del asked["messages"]
    assert litellm.text_completion(**asked).choices[0].text.strip()


def check_errors_are_its_own(target: Any) -> None:
    """A name that is not served, and a prompt that is too long."""
    try:
        litellm.completion(**_asked(target) | {"model": "openai/nobody"})
    except litellm.NotFoundError:
        pass
    else:
        raise AssertionError("an unknown model was served")
    long = [{"role": "user", "content": "word " * 9000}]
    try:
        litellm.completion(**_asked(target) | {"messages": long})
    except litellm.ContextWindowExceededError:
        pass
    else:
        raise AssertionError("a prompt over the context was served")


async def check_a_stream_that_is_left_is_aborted(target: Any) -> int:
    """Closes the stream after three pieces of thousands."""
    stream = await litellm.acompletion(**_asked(target, stream=True, max_tokens=4000, extra_body={"ignore_eos": True}))
    seen = 0
    async for _ in stream:
        seen += 1
        if seen == 3:
            break
    await stream.aclose()
    return 1
