"""gRPC for clients, on the router's event loop: `baton.v1`, health and reflection, in front of the same core as HTTP.

1. A request becomes the body that it would be over HTTP and takes the same way through the core; what HTTP refuses is
   refused here, by a status and with the field's name.
2. Messages follow as tokens come. A client that does not read fills its own stream's window: then its generation is
   paused, and what has come meanwhile goes into one message. Who reads nothing for `client_stall_s` is given up.
3. A client that cancels, leaves, or whose deadline passes, cancels its handler, and that aborts on the workers. `Abort`
   ends a request from another call.
4. Draining: health says so, no new call is taken, running ones go on.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeVar
from urllib.parse import unquote

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from protocol.errors import (
    AnswerImpossible,
    BatonError,
    DeadlineExceeded,
    InvalidRequest,
    NotReady,
    Overloaded,
    RequestAborted,
    RequestFailed,
    RequestRejected,
    Unauthorized,
    UnknownModel,
)
from protocol.request import FinishReason
from router.access import Access
from router.access_log import AccessLog, RequestRecord, current
from router.api import ChatRequest, CompletionRequest, parse
from router.bodies import body_of_fields
from router.config import RouterConfig
from router.core import LONG_TEXT_BYTES, Core
from router.deciding import Inquiry, decide
from router.decisions import DecisionsRequest, answer, inquiry_of
from router.embeddings import EmbeddingsRequest, embed
from router.event_stream import Nothing, Source
from router.grpc_decisions import decide_response, decisions_body
from router.grpc_embeddings import embed_response, embeddings_body
from router.grpc_messages import MessageShape, body_of
from router.intake import Job
from router.prompt_logprobs import read_prompts
from router.rpc import baton_v1_pb2 as pb
from router.rpc import baton_v1_pb2_grpc as rpc
from router.switchboard import Session
from router.text import Piece
from router.text_threads import PARTY

log = logging.getLogger(__name__)
Result = TypeVar("Result")

SERVICE: Final = pb.DESCRIPTOR.services_by_name["Baton"].full_name
BIND_BUDGET_S: Final = 5.0
BIND_RETRY_S: Final = 0.1
HANDSHAKE_MS: Final = 10_000
HEALTH_EVERY_S: Final = 0.1
PAUSE_AFTER_S: Final = 0.5
GIVE_UP_S: Final = 1.0
# What a value of an answer takes of a thread's time, in the bytes of text that take as long.
VALUE_BYTES: Final = 8
_STATUS: Final[tuple[tuple[type[BatonError], grpc.StatusCode], ...]] = (
    (Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (Unauthorized, grpc.StatusCode.UNAUTHENTICATED),
    (UnknownModel, grpc.StatusCode.NOT_FOUND),
    (RequestRejected, grpc.StatusCode.INVALID_ARGUMENT),
    (AnswerImpossible, grpc.StatusCode.INVALID_ARGUMENT),
    (NotReady, grpc.StatusCode.UNAVAILABLE),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (RequestAborted, grpc.StatusCode.ABORTED),
    (RequestFailed, grpc.StatusCode.INTERNAL),
)
# What metadata may say instead of a field.
_METADATA: Final = {"x-request-id": "request_id", "x-cache-salt": "cache_salt", "x-priority": "priority"}


class GrpcServer:
    """The gRPC side of a router: `start`, `drain`, `close`."""

    def __init__(self, config: RouterConfig, core: Core) -> None:
        self._config = config
        self._core = core
        self._service = BatonService(config, core)
        self._health = HealthServicer()
        self._watch: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None
        self._server: Any = None
        self._is_ready: bool | None = None
        self.port = 0

    async def start(self) -> None:
        """Open the port; a predecessor that is just giving it up is waited for.

        Raises:
            OSError: the port cannot be had.
        """
        host, wanted = self._config.http_host, self._config.grpc_port
        address = f"[{host}]:{wanted}" if ":" in host else f"{host}:{wanted}"
        deadline_s = time.monotonic() + BIND_BUDGET_S
        while True:
            self._server = self._new_server()
            try:
                self.port = self._server.add_insecure_port(address)
            except RuntimeError as error:
                if time.monotonic() > deadline_s:
                    raise OSError(f"grpc-port: cannot listen on {address}: it is in use, or not ours") from error
                await asyncio.sleep(BIND_RETRY_S)
            else:
                break
        await self._server.start()
        await self._tell_health()
        self._watch = asyncio.create_task(self._watch_health())
        log.info("gRPC on port %d", self.port)

    def _new_server(self) -> Any:
        options = [
            # Two routers on one port would each get some of the calls, without a word.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", self._config.max_body_bytes),
            # A client whose machine is gone is noticed although nothing is sent to it.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            # Who connects and says nothing, or asks nothing, is closed, as over HTTP.
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
            ("grpc.max_connection_idle_ms", round(1000 * self._config.idle_s)),
        ]
        server = grpc.aio.server(options=options)
        rpc.add_BatonServicer_to_server(self._service, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflection.enable_server_reflection((SERVICE, health_name, reflection.SERVICE_NAME), server)
        return server

    def reload(self, config: RouterConfig) -> None:
        """Take over keys. Raises ConfigError before anything has changed."""
        self._service.reload(config)

    def drain(self) -> None:
        """Give the port up to a successor and let running calls go on; `close` waits for them no longer."""
        self._draining = asyncio.create_task(self._server.stop(self._config.drain_s))

    async def close(self) -> None:
        """End every call and the port."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        if self._server is not None:
            await self._server.stop(0)

    async def _watch_health(self) -> None:
        while True:
            await asyncio.sleep(HEALTH_EVERY_S)
            await self._tell_health()

    async def _tell_health(self) -> None:
        switchboard, statuses = self._core.switchboard, health_pb2.HealthCheckResponse
        is_ready = switchboard.registry.is_ready and not switchboard.is_draining
        if is_ready is self._is_ready:
            return
        self._is_ready = is_ready
        for name in ("", SERVICE):
            await self._health.set(name, statuses.SERVING if is_ready else statuses.NOT_SERVING)


