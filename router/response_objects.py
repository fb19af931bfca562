"""What /v1/responses answers, in OpenAI's shapes."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from router.response_request import ResponsesRequest

# JSON that was made before; the document has its shape from chat's.
_TOKEN_LOGPROBS: Final = {"items": {"$ref": "#/components/schemas/TokenLogprob"}}
AnyTokenLogprobs = Annotated[list[Any], Meta(extra_json_schema=_TOKEN_LOGPROBS)]


class OutputText(msgspec.Struct, frozen=True, kw_only=True):
    """The one part of a message."""

    text: str
    type: str = "output_text"
    annotations: list[Any] = []
    logprobs: AnyTokenLogprobs = []


class OutputMessage(msgspec.Struct, frozen=True, kw_only=True):
    """An item that says something."""

    id: str
    status: str
    content: list[OutputText]
    type: str = "message"
    role: str = "assistant"


class OutputCall(msgspec.Struct, frozen=True, kw_only=True):
    """An item that calls a function; `arguments` is an object written as JSON."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: str
    type: str = "function_call"


OutputItem = OutputMessage | OutputCall


class InputTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Input tokens whose KV was there already."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """No tokens are spent on reasoning that is not shown."""

    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of tokens."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseFailure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a response could not be completed."""

    code: str
    message: str


class IncompleteDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Why a response ended early."""

    reason: str


class ResponseObject(msgspec.Struct, frozen=True, kw_only=True):
    """A response: what was asked, and what became of it so far."""

    id: str
    created_at: int
    status: str
    model: str
    output: list[Any]
    completed_at: int | None = None
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    metadata: dict[str, str] = {}
    object: str = "response"
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    background: bool = False
    service_tier: str = "default"
    store: bool = False
    temperature: float = 1.0
    text: dict[str, Any] = {}
    tool_choice: Any = "auto"
    tools: list[Any] = []
    top_logprobs: int = 0
    top_p: float = 1.0
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None


def asked_in(request: ResponsesRequest) -> dict[str, Any]:
    """Return the fields of a response that repeat what was asked."""
    form = request.text.format if request.text is not None else None
    return {
        "model": request.model,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {"format": {"type": "text"} if form is None else _without_none(form)},
        "tool_choice": request.tool_choice or "auto",
        "tools": [{"parameters": None, "strict": None, **_without_none(tool)} for tool in request.tools or ()],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "user": request.user,
    }


def usage_of(num_input_tokens: int, num_output_tokens: int, num_cached_tokens: int) -> ResponseUsage:
    """Return the usage of these counts."""
    return ResponseUsage(
        input_tokens=num_input_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=num_cached_tokens),
        output_tokens=num_output_tokens,
        output_tokens_details=OutputTokensDetails(),
        total_tokens=num_input_tokens + num_output_tokens,
    )


def _without_none(value: msgspec.Struct) -> dict[str, Any]:
    return {name: item for name, item in msgspec.structs.asdict(value).items() if item is not None}
