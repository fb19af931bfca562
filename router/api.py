"""What clients may send: every field typed and bounded, before any text is tokenised.

1. `parse` looks at the names of all fields: known but unsupported ones are refused, unknown ones logged and ignored,
   and a name that stands twice in one object is refused.
2. It decodes the body into a struct; the first field out of its type or bounds is named in a 400.
3. What depends on the model (vocabulary, context) is checked by `router/intake.py`.
"""

from __future__ import annotations

import codecs
import logging
import re
from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta

from protocol.errors import InvalidRequest
from protocol.request import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_TOKEN_IDS, TokenId
from router import exact_json
from router.json_bounds import check_size, check_unique
from router.structured import Choices, Pattern, ResponseFormat, Schema, StructuredOutputs, Whitespace
from router.tools import MAX_TOOLS, ToolCallMessage, ToolChoice, ToolDefinition

log = logging.getLogger(__name__)

MAX_CHOICES: Final = 128
MAX_PROMPTS: Final = 128
MAX_STOPS: Final = 16
MAX_STOP_CHARS: Final = 256
MAX_MESSAGES: Final = 4096

Short = Annotated[str, Meta(max_length=256)]
Stop = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
Tokens = Annotated[int, Meta(ge=1, lt=1 << 31)]
Scalar = str | int | float | bool | None


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`include_usage` asks for a last chunk with usage, `continuous_usage_stats` for usage in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationFields(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that chat and completions share. None is the default that vLLM documents, of `model` the served one."""

    model: Annotated[str, Meta(max_length=1024)] | None = None
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=100.0)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Meta(ge=-100.0, le=100.0)]], Meta(max_length=MAX_LOGIT_BIAS)] | None
    ) = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Meta(ge=0, lt=1 << 31)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Meta(max_length=1024)] | None = None
    request_id: Short | None = None
    cache_salt: Short | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, lt=1 << 31)] | None = None
    priority: Annotated[int, Meta(ge=-(1 << 31), lt=1 << 31)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Pattern | None = None
    guided_choice: Choices | None = None
    guided_grammar: Pattern | None = None
    guided_whitespace_pattern: Whitespace | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class TextPart(msgspec.Struct, frozen=True, kw_only=True):
    """One part of a message's content; only text is understood."""

    type: Annotated[str, Meta(max_length=64)]
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a conversation."""

    role: Annotated[str, Meta(max_length=64)]
    content: str | Annotated[list[TextPart], Meta(max_length=MAX_MESSAGES)] | None = None
    name: Short | None = None
    tool_call_id: Short | None = None
    tool_calls: Annotated[list[ToolCallMessage], Meta(max_length=MAX_TOOLS)] | None = None
    function_call: dict[str, Any] | None = None


class ChatRequest(GenerationFields, frozen=True, kw_only=True):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Annotated[list[ToolDefinition], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: Annotated[dict[Short, Scalar], Meta(max_length=32)] | None = None


Prompt = str | list[str | TokenId | list[TokenId]]


class CompletionRequest(GenerationFields, frozen=True, kw_only=True):
    """Body of /v1/completions. `max_tokens` 0 asks for the prompt alone."""

    prompt: Prompt
    max_tokens: Annotated[int, Meta(ge=0, lt=1 << 31)] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of /tokenize: a prompt, or messages that the chat template turns into one."""

    model: Annotated[str, Meta(max_length=1024)] | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of /detokenize."""

    model: Annotated[str, Meta(max_length=1024)] | None = None
    tokens: Annotated[list[TokenId], Meta(max_length=1 << 20)]


Request = TypeVar("Request", bound=msgspec.Struct)

# Fields that change the answer and are not supported, with the values that ask for nothing.
_UNSUPPORTED: Final[dict[str, tuple[Any, ...]]] = {
    name: (None, False, [], {})
    for name in (
        *("functions", "function_call", "audio", "prediction", "web_search_options", "documents"),
        *("structural_tag", "guided_decoding_backend", "chat_template"),
        *("kv_transfer_params", "bad_words", "allowed_token_ids"),
        *("logits_processors", "use_beam_search", "return_tokens_as_token_ids", "mm_processor_kwargs"),
        *("prompt_embeds", "prompt_token_ids", "return_prompt_text"),
    )
} | {
    "modalities": (None, [], ["text"]),
    "suffix": (None, ""),
    "length_penalty": (None, 1, 1.0),
}
# Fields that change nothing here: accepted without a word.
_WITHOUT_EFFECT: Final = frozenset(
    {"store", "metadata", "service_tier", "session_id", "safety_identifier", "prompt_cache_key"}
    | {"prompt_cache_options"}
)
_PATH: Final = re.compile(r" - at `\$\.([A-Za-z_]\w*)([^`]*)`$")
_MISSING: Final = re.compile(r"missing required field `(\w+)`$")


def parse(body: bytes, kind: type[Request]) -> Request:
    """Decode and validate the body of a request; a byte order mark before it is passed over.

    Raises:
        InvalidRequest: it is no JSON object of this kind; names the offending field where there is one.
    """
    body = body.removeprefix(codecs.BOM_UTF8)
    check_size(body)
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        _check_names(fields, kind)
        found: Request = exact_json.decoder(kind).decode(body)
        # Text that is ignored has not been decoded.
        body.decode("utf-8", "surrogatepass")
        check_unique(body)
        return found
    except msgspec.ValidationError as error:
        raise _named(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    except ValueError as error:
        raise InvalidRequest("the body has a number with too many digits") from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error


def _check_names(fields: dict[str, msgspec.Raw], kind: type[Any]) -> None:
    known = kind.__struct_fields__
    unknown = []
    for name, raw in fields.items():
        if name in known or name in _WITHOUT_EFFECT:
            continue
        if name == "echo" and kind is ChatRequest or name in _UNSUPPORTED:
            _require_default(name, raw)
        elif name == "best_of":
            _check_best_of(raw, fields.get("n"))
        else:
            unknown.append(name)
    if unknown:
        log.info("ignored unknown fields: %s", ", ".join(ascii(name[:64]) for name in unknown[:16]))


def _require_default(name: str, raw: msgspec.Raw) -> None:
    value = msgspec.json.decode(raw)
    accepted = _UNSUPPORTED.get(name, (None, False))
    # By type too: False equals 0, and 1 equals True.
    if not any(type(value) is type(a) and value == a for a in accepted):
        raise InvalidRequest(f"{name} is not supported by this server", name)


def _check_best_of(raw: msgspec.Raw, n_raw: msgspec.Raw | None) -> None:
    best_of = msgspec.json.decode(raw)
    n = 1 if n_raw is None else msgspec.json.decode(n_raw)
    if best_of is not None and best_of != (n or 1):
        raise InvalidRequest("best_of is not supported unless it equals n", "best_of")


def _named(message: str) -> InvalidRequest:
    """Turn a validation message into one that starts with the name of the field."""
    if found := _PATH.search(message):
        return InvalidRequest(f"{found[1]}{found[2]}: {message[: found.start()]}", found[1])
    if found := _MISSING.search(message):
        return InvalidRequest(f"{found[1]}: this field is required", found[1])
    return InvalidRequest(message)