class BatonService(rpc.BatonServicer):  # type: ignore[misc, unused-ignore]
    """The calls of `baton.v1.Baton`; their names are the proto file's."""

    def __init__(self, config: RouterConfig, core: Core) -> None:
        self._core = core
        self._stall_s = config.client_stall_s
        self._model = config.served_model_names[0]
        self._access = Access(config.api_keys, config.api_key_files, time.monotonic)
        self._access_log = AccessLog(config.access_log, time.monotonic)

    def reload(self, config: RouterConfig) -> None:
        """Take over keys. Raises ConfigError before anything has changed."""
        self._access.reload(config.api_keys, config.api_key_files)

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        """Write messages until every choice is finished."""
        with self._record("Generate") as record:
            try:
                await self._generate(request, context)
            except (RequestRejected, RequestFailed) as error:
                await _refuse(context, error, record)

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        """End a request of any connection."""
        try:
            name = _name(self._tenant(context), request.request_id)
            return pb.AbortResponse(was_open=self._core.open_requests.abort(name))
        except Unauthorized as error:
            await _refuse(context, error, current())
            raise

    async def Decide(self, request: pb.DecideRequest, context: Any) -> pb.DecideResponse:
        """Answer questions about a text."""
        with self._record("Decide") as record:
            try:
                return await self._decide(request, context)
            except (RequestRejected, RequestFailed) as error:
                await _refuse(context, error, record)
                raise

    async def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        """Turn texts into vectors."""
        with self._record("Embed") as record:
            try:
                return await self._embed(request, context)
            except (RequestRejected, RequestFailed) as error:
                await _refuse(context, error, record)
                raise

    @contextmanager
    def _record(self, call: str) -> Iterator[RequestRecord]:
        """Keep the record of a call; `_refuse` notes another status than that of one that went well."""
        with self._access_log.record(call) as record:
            record.status = "OK"
            try:
                yield record
            except asyncio.CancelledError:
                record.status = "CANCELLED"
                raise
            except Exception as error:
                record.status = "UNKNOWN" if record.status == "OK" else record.status
                record.failed(error)
                raise

    async def _embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        arrived_s, tenant, told = time.monotonic(), self._tenant(context), _told(context)

        def make() -> EmbeddingsRequest:
            return parse(body_of_fields(embeddings_body(request, self._model)), EmbeddingsRequest)

        def salt(cache_salt: str) -> str:
            return self._access.salt(tenant, cache_salt or told.get("cache_salt", ""))

        found = await embed(self._core, request.ByteSize(), make, salt, arrived_s)
        response = await _off_loop(found.num_bytes, lambda: embed_response(found))
        self._hold_until_read(context)
        return response

    async def _decide(self, request: pb.DecideRequest, context: Any) -> pb.DecideResponse:
        arrived_s, tenant, told = time.monotonic(), self._tenant(context), _told(context)
        parsed: list[DecisionsRequest] = []

        def make() -> Inquiry:
            parsed.append(parse(body_of_fields(decisions_body(request, self._model)), DecisionsRequest))
            inquiry = inquiry_of(parsed[0])
            return replace(
                inquiry, cache_salt=self._access.salt(tenant, inquiry.cache_salt or told.get("cache_salt", ""))
            )

        verdict = await decide(self._core, request.ByteSize(), make, arrived_s)
        num_bytes = VALUE_BYTES * sum(len(found.probabilities) for found in verdict.answers)
        response = await _off_loop(num_bytes, lambda: decide_response(answer(parsed[0], verdict)))
        self._hold_until_read(context)
        return response

    def _hold_until_read(self, context: Any) -> None:
        """Hold a place for an answer that gRPC itself writes, until its client has it or is gone."""
        place = self._core.answering()
        place.__enter__()
        context.add_done_callback(lambda _: place.__exit__(None, None, None))

    async def _generate(self, request: pb.GenerateRequest, context: Any) -> None:
        arrived_s, core = time.monotonic(), self._core
        await core.started()
        tenant, told = self._tenant(context), _told(context)
        with core.admission():
            job = await core.admit(request.ByteSize(), partial(self._job, request, tenant, told))
        current().request_id = request_id = job.request_id or secrets.token_hex(12)
        name = _name(tenant, request_id)
        read = await read_prompts(core, job, arrived_s)
        shape = MessageShape(job, core.tokenizer, request_id, read)
        if job.is_prompt_only:
            core.switchboard.check_capacity(len(job.choices))
            with core.answering(len(job.choices)):
                await self._tell_prompts(job, shape, context)
            return
        core.open_requests.check(name)
        session = core.open(job, arrived_s)
        core.open_requests.add(name, session)
        try:
            await context.send_initial_metadata((("x-request-id", request_id),))
            await self._follow(session, shape, context)
        finally:
            session.close()
            core.open_requests.remove(name)

    def _tenant(self, context: Any) -> str:
        """Return whose call it is. Raises Unauthorized."""
        metadata = dict(context.invocation_metadata() or ())
        client = self._access.client_of(metadata.get("authorization"), _address(context.peer()))
        current().client = client
        PARTY.set(client.name)
        return client.tenant

    def _job(self, request: pb.GenerateRequest, tenant: str, told: dict[str, Any], max_model_len: int) -> Job:
        body, kind = body_of(request, self._model)
        body = {**told, **body}
        parsed: ChatRequest | CompletionRequest = parse(body_of_fields(body), kind)
        job = self._core.intake.job(parsed, max_model_len)
        return replace(job, cache_salt=self._access.salt(tenant, job.cache_salt))

    async def _tell_prompts(self, job: Job, shape: MessageShape, context: Any) -> None:
        """Answer where nothing is generated: prompts echoed, or told about, a message each."""
        writer = MessageWriter(Nothing(), context, self._stall_s)
        for choice in job.choices:
            ended = [(choice.index, Piece(finish_reason=FinishReason.LENGTH))]
            if (message := await self._shaped(shape, ended, job)) is not None:
                await writer.write(message)
        await writer.write(shape.closing(0))

    async def _follow(self, session: Session, shape: MessageShape, context: Any) -> None:
        writer = MessageWriter(session, context, self._stall_s)
        while events := await session.events():
            if (message := await self._shaped(shape, events, session.job)) is not None:
                await writer.write(message)
        with self._core.answering():
            await writer.write(shape.closing(session.num_cached_tokens))

    async def _shaped(
        self, shape: MessageShape, events: list[tuple[int, Piece]], job: Job
    ) -> pb.GenerateResponse | None:
        """Return the message for some pieces; what is much is shaped in a thread."""
        num_values = sum(len(piece.logged) * (1 + (job.choices[i].sampling.num_logprobs or 0)) for i, piece in events)
        num_values += shape.num_prompt_values(i for i, _ in events)
        return await _off_loop(VALUE_BYTES * num_values, lambda: shape.chunk(events))


