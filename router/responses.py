"""What the server answers, in OpenAI's shapes. Fields that are not set are left out."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from protocol.errors import Overloaded, RequestFailed, RequestRejected
from router.call_shapes import AnsweredCall, ToolCallDelta


class TokenDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Prompt tokens whose KV was there already."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of tokens; several choices are added up."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: TokenDetails


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """One alternative to a token."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob, frozen=True, kw_only=True):
    """One token of a chat answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log probabilities as chat reports them."""

    content: list[TokenLogprob]


class CompletionLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log probabilities as completions report them: parallel lists."""

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


Logprobs = ChatLogprobs | CompletionLogprobs


class Delta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a chunk adds to a message."""

    role: str | UnsetType = UNSET
    content: str | None | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class AnswerMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A whole message."""

    content: str | None
    role: str = "assistant"
    refusal: str | None = None
    tool_calls: list[AnsweredCall] | UnsetType = UNSET


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One choice of an answer or a chunk; exactly one of delta, message and text is set."""

    index: int
    delta: Delta | UnsetType = UNSET
    message: AnswerMessage | UnsetType = UNSET
    text: str | UnsetType = UNSET
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer, or one chunk of a stream."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None | UnsetType = UNSET
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of /v1/models."""

    id: str
    created: int
    root: str
    max_model_len: int | None
    object: str = "model"
    owned_by: str = "baton"


def usage_of(num_prompt_tokens: int, num_output_tokens: int, num_cached_tokens: int) -> Usage:
    """Return the usage object of these counts."""
    return Usage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=num_output_tokens,
        total_tokens=num_prompt_tokens + num_output_tokens,
        prompt_tokens_details=TokenDetails(cached_tokens=num_cached_tokens),
    )


def error_body(message: str, error_type: str, code: int, param: str | None = None) -> dict[str, Any]:
    """Return OpenAI's error object."""
    return {"error": {"message": message, "type": error_type, "param": param, "code": code}}


def body_of_error(error: RequestRejected | RequestFailed) -> dict[str, Any]:
    """Return the error object of one of our own errors."""
    param = error.param if isinstance(error, RequestRejected) and not isinstance(error, Overloaded) else None
    return error_body(str(error), error.error_type, error.status, param)


def encode_json(value: Any) -> bytes:
    """Return `value` as JSON."""
    return msgspec.json.encode(value)
