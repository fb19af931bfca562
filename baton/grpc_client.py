"""A client for Baton over gRPC, with and without asyncio.

    with Client("127.0.0.1:8002") as client:
        for message in client.generate(prompt="Hello", max_tokens=8):
            print(message.choices[0].text if message.choices else message.usage)

1. A client holds one channel; any number of calls share it. 2. `generate` takes the fields of `GenerateRequest` as
keyword arguments and yields its messages; leaving the loop cancels the request. 3. What the server refuses raises
`CallRefused` with status, field and the time to wait. Needs the extra `grpc`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Self

import grpc
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protocol.errors import BatonError
from router.rpc import baton_v1_pb2 as pb
from router.rpc import baton_v1_pb2_grpc as rpc

SERVICE: Final = "baton.v1.Baton"
# Two thousand vectors are more than the 4 MiB that a channel takes by default.
_OPTIONS: Final = (("grpc.max_receive_message_length", -1),)


class CallRefused(BatonError):
    """The server ended a call with a status other than OK.

    Attributes:
        code: gRPC's status.
        field: the offending field, or None.
        retry_after_s: when to come back, or None.
    """

    def __init__(self, error: Any) -> None:
        trailing = dict(error.trailing_metadata() or ())
        pushback_ms = trailing.get("grpc-retry-pushback-ms")
        super().__init__(error.details() or str(error.code()))
        self.code: grpc.StatusCode = error.code()
        self.field: str | None = trailing.get("baton-field")
        self.retry_after_s = None if pushback_ms is None else int(pushback_ms) / 1000


def decide_request(fields: Mapping[str, Any]) -> pb.DecideRequest:
    """Make a request of keyword arguments; questions and items may be mappings in the shape of their messages.

    Raises:
        ValueError, TypeError, ParseError: there is no such field, or its value has another type.
    """
    plain = {name: value for name, value in fields.items() if name not in ("questions", "items")}
    request = pb.DecideRequest(**plain)
    for name, add in (("questions", request.questions.add), ("items", request.items.add)):
        for one in fields.get(name, ()):
            added = add()
            added.CopyFrom(one) if isinstance(one, Message) else ParseDict(one, added)
    return request


def embed_request(fields: Mapping[str, Any]) -> pb.EmbedRequest:
    """Make a request of keyword arguments; `input` is one text, or a list of texts or of lists of token ids.

    Raises:
        ValueError, TypeError: there is no such field, or its value has another type.
    """
    fields = dict(fields)
    given = fields.pop("input", ())
    return pb.EmbedRequest(**fields, input=[_prompt(one) for one in ([given] if isinstance(given, str) else given)])


def request_of(fields: Mapping[str, Any]) -> pb.GenerateRequest:
    """Make a request of keyword arguments; messages may be mappings with role and content, prompts text or token ids.

    Raises:
        ValueError, TypeError: there is no such field, or its value has another type.
    """
    fields = dict(fields)
    if "messages" in fields:
        fields["messages"] = [_message(message) for message in fields["messages"]]
    if "prompts" in fields:
        fields["prompts"] = [_prompt(prompt) for prompt in fields["prompts"]]
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    return pb.GenerateRequest(**fields)


class Client:
    """Calls that block.

    Args:
        address: `host:port` of the server.
        metadata: sent with every call, such as x-cache-salt or x-priority.
        channel: a channel of the caller's own (TLS, say) instead of an insecure one; it stays the caller's to close.
    """

    def __init__(self, address: str, metadata: Mapping[str, str] | None = None, channel: Any = None) -> None:
        self._own = grpc.insecure_channel(address, options=_OPTIONS) if channel is None else None
        self._channel = channel or self._own
        self._metadata = tuple((metadata or {}).items())
        self._stub = rpc.BatonStub(self._channel)

    def generate(self, timeout_s: float | None = None, **fields: Any) -> Generator[pb.GenerateResponse]:
        """Yield messages until every choice is finished; the last one has the usage.

        Args:
            timeout_s: the request's deadline.
            fields: of `GenerateRequest`.

        Raises:
            CallRefused: the server refused it, or could not complete it in time.
        """
        call = self._stub.Generate(request_of(fields), timeout=timeout_s, metadata=self._metadata)
        try:
            with _refusals():
                yield from call
        finally:
            call.cancel()

    def decide(self, timeout_s: float | None = None, **fields: Any) -> pb.DecideResponse:
        """Answer questions about a text.

        Args:
            timeout_s: the request's deadline.
            fields: of `DecideRequest`; instructions may be plain text under `instructions: {"text": ...}`.

        Raises:
            CallRefused: the server refused it, or could not complete it in time.
        """
        with _refusals():
            answer: pb.DecideResponse = self._stub.Decide(
                decide_request(fields), timeout=timeout_s, metadata=self._metadata
            )
            return answer

    def embed(self, timeout_s: float | None = None, **fields: Any) -> pb.EmbedResponse:
        """Turn texts into vectors.

        Args:
            timeout_s: the request's deadline.
            fields: of `EmbedRequest`; `input` is one text, or a list of texts or of lists of token ids.

        Raises:
            CallRefused: the server refused it, or could not complete it in time.
        """
        with _refusals():
            answer: pb.EmbedResponse = self._stub.Embed(
                embed_request(fields), timeout=timeout_s, metadata=self._metadata
            )
            return answer

    def abort(self, request_id: str) -> bool:
        """End a request by its id; tell whether it was open. Raises CallRefused."""
        with _refusals():
            answer: pb.AbortResponse = self._stub.Abort(pb.AbortRequest(request_id=request_id), metadata=self._metadata)
            return answer.was_open

    def is_ready(self) -> bool:
        """Whether the server has workers for a request. Raises CallRefused if nobody answers."""
        with _refusals():
            return _is_serving(health_pb2_grpc.HealthStub(self._channel).Check(_HEALTH))

    def close(self) -> None:
        """End every call."""
        if self._own is not None:
            self._own.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """The same on one asyncio event loop. Arguments as for `Client`; a channel of the caller's own is of `grpc.aio`."""

    def __init__(self, address: str, metadata: Mapping[str, str] | None = None, channel: Any = None) -> None:
        self._own = grpc.aio.insecure_channel(address, options=_OPTIONS) if channel is None else None
        self._channel = channel or self._own
        self._metadata = tuple((metadata or {}).items())
        self._stub = rpc.BatonStub(self._channel)

    async def generate(self, timeout_s: float | None = None, **fields: Any) -> AsyncGenerator[pb.GenerateResponse]:
        """Yield messages until every choice is finished, as `Client.generate` does; cancel-safe."""
        call = self._stub.Generate(request_of(fields), timeout=timeout_s, metadata=self._metadata)
        try:
            with _refusals():
                async for message in call:
                    yield message
        finally:
            call.cancel()

    async def decide(self, timeout_s: float | None = None, **fields: Any) -> pb.DecideResponse:
        """Answer questions about a text, as `Client.decide` does; cancel-safe."""
        with _refusals():
            request = decide_request(fields)
            answer: pb.DecideResponse = await self._stub.Decide(request, timeout=timeout_s, metadata=self._metadata)
            return answer

    async def embed(self, timeout_s: float | None = None, **fields: Any) -> pb.EmbedResponse:
        """Turn texts into vectors, as `Client.embed` does; cancel-safe."""
        with _refusals():
            request = embed_request(fields)
            answer: pb.EmbedResponse = await self._stub.Embed(request, timeout=timeout_s, metadata=self._metadata)
            return answer

    async def abort(self, request_id: str) -> bool:
        """End a request by its id; tell whether it was open. Raises CallRefused."""
        with _refusals():
            request = pb.AbortRequest(request_id=request_id)
            answer: pb.AbortResponse = await self._stub.Abort(request, metadata=self._metadata)
            return answer.was_open

    async def is_ready(self) -> bool:
        """Whether the server has workers for a request. Raises CallRefused if nobody answers."""
        with _refusals():
            return _is_serving(await health_pb2_grpc.HealthStub(self._channel).Check(_HEALTH))

    async def close(self) -> None:
        """End every call."""
        if self._own is not None:
            await self._own.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


_HEALTH: Final = health_pb2.HealthCheckRequest(service=SERVICE)


def _is_serving(answer: Any) -> bool:
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _message(message: pb.ChatMessage | Mapping[str, Any]) -> pb.ChatMessage:
    return message if isinstance(message, pb.ChatMessage) else pb.ChatMessage(**message)


def _prompt(prompt: pb.Prompt | str | Sequence[int]) -> pb.Prompt:
    if isinstance(prompt, pb.Prompt):
        return prompt
    return pb.Prompt(text=prompt) if isinstance(prompt, str) else pb.Prompt(token_ids=pb.TokenIds(ids=prompt))


@contextmanager
def _refusals() -> Generator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise CallRefused(error) from error