class MessageWriter:
    """Writes the messages of one stream; a client that does not read pauses its own generation only."""

    def __init__(self, source: Source, context: Any, stall_s: float) -> None:
        self._source = source
        self._context = context
        self._stall_s = stall_s
        self._loop = asyncio.get_running_loop()
        self._is_paused = False

    async def write(self, message: pb.GenerateResponse) -> None:
        """Write a message, and wait until the client's window had room for it.

        Raises:
            DeadlineExceeded: it has read nothing for `stall_s`.
        """
        pause = self._loop.call_later(PAUSE_AFTER_S, self._pause)
        try:
            async with asyncio.timeout(self._stall_s):
                await self._context.write(message)
        except TimeoutError as error:
            raise DeadlineExceeded(f"the client has read nothing for {self._stall_s:g} s") from error
        finally:
            pause.cancel()
        if self._is_paused:
            self._is_paused = False
            self._source.go_on()

    def _pause(self) -> None:
        self._is_paused = True
        self._source.pause()


async def _off_loop(num_bytes: int, work: Callable[[], Result]) -> Result:
    """Shape a message: here if it is little, in a thread if it is much."""
    return work() if num_bytes <= LONG_TEXT_BYTES else await asyncio.to_thread(work)


async def _refuse(context: Any, error: RequestRejected | RequestFailed, record: RequestRecord) -> None:
    """End a call with the status of an error; a client that does not read is not waited for."""
    code = next(code for kind, code in _STATUS if isinstance(error, kind))
    record.status = code.name
    record.failed(error)
    trailing = [("baton-error-type", error.error_type)]
    if isinstance(error, RequestRejected) and error.param:
        trailing.append(("baton-field", error.param))
    if isinstance(error, Overloaded | NotReady):
        # The name that gRPC's own retry policies obey.
        trailing.append(("grpc-retry-pushback-ms", str(max(1, round(error.retry_after_s * 1000)))))
        trailing.append(("retry-after", str(max(1, math.ceil(error.retry_after_s)))))
    with suppress(TimeoutError):
        async with asyncio.timeout(GIVE_UP_S):
            await context.abort(code, str(error), tuple(trailing))


def _told(context: Any) -> dict[str, Any]:
    """Return what the metadata say of a request. Raises InvalidRequest."""
    told: dict[str, Any] = {}
    for key, value in context.invocation_metadata() or ():
        if (name := _METADATA.get(key)) is None:
            continue
        if name != "priority":
            told[name] = value
            continue
        try:
            told[name] = int(value)
        except ValueError:
            raise InvalidRequest("x-priority: must be a whole number", "x-priority") from None
    return told


def _address(peer: str) -> str | None:
    """Return the address of a peer as gRPC names it: `ipv4:1.2.3.4:5`, `ipv6:[::1]:5` or `ipv6:%5B::1%5D:5`."""
    family, _, rest = peer.partition(":")
    host = unquote(rest).rpartition(":")[0].strip("[]")
    return host if family in ("ipv4", "ipv6") else None


def _name(tenant: str, request_id: str) -> str:
    """Return what an open request is known as: nobody ends another tenant's."""
    return f"{request_id}\0{tenant}"
