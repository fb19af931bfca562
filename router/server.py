"""HTTP for clients. Handlers are thin: parse, admit, open a session, write what it says.

1. Refuse early: draining, not ready, too many unfinished requests. 2. Read and validate the body; long ones are
tokenised in a thread, so that no prompt holds up another's stream. 3. Nothing is written before the first event: what
fails until then is an ordinary HTTP error. 4. A client that leaves cancels its handler, and that aborts on the workers,
unless it asked for its stream to be kept (router/resumption.py). 5. A client that does not read pauses its generation,
and is cut when it has read nothing for `client_stall_s` (router/event_stream.py). 6. What is no stream goes out by
`AnswerWriter`, errors included: no answer waits for a reader without end (router/answers.py).
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
from aiohttp import web

from protocol.errors import InvalidRequest, NotReady, Overloaded, RequestFailed, RequestRejected, Unauthorized
from protocol.wire import Role
from router.access import Access
from router.access_log import AccessLog, current
from router.answers import AnswerWriter
from router.api import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest, parse
from router.config import RouterConfig
from router.core import Core
from router.doorway import REQUEST_ID, TENANT, Origins, keys_needed, recorded
from router.embeddings import EmbeddingRoutes
from router.endpoints import ENDPOINTS, document
from router.generated import GeneratedAnswers
from router.intake import Job
from router.metrics import CONTENT_TYPE, Metrics
from router.outlet import Unread
from router.prompt_logprobs import read_prompts
from router.readout_routes import ReadoutRoutes
from router.request_ids import HEADER, named_in
from router.response_request import ResponsesRequest
from router.response_shape import shape_of
from router.responses import (
    DetokenizeAnswer,
    Health,
    Life,
    Load,
    ModelCard,
    ModelList,
    TokenizeAnswer,
    Version,
    body_of_error,
    encode_json,
    error_body,
)
from router.resumption import Claim, KeptStreams, asks_to_resume, claim_of
from router.switchboard import Switchboard

log = logging.getLogger(__name__)


Kind = type[ChatRequest] | type[CompletionRequest] | type[ResponsesRequest]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpServer:
    """The public side of a router."""

    def __init__(self, config: RouterConfig, core: Core, metrics: Metrics) -> None:
        self._config = config
        self._core = core
        self._tokenizer = core.tokenizer
        self._switchboard = core.switchboard
        self._metrics = metrics
        self._intake = core.intake
        self.access_log = AccessLog(config.access_log, time.monotonic)
        self._started_s = int(time.time())
        self._access = Access(config.api_keys, config.api_key_files, time.monotonic)
        self._origins = Origins(config.allowed_origins)
        self._unread = Unread(config.max_unread_bytes, config.client_stall_s)
        self._writer = AnswerWriter(self._unread)
        self._answers = GeneratedAnswers(core, self._writer, self._unread)
        self._kept = KeptStreams(config.max_num_requests, self._unread, core.slices)

    def app(self) -> web.Application:
        """Return the aiohttp application for clients."""
        doors = [
            recorded(self.access_log),
            self._writer.watched,
            errors_in_openai_shape,
            self._origins.answer_preflight,
            keys_needed(self._access),
        ]
        app = web.Application(middlewares=doors, client_max_size=self._config.max_body_bytes)
        app.on_response_prepare.append(_name_response)
        app.on_response_prepare.append(self._origins.tell)
        post, get = app.router.add_post, app.router.add_get
        post("/v1/chat/completions", self._chat)
        post("/v1/completions", self._complete)
        post("/v1/responses", self._respond)
        names = self._config.served_model_names
        ReadoutRoutes(self._core, self._writer, names[0], self._read, self._salt).add_to(app)
        EmbeddingRoutes(self._core, self._writer, self._read, self._salt).add_to(app)
        post("/tokenize", self._tokenize)
        post("/detokenize", self._detokenize)
        get("/v1/models", self._models)
        get("/v1/models/{model:.+}", self._model)
        get("/health", self._health)
        get("/readyz", self._health)
        get("/livez", self._life)
        get("/ping", self._health)
        post("/ping", self._health)
        get("/load", self._load)
        get("/openapi.json", self._openapi)
        get("/metrics", self._show_metrics)
        get("/version", self._version)
        get("/census", self._census)
        _forgive_slashes(app)
        return app

    def reload(self, config: RouterConfig) -> None:
        """Take over keys, origins and limits. Raises ConfigError before anything has changed."""
        self._access.reload(config.api_keys, config.api_key_files)
        self._origins.allow(config.allowed_origins)
        self._config = config

    def close(self) -> None:
        """Let go of what is kept."""
        self._kept.close()

    async def _read(self, request: web.Request) -> bytes:
        return await _read(request, self._config.request_read_s)

    # --- generation ---

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, ChatRequest)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, CompletionRequest)

    async def _respond(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, ResponsesRequest)

    async def _generate(self, request: web.Request, kind: Kind) -> web.StreamResponse:
        arrived_s = time.monotonic()
        await self._core.started()
        if asks_to_resume(request.headers):
            return await self._resume(request, kind, arrived_s)
        self._switchboard.check_capacity()  # before a large body is read
        body = await self._read(request)
        with self._core.admission():
            job = await self._core.admit(len(body), partial(self._job, request, body, kind))
        request[REQUEST_ID] = current().request_id = name = (
            named_in(request.headers) or job.request_id or request[REQUEST_ID]
        )
        read = await read_prompts(self._core, job, arrived_s)
        shape = shape_of(job, self._tokenizer, name, read)
        del read
        if job.is_prompt_only:
            self._switchboard.check_capacity(len(job.choices))
            with self._core.answering(len(job.choices)):
                await self._core.slices.run(shape.prepare())
                return await self._answers.tell_prompts(request, job, shape)
        session = self._core.open(job, arrived_s)
        try:
            await self._core.slices.run(shape.prepare())
            return await self._answers.tell(request, session, shape)
        finally:
            session.close()

    async def _resume(self, request: web.Request, kind: Kind, arrived_s: float) -> web.StreamResponse:
        """Answer with a stream that outlives its connection: a new one, or the rest of one that is kept."""
        body = await self._read(request)
        asked = f"{request.path}\n{request[TENANT]}\n".encode() + body
        claim = claim_of(request.headers, request[TENANT], named_in(request.headers), self._config.max_resume_s, asked)
        kept = self._kept.find(claim)
        if kept is not None:
            current().dismiss()  # who reads on adds nothing to the record of the stream
        else:
            with self._core.admission():
                job = await self._core.admit(len(body), partial(self._job, request, body, kind, claim=claim))
                # The same client may have been faster on another connection.
                kept = self._kept.find(claim)
                if kept is None:
                    request[REQUEST_ID] = current().request_id = claim.request_id
                    session = self._core.open(job, arrived_s)
                    session.record.status = 200
                    session.record.hand_over()
                    kept = self._kept.keep(claim, session, shape_of(job, self._tokenizer, claim.request_id))
        return await self._kept.read(kept, request, claim)

    def _job(
        self,
        request: web.Request,
        body: bytes,
        kind: Kind,
        max_model_len: int,
        claim: Claim | None = None,
    ) -> Job:
        parsed: ChatRequest | CompletionRequest | ResponsesRequest = parse(body, kind)
        if claim is not None and parsed.seed is None:
            parsed = msgspec.structs.replace(parsed, seed=claim.seed)
        job = self._intake.job(parsed, max_model_len)
        if claim is not None and not (job.is_stream and len(job.choices) == 1):
            raise InvalidRequest("X-Resume-For: only streams with one choice can be resumed", "X-Resume-For")
        if claim is not None and (job.is_prompt_only or job.num_prompt_top is not None):
            raise InvalidRequest("X-Resume-For: streams that tell about their prompt cannot be resumed", "X-Resume-For")
        if claim is not None and (job.tools is not None or job.response is not None):
            # One token may be several events there, and who has some of them could not say so.
            raise InvalidRequest("X-Resume-For: only streams of plain text can be resumed", "X-Resume-For")
        salt = self._salt(request, job.cache_salt)
        return job if salt == job.cache_salt else replace(job, cache_salt=salt)

    def _salt(self, request: web.Request, cache_salt: str) -> str:
        return self._access.salt(request[TENANT], cache_salt)

    # --- text ---

    async def _tokenize(self, request: web.Request) -> web.Response:
        body, max_model_len = await self._read(request), self._core.max_model_len()

        def work() -> bytes:
            parsed = parse(body, TokenizeRequest)
            tokens = self._intake.tokenize(parsed, max_model_len)
            strings = [self._tokenizer.token_text(i) for i in tokens] if parsed.return_token_strs else None
            found = TokenizeAnswer(count=len(tokens), max_model_len=max_model_len, tokens=tokens, token_strs=strings)
            return encode_json(found)

        return _json(await self._core.off_loop(len(body), work))

    async def _detokenize(self, request: web.Request) -> web.Response:
        body = await self._read(request)

        def work() -> bytes:
            parsed = parse(body, DetokenizeRequest)
            self._intake.check_model(parsed.model)
            text = self._tokenizer.decode(self._intake.known_tokens(parsed.tokens), skip_special=False)
            return encode_json(DetokenizeAnswer(prompt=text))

        return _json(await self._core.off_loop(len(body), work))

    # --- about the server ---

    def _card(self, name: str) -> ModelCard:
        root, max_model_len = self._config.served_model_names[0], self._switchboard.max_model_len
        return ModelCard(id=name, created=self._started_s, root=root, max_model_len=max_model_len)

    async def _models(self, _: web.Request) -> web.Response:
        cards = [self._card(name) for name in self._config.served_model_names]
        return _json(encode_json(ModelList(data=cards)))

    async def _model(self, request: web.Request) -> web.Response:
        name = request.match_info["model"].removesuffix("/")
        self._intake.check_model(name)
        return _json(encode_json(self._card(name)))

    async def _health(self, _: web.Request) -> web.Response:
        missing = self._switchboard.registry.missing()
        if self._switchboard.is_draining:
            missing.insert(0, "the server is shutting down")
        status = "ok" if not missing else "unavailable"
        return _json(encode_json(Health(status=status, missing=missing)), 503 if missing else 200)

    async def _life(self, _: web.Request) -> web.Response:
        return _json(encode_json(Life(status="ok")))

    async def _load(self, _: web.Request) -> web.Response:
        running, waiting = self._switchboard.dispatch.num_running, self._switchboard.dispatch.num_waiting
        return _json(encode_json(Load(server_load=running + waiting, running=running, waiting=waiting)))

    async def _openapi(self, _: web.Request) -> web.Response:
        found = document(ENDPOINTS, importlib.metadata.version("baton-serve"), not self._access.is_open)
        return _json(encode_json(found))

    async def _show_metrics(self, _: web.Request) -> web.Response:
        dispatch = self._switchboard.dispatch
        body = self._metrics.render(
            self._switchboard.registry, dispatch.num_running, dispatch.num_waiting, dispatch.num_stale_tokens
        )
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

    async def _version(self, _: web.Request) -> web.Response:
        return _json(encode_json(Version(version=importlib.metadata.version("baton-serve"))))

    async def _census(self, _: web.Request) -> web.Response:
        return _json(encode_json(census(self._switchboard)))


def _forgive_slashes(app: web.Application) -> None:
    """Let every path be asked for with a slash at its end, too."""
    for route in list(app.router.routes()):
        path = "" if route.resource is None else route.resource.canonical
        if path and "{" not in path:
            app.router.add_route(route.method, f"{path}/", route.handler)


def census(switchboard: Switchboard) -> dict[str, Any]:
    """Return what every worker last reported, and what is unfinished here."""
    now_s, workers = time.monotonic(), []
    for worker in switchboard.registry:
        stats, registration = worker.stats, worker.registration
        blocks = {state: getattr(stats, f"blocks_{state}") for state in ("free", "cached", "leased", "total")}
        counters = {name: getattr(stats, name) for name in stats.__struct_fields__ if not name.startswith("blocks_")}
        workers.append(
            {
                "worker_id": registration.worker_id,
                "instance": registration.instance,
                "role": str(worker.role),
                "pid": registration.pid,
                "backend": registration.backend,
                "max_model_len": registration.max_model_len,
                "is_draining": worker.is_draining,
                "heard_s_ago": round(now_s - worker.heard_s, 3),
                "links": sorted(key.worker_id for key in worker.links) if worker.role is Role.DECODE else [],
                "blocks": blocks,
                "is_balanced": blocks["free"] + blocks["cached"] + blocks["leased"] == blocks["total"],
                **counters,
            }
        )
    dispatch = switchboard.dispatch
    requests = {"running": dispatch.num_running, "waiting": dispatch.num_waiting}
    return {
        "is_balanced": all(worker["is_balanced"] for worker in workers),
        "workers": workers,
        "requests": requests,
        "missing": switchboard.registry.missing(),
        "num_tasks": len(asyncio.all_tasks()),
    }


@web.middleware
async def errors_in_openai_shape(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every error as OpenAI would."""
    request[REQUEST_ID] = named_in(request.headers) or secrets.token_hex(12)
    try:
        return await handler(request)
    except (RequestRejected, RequestFailed) as error:
        current().failed(error)
        response = _json(encode_json(body_of_error(error)), error.status)
        if isinstance(error, Overloaded | NotReady):
            response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
        if isinstance(error, Unauthorized):
            response.headers["WWW-Authenticate"] = "Bearer"
        return response
    except web.HTTPException as error:
        if error.status < 400:
            raise
        kind, reason = "not_found_error" if error.status == 404 else "invalid_request_error", _in_words(request, error)
        current().failed(InvalidRequest(reason))
        return _json(encode_json(error_body(reason, kind, error.status)), error.status,
                     {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None)  # fmt: skip
    except ConnectionError:
        raise
    except Exception:
        current().failed(RequestFailed("internal error"))
        log.exception("request %s: %s %s failed", request[REQUEST_ID], request.method, request.path)
        return _json(encode_json(error_body("internal error", "server_error", 500)), 500)


def _in_words(request: web.Request, error: web.HTTPException) -> str:
    if error.status == 404:
        return f"there is nothing at {request.path[:200]}"
    if error.status == 405:
        return f"{request.method} is not allowed at {request.path[:200]}"
    if error.status == 413:
        return "the body is too large"
    return error.text or error.reason


async def _read(request: web.Request, budget_s: float) -> bytes:
    """Return the body.

    Raises:
        web.HTTPException: 413 too large, 415 not JSON, 408 not sent in time.
    """
    if "Content-Type" in request.headers and request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(text=f"send application/json, not {request.content_type[:100]}")
    announced = request.content_length or 0
    if announced > request.client_max_size:
        raise web.HTTPRequestEntityTooLarge(request.client_max_size, announced)
    try:
        if request.content.is_eof():
            return await request.read()  # it has come with the head, as most do: no timer is needed
        async with asyncio.timeout(budget_s):
            return await request.read()
    except web.RequestPayloadError as error:
        raise web.HTTPBadRequest(text="the body cannot be read: its framing is broken") from error
    except TimeoutError as error:
        raise web.HTTPRequestTimeout(text="the body was not sent in time") from error


def _json(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=body, status=status, headers={**(headers or {}), "Content-Type": "application/json"})


async def _name_response(request: web.Request, response: web.StreamResponse) -> None:
    name = request.get(REQUEST_ID)
    if name:
        response.headers[HEADER] = name
