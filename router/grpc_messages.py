"""Between gRPC's messages and the API's: a request becomes the body it would be over HTTP, pieces become messages.

1. `body_of` gives the fields that a client set under their HTTP names; `router/api.py` checks them as it does a body.
2. `MessageShape` turns the pieces of a session into messages; text and logprobs are those that HTTP would show.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from protocol.errors import InvalidRequest
from router.api import ChatRequest, CompletionRequest
from router.intake import Job
from router.rpc import baton_v1_pb2 as pb
from router.text import LoggedToken, Piece
from router.tokenizer import Tokenizer

Kind = type[ChatRequest] | type[CompletionRequest]

_INPUTS: Final = ("prompt", "prompt_token_ids", "prompts", "messages")
_LOWEST_LOGPROB: Final = -9999.0


def body_of(request: pb.GenerateRequest, default_model: str) -> tuple[dict[str, Any], Kind]:
    """Return the body that says over HTTP what a request says, and of which kind it is.

    Raises:
        InvalidRequest: its inputs are none or several, or a field does not go with them.
    """
    given = {descriptor.name: value for descriptor, value in request.ListFields()}
    inputs = [name for name in _INPUTS if name in given]
    if len(inputs) != 1:
        raise InvalidRequest(f"{inputs[1] if inputs else 'prompt'}: give exactly one of {', '.join(_INPUTS)}",
                             inputs[1] if inputs else "prompt")  # fmt: skip
    is_chat = inputs == ["messages"]
    body: dict[str, Any] = {"model": default_model}
    for name, value in given.items():
        if name in _INPUTS:
            continue
        if name == "logit_bias":
            body[name] = {str(token_id): bias for token_id, bias in value.items()}
        elif name == "chat_template_kwargs":
            body[name] = {key: _scalar(key, scalar) for key, scalar in value.items()}
        elif name in ("stop", "stop_token_ids"):
            body[name] = list(value)
        elif name == "logprobs" and is_chat:
            body |= {"logprobs": True, "top_logprobs": value}
        else:
            body[name] = value
    for name in ("add_generation_prompt", "chat_template_kwargs", "continue_final_message"):
        if name in body and not is_chat:
            raise InvalidRequest(f"{name}: only together with messages", name)
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
    for name in ("name", "tool_call_id"):
        if message.HasField(name):
            plain[name] = getattr(message, name)
    return plain


def _scalar(key: str, scalar: pb.Scalar) -> str | int | float | bool:
    which = scalar.WhichOneof("value")
    if which is None:
        raise InvalidRequest(f"chat_template_kwargs: {key!r} has no value", "chat_template_kwargs")
    value: str | int | float | bool = getattr(scalar, which)
    return value


@dataclass(slots=True)
class _Progress:
    """What a choice has shown so far, and what waits for text to go with."""

    pending: Piece = field(default_factory=Piece)
    has_begun: bool = False
    num_tokens: int = 0


class MessageShape:
    """Shapes everything that is said about one request."""

    def __init__(self, job: Job, tokenizer: Tokenizer, request_id: str) -> None:
        self._job = job
        self._tokenizer = tokenizer
        self._id = ("chatcmpl-" if job.is_chat else "cmpl-") + request_id
        self._created = int(time.time())
        self._progress = [_Progress() for _ in job.choices]

    def chunk(self, events: Iterable[tuple[int, Piece]]) -> pb.GenerateResponse | None:
        """Return the message for some pieces; None while there is nothing to show for them."""
        found: dict[int, Piece] = {}
        for index, piece in events:
            progress = self._progress[index]
            progress.num_tokens += len(piece.token_ids)
            progress.pending.add(piece)
            found[index] = progress.pending
        shown = [
            self._choice(index, piece)
            for index, piece in found.items()
            if piece.text or piece.finish_reason is not None
        ]
        if not shown:
            return None
        return pb.GenerateResponse(id=self._id, created=self._created, model=self._job.model, choices=shown)

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

    def _choice(self, index: int, piece: Piece) -> pb.Choice:
        progress, asked = self._progress[index], self._job.choices[index]
        is_first, progress.has_begun, progress.pending = not progress.has_begun, True, Piece()
        choice = pb.Choice(index=index, text=(asked.prompt.echo if is_first else "") + piece.text)
        if self._job.returns_token_ids:
            choice.token_ids.extend(piece.token_ids)
            if is_first:
                choice.prompt_token_ids.extend(asked.prompt.token_ids)
        if (num_top := asked.sampling.num_logprobs) is not None:
            choice.logprobs.extend(self._logged(logged, num_top) for logged in piece.logged)
        if piece.finish_reason is not None:
            choice.finish_reason = str(piece.finish_reason)
        if isinstance(piece.stop_reason, str):
            choice.stop_string = piece.stop_reason
        elif piece.stop_reason is not None:
            choice.stop_token_id = piece.stop_reason
        return choice

    def _logged(self, logged: LoggedToken, num_top: int) -> pb.TokenLogprob:
        told = logged.logprobs
        top = [pb.TopLogprob(**self._named(token_id, value)) for token_id, value in told.top[:num_top]]
        return pb.TokenLogprob(**self._named(logged.token_id, told.logprob), top_logprobs=top)

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token_id)
        value = logprob if logprob > _LOWEST_LOGPROB else _LOWEST_LOGPROB
        return {"token_id": token_id, "token": data.decode("utf-8", "replace"), "bytes": data, "logprob": value}
