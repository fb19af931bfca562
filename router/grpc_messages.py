"""Between gRPC's messages and the API's: a request becomes the body it would be over HTTP, pieces become messages.

1. `body_of` gives the fields that a client set under their HTTP names; `router/api.py` checks them as it does a body.
2. `MessageShape` turns the pieces of a session into messages; text and logprobs are those that HTTP would show.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from protocol.errors import InvalidRequest
from protocol.request import TokenLogprobs
from router import exact_json
from router.api import ChatRequest, CompletionRequest
from router.call_shapes import ends_in_calls, new_call_id, parser_for
from router.intake import Job, PromptTokens
from router.logprob_shapes import finite
from router.prompt_logprobs import ReadPrompts
from router.rpc import baton_v1_pb2 as pb
from router.text import Piece
from router.tokenizer import Tokenizer
from router.tool_calls import Call, CallParser, Content, Part

Kind = type[ChatRequest] | type[CompletionRequest]

_INPUTS: Final = ("prompt", "prompt_token_ids", "prompts", "messages")


def body_of(request: pb.GenerateRequest, default_model: str) -> tuple[dict[str, Any], Kind]:
    """Return the body that says over HTTP what a request says, and of which kind it is.

    Raises:
        InvalidRequest: its inputs are none or several, or a field does not go with them, or holds JSON that is none.
    """
    given = {descriptor.name: value for descriptor, value in request.ListFields()}
    inputs = [name for name in _INPUTS if name in given]
    if len(inputs) != 1:
        field = inputs[1] if inputs else "prompt"
        raise InvalidRequest(f"{field}: give exactly one of {', '.join(_INPUTS)}", field)
    is_chat = inputs == ["messages"]
    body: dict[str, Any] = {"model": default_model}
    for name, value in given.items():
        if name in _CHAT_ONLY and not is_chat:
            raise InvalidRequest(f"{name}: only together with messages", name)
        if name == "logprobs" and is_chat:
            body |= {"logprobs": True, "top_logprobs": value}
        elif name not in _INPUTS:
            body[name] = _SPECIAL[name](value) if name in _SPECIAL else value
    if is_chat:
        return body | {"messages": [_message(message) for message in request.messages]}, ChatRequest
    return body | {"prompt": _prompt(request, inputs[0])}, CompletionRequest


def _prompt(request: pb.GenerateRequest, name: str) -> Any:
    if name == "prompt":
        return request.prompt
    if name == "prompt_token_ids":
        return list(request.prompt_token_ids)
    contents = [(prompt.WhichOneof("content"), prompt) for prompt in request.prompts]
    return [prompt.text if which == "text" else list(prompt.token_ids.ids) for which, prompt in contents]


def _message(message: pb.ChatMessage) -> dict[str, Any]:
    if message.HasField("content") and message.parts:
        raise InvalidRequest("messages: give either content or parts", "messages")
    plain: dict[str, Any] = {"role": message.role}
    if message.HasField("content"):
        plain["content"] = message.content
    elif message.parts:
        plain["content"] = [{"type": part.type, "text": part.text} for part in message.parts]
    if message.tool_calls:
        calls = [(call.id, {"name": call.name, "arguments": call.arguments}) for call in message.tool_calls]
        plain["tool_calls"] = [{"id": call_id, "type": "function", "function": called} for call_id, called in calls]
    return plain | _set_in(message, "name", "tool_call_id")


def _set_in(message: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def _scalars(values: Mapping[str, pb.Scalar]) -> dict[str, Any]:
    found = {}
    for key, scalar in values.items():
        which = scalar.WhichOneof("value")
        if which is None:
            raise InvalidRequest(f"chat_template_kwargs: {key[:64]!r} has no value", "chat_template_kwargs")
        found[key] = getattr(scalar, which)
    return found


def _tools(tools: Sequence[pb.Tool]) -> list[dict[str, Any]]:
    found = []
    for tool in tools:
        function = {"name": tool.name, **_set_in(tool, "description", "strict")}
        if tool.HasField("parameters"):
            function["parameters"] = _json(tool.parameters, "tools")
        found.append({"type": "function", "function": function})
    return found


def _tool_choice(choice: pb.ToolChoice) -> Any:
    if choice.WhichOneof("choice") == "function":
        return {"type": "function", "function": {"name": choice.function}}
    return choice.mode


def _response_format(asked: pb.ResponseFormat) -> dict[str, Any]:
    found: dict[str, Any] = {"type": asked.type}
    if asked.HasField("json_schema"):
        schema = asked.json_schema
        found["json_schema"] = {
            "name": schema.name,
            "schema": _json(schema.schema, "response_format"),
            **_set_in(schema, "description", "strict"),
        }
    return found


def _structured_outputs(asked: pb.StructuredOutputs) -> dict[str, Any]:
    found = _set_in(asked, "whitespace_pattern", "disable_any_whitespace", "disable_additional_properties")
    kind = asked.WhichOneof("kind")
    if kind == "json":
        found["json"] = _json(asked.json, "structured_outputs")
    elif kind == "choice":
        found["choice"] = list(asked.choice.values)
    elif kind is not None:
        found[kind] = getattr(asked, kind)
    return found


def _json(text: str, field: str) -> Any:
    try:
        return exact_json.decoder(Any).decode(text)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidRequest(f"{field}: not valid JSON: {error}", field) from error


_CHAT_ONLY: Final = frozenset(
    {"add_generation_prompt", "chat_template_kwargs", "continue_final_message"}
    | {"tools", "tool_choice", "parallel_tool_calls"}
)
_SPECIAL: Final[Mapping[str, Callable[[Any], Any]]] = {
    "logit_bias": lambda bias: {str(token_id): value for token_id, value in bias.items()},
    "chat_template_kwargs": _scalars,
    "stop": list,
    "stop_token_ids": list,
    "tools": _tools,
    "tool_choice": _tool_choice,
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
}


@dataclass(slots=True)
class _Progress:
    """What a choice has shown so far, and what waits for text to go with."""

    pending: Piece = field(default_factory=Piece)
    has_begun: bool = False
    num_tokens: int = 0
    parser: CallParser | None = None
    parts: list[Part] = field(default_factory=list)

    @property
    def is_worth_telling(self) -> bool:
        """Whether there is text, a call, or an end."""
        return bool(self.pending.text or self.parts) or self.pending.finish_reason is not None

    def take(self) -> tuple[Piece, list[Part], bool]:
        """Return what waits, and whether it is the first of its choice; nothing waits then."""
        found = self.pending, self.parts, not self.has_begun
        self.pending, self.parts, self.has_begun = Piece(), [], True
        return found


class MessageShape:
    """Shapes everything that is said about one request."""

    def __init__(self, job: Job, tokenizer: Tokenizer, request_id: str, read: ReadPrompts | None = None) -> None:
        self._job = job
        self._read = read
        self._tokenizer = tokenizer
        self._id = ("chatcmpl-" if job.is_chat else "cmpl-") + request_id
        self._created = int(time.time())
        self._progress = [_Progress(parser=None if job.tools is None else parser_for(job.tools)) for _ in job.choices]

    def chunk(self, events: Iterable[tuple[int, Piece]]) -> pb.GenerateResponse | None:
        """Return the message for some pieces; None while there is nothing to show for them."""
        found: set[int] = set()
        for index, piece in events:
            progress = self._progress[index]
            progress.num_tokens += len(piece.token_ids)
            if progress.parser is not None:
                progress.parts += progress.parser.feed(piece.text)
                if piece.finish_reason is not None:
                    progress.parts += progress.parser.flush()
                piece.text = ""
            progress.pending.add(piece)
            found.add(index)
        shown = [self._choice(index) for index in sorted(found) if self._progress[index].is_worth_telling]
        if not shown:
            return None
        return pb.GenerateResponse(id=self._id, created=self._created, model=self._job.model, choices=shown)

    def num_prompt_values(self, indices: Iterable[int]) -> int:
        """Return how many values the next message has to tell of the prompts of these choices."""
        if self._read is None:
            return 0
        new = [self._job.choices[index].prompt for index in indices if not self._progress[index].has_begun]
        return sum(len(prompt.token_ids) * (1 + (self._job.num_prompt_top or 0)) for prompt in new)

    def closing(self, num_cached_tokens: int) -> pb.GenerateResponse:
        """Return the last message."""
        num_prompt = sum(len(prompt.token_ids) for prompt in self._job.prompts)
        num_output = sum(progress.num_tokens for progress in self._progress)
        usage = pb.Usage(
            prompt_tokens=num_prompt,
            completion_tokens=num_output,
            total_tokens=num_prompt + num_output,
            cached_tokens=num_cached_tokens,
        )
        return pb.GenerateResponse(id=self._id, created=self._created, model=self._job.model, usage=usage)

    def _choice(self, index: int) -> pb.Choice:
        """Tell what of a choice is pending."""
        progress, asked = self._progress[index], self._job.choices[index]
        piece, parts, is_first = progress.take()
        choice = pb.Choice(index=index, text=(asked.prompt.echo if is_first else "") + piece.text)
        for part in parts:
            if isinstance(part, Content):
                choice.text += part.text
            elif isinstance(part, Call):
                choice.tool_calls.add(index=part.index, id=new_call_id(), name=part.name)
            elif choice.tool_calls and choice.tool_calls[-1].index == part.index:
                choice.tool_calls[-1].arguments += part.text
            else:
                choice.tool_calls.add(index=part.index, arguments=part.text)
        if self._job.returns_token_ids:
            choice.token_ids.extend(piece.token_ids)
            if is_first:
                choice.prompt_token_ids.extend(asked.prompt.token_ids)
        if is_first and self._read is not None:
            choice.prompt_logprobs.extend(self._prompt_logged(asked.prompt, self._read))
        if (num_top := asked.sampling.num_logprobs) is not None:
            choice.logprobs.extend(self._logged(one.token_id, one.logprobs, num_top) for one in piece.logged)
        if piece.finish_reason is not None:
            is_call = progress.parser is not None and ends_in_calls(progress.parser, piece)
            choice.finish_reason = "tool_calls" if is_call else str(piece.finish_reason)
        if isinstance(piece.stop_reason, str):
            choice.stop_string = piece.stop_reason
        elif piece.stop_reason is not None:
            choice.stop_token_id = piece.stop_reason
        return choice

    def _prompt_logged(self, prompt: PromptTokens, read: ReadPrompts) -> Iterator[pb.TokenLogprob]:
        job = self._job
        num_top = job.num_prompt_top if job.num_shown_top is None else job.num_shown_top
        first = self._named(prompt.token_ids[0], 0.0)
        del first["logprob"]
        yield pb.TokenLogprob(**first)
        for token_id, row in zip(prompt.token_ids[1:], read.of(prompt), strict=True):
            yield self._logged(token_id, row, num_top or 0)

    def _logged(self, token_id: int, told: TokenLogprobs, num_top: int) -> pb.TokenLogprob:
        top = [pb.TopLogprob(**self._named(other_id, value)) for other_id, value in told.top[:num_top]]
        return pb.TokenLogprob(**self._named(token_id, told.logprob), top_logprobs=top)

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token_id)
        text = data.decode("utf-8", "replace")
        return {"token_id": token_id, "token": text, "bytes": data, "logprob": finite(logprob)}
