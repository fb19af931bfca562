"""What the server answers, in OpenAI's shapes. Fields that are not set are left out."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import UNSET, Meta, UnsetType

from protocol.errors import AnswerImpossible, Overloaded, RequestFailed, RequestRejected
from router import exact_json
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
    """Log probabilities as completions report them: parallel lists. Those of a prompt's first token are null."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


Logprobs = ChatLogprobs | CompletionLogprobs
# A union of structs can be written, but not described: the OpenAPI document has it from here.
_EITHER: Final = [{"$ref": f"#/components/schemas/{name}"} for name in ("ChatLogprobs", "CompletionLogprobs")]
AnyLogprobs = Annotated[Any, Meta(extra_json_schema={"anyOf": [*_EITHER, {"type": "null"}]})]


_MAPS: Final = {"anyOf": [{"type": "array", "items": {"anyOf": [{"type": "object"}, {"type": "null"}]}}]}
# JSON that was made before, step by step.
PromptLogprobs = Annotated[Any, Meta(extra_json_schema=_MAPS)]


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
    logprobs: AnyLogprobs = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer, or one chunk of a stream."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None | UnsetType = UNSET
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of /v1/models."""

    id: str
    created: int
    root: str
    max_model_len: int | None
    object: str = "model"
    owned_by: str = "baton"
    parent: str | None = None
    permission: list[str] = []


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """All names that are served."""

    data: list[ModelCard]
    object: str = "list"


class TokenizeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Token ids of a text, and each as text if it was asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Text of token ids."""

    prompt: str


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """Whether requests are taken, and what is missing for it."""

    status: str
    missing: list[str]


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """That the process lives, whether it takes requests or not."""

    status: str


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Unfinished choices: all of them, with workers, and waiting for some."""

    server_load: int
    running: int
    waiting: int


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """Of the server."""

    version: str


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """What was wrong; `param` names the field, `code` repeats the status."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """Every answer that is no success."""

    error: ErrorDetail


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
    names_field = isinstance(error, AnswerImpossible | RequestRejected) and not isinstance(error, Overloaded)
    param = getattr(error, "param", None) if names_field else None
    return error_body(str(error), error.error_type, error.status, param)


def encode_json(value: Any) -> bytes:
    """Return `value` as JSON."""
    return exact_json.encode(value)
