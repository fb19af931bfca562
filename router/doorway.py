"""What a request passes before its handler: its record, keys, other origins, and limits of its connection.

1. A connection that has not sent the head of a request within its budget is closed, and so is one that stays idle.
2. A head that is too large is answered with 431, one that is no HTTP with 400; what says something else about its body
   than others may read (`router/framing.py`), or expects what nobody meets, is refused too, all in OpenAI's shape.
3. A browser's preflight is answered for origins that are allowed; every answer says so to its browser.
4. Without a key that is known, where keys are needed, the answer is 401.
5. Whatever is asked of the model, or refused, has a line in the access log; who looks after the server has none.
6. An answer of HTTP/1.0 that has no length ends with its connection, whatever the client asked of it.
7. A client that leaves is no error, whenever it does: one line of information.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final

from aiohttp import HttpVersion11, web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import _ErrInfo
from aiohttp.web_request import BaseRequest

from protocol.errors import InvalidRequest
from router.access import OPEN_PATHS, Access, Client
from router.access_log import CLIENT_LEFT, AccessLog, current
from router.framing import refusal_of
from router.request_ids import HEADER, named_in
from router.responses import encode_json, error_body
from router.text_threads import PARTY

log = logging.getLogger(__name__)

TENANT: Final = web.RequestKey("tenant", str)
REQUEST_ID: Final = web.RequestKey("request_id", str)
MAX_LINE_BYTES: Final = 8190
MAX_HEADERS: Final = 128
MAX_HEAD_BYTES: Final = 64 << 10
HEAD_PIECE_BYTES: Final = 16 << 10
PREFLIGHT_AGE_S: Final = 600
UNREAD_ERROR_S: Final = 10.0
_EXPOSED: Final = "X-Request-ID, Retry-After"
_TOO_LARGE: Final = (
    f"the head of the request is too large: {MAX_HEADERS} headers of {MAX_LINE_BYTES} bytes, "
    f"{MAX_HEAD_BYTES} bytes in all"
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_BaseHandler = Callable[[BaseRequest], Awaitable[web.StreamResponse]]


def recorded(access_log: AccessLog) -> Any:
    """Return a middleware that keeps the record of each request, outside of all others."""

    @web.middleware
    async def record(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.removesuffix("/") in OPEN_PATHS:
            return await handler(request)
        with access_log.record(f"{request.method} {request.path}") as noted:
            # Until a key says whose request it is, or where none is known.
            noted.client = Client(request.remote or "")
            try:
                response = await handler(request)
                noted.status = response.status
                if request.method != "POST" and response.status < 400:
                    noted.dismiss()
                return response
            except (asyncio.CancelledError, ConnectionError):
                # What has begun is a stream, or a whole answer that was cut while it was written.
                noted.status = CLIENT_LEFT if request.writer.output_size == 0 else 200
                raise
            except web.HTTPException as error:
                noted.status = error.status
                raise
            finally:
                noted.request_id = request.get(REQUEST_ID, "")

    return record


def keys_needed(access: Access) -> Any:
    """Return a middleware that lets requests with a known key pass, and notes their tenant."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.removesuffix("/") not in OPEN_PATHS:
            client = access.client_of(request.headers.get("Authorization"), request.remote)
            request[TENANT], current().client = client.tenant, client
            PARTY.set(client.name)
        return await handler(request)

    return check


class Origins:
    """Pages of other origins that may ask. `*` stands for all of them."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self.allow(allowed)

    def allow(self, allowed: Sequence[str]) -> None:
        """Let the pages of these origins ask, and no others, from now on."""
        self._allowed = frozenset(allowed)

    @web.middleware
    async def answer_preflight(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer what a browser asks before it sends a request for a page."""
        wanted = request.headers.get("Access-Control-Request-Method")
        if not self._allowed or request.method != "OPTIONS" or wanted is None:
            return await handler(request)
        if self._told(request) is None:
            return web.Response(status=403)
        headers = {
            "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
            "Access-Control-Allow-Headers": request.headers.get("Access-Control-Request-Headers", "*"),
            "Access-Control-Max-Age": str(PREFLIGHT_AGE_S),
        }
        return web.Response(status=204, headers=headers)

    async def tell(self, request: web.Request, response: web.StreamResponse) -> None:
        """Say in an answer which origin may read it."""
        if not self._allowed:
            return
        response.headers["Vary"] = "Origin"
        if (origin := self._told(request)) is not None:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = _EXPOSED

    def _told(self, request: web.Request) -> str | None:
        if "*" in self._allowed:
            return "*"
        origin = request.headers.get("Origin")
        return origin if origin in self._allowed else None


class ClientRunner(web.AppRunner):
    """Runs the clients' application: its connections speak of their errors as everything else here does."""

    def __init__(self, app: web.Application, access_log: AccessLog, idle_s: float, shutdown_timeout: float) -> None:
        self._access_log = access_log
        app.on_response_prepare.append(_end_where_no_length_is)
        super().__init__(
            app,
            access_log=None,
            # A client that leaves must cancel its handler: that is what aborts its request.
            handler_cancellation=True,
            shutdown_timeout=shutdown_timeout,
            keepalive_timeout=idle_s,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
            max_headers=MAX_HEADERS,
            # Compressed bodies are refused: nobody has to unpack one to find out how large it is.
            auto_decompress=False,
        )

    @property
    def server(self) -> Any:
        """What makes a protocol of each new connection."""
        server = super().server
        return None if server is None else partial(_Connection, server, self._access_log)


class _Connection(web.RequestHandler):
    """A connection whose malformed requests are answered in OpenAI's shape, and whose client may leave."""

    __slots__ = ("_num_head_bytes",)

    def __init__(self, server: web.Server, access_log: AccessLog) -> None:
        super().__init__(server, loop=server._loop, **server._kwargs)
        assert self._request_handler is not None
        self._request_handler = partial(_answer, self._request_handler, access_log)
        self._num_head_bytes = 0

    def data_received(self, data: bytes) -> None:
        # While it waits for a request, all that comes belongs to heads.
        is_head = self._request_count == 0 or (self._waiter is not None and not self._waiter.done())
        if not is_head:
            self._num_head_bytes = 0
            super().data_received(data)
            return
        # In small pieces, for a parser that stumbles keeps what it was given, several times over.
        for start in range(0, max(1, len(data)), HEAD_PIECE_BYTES):
            self._take_head(data[start : start + HEAD_PIECE_BYTES])

    def _take_head(self, piece: bytes) -> None:
        self._num_head_bytes += len(piece)
        super().data_received(piece)
        if self._messages:
            self._num_head_bytes = 0
            if isinstance(self._messages[-1][0], _ErrInfo) or self._upgraded:
                # Nothing is made of what follows a broken head; nor is there another protocol to change to.
                self._message_tail = b""
                self._close = True
        elif self._num_head_bytes > MAX_HEAD_BYTES and self.transport is not None:
            log.info("a head of more than %d bytes", MAX_HEAD_BYTES)
            self.transport.write(_too_large())
            self.force_close()

    def handle_error(
        self, request: BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Return the answer to what is no request, or to a handler that failed outside of the application.

        Raises:
            ConnectionResetError: nobody is there to be answered, or an answer has begun.
        """
        if status >= 500:
            return self._answer_failure(request, status, exc)
        is_large = isinstance(exc, LineTooLong) or "Too many" in (message or "")
        log.info("a request that cannot be read: %s", type(exc).__name__)
        if is_large:
            return _refused(request, 431, _TOO_LARGE)
        return _refused(request, status, "this is not HTTP that can be read")

    def _answer_failure(self, request: BaseRequest, status: int, exc: BaseException | None) -> web.StreamResponse:
        transport = self.transport
        if isinstance(exc, ConnectionError) and (transport is None or transport.is_closing()):
            log.info("%s %s: its client left before the answer", request.method, request.path)
        else:
            log.error("%s %s failed", request.method, request.path, exc_info=exc)
            if request.writer.output_size == 0:
                return _refused(request, status, "internal error", "server_error")
        raise ConnectionResetError("there is nobody who could be answered")


async def _answer(handler: _BaseHandler, access_log: AccessLog, request: BaseRequest) -> web.StreamResponse:
    """Let the application answer a request whose head says nothing that is refused."""
    refusal = refusal_of(request)
    if refusal is None:
        return await handler(request)
    response = _refused(request, refusal.status, refusal.reason)
    with access_log.record(f"{request.method} {request.path}") as noted:
        noted.client, noted.request_id = Client(request.remote or ""), response.headers[HEADER]
        noted.status = refusal.status
        noted.failed(InvalidRequest(refusal.reason))
    return response


def _refused(request: BaseRequest, status: int, reason: str, kind: str = "invalid_request_error") -> web.StreamResponse:
    """Return an answer from outside of the application; the connection ends with it."""
    body = encode_json(error_body(reason, kind, status))
    headers = {"Content-Type": "application/json", HEADER: named_in(request.headers) or _new_id()}
    response = web.Response(status=status, body=body, headers=headers)
    response.force_close()
    if request.transport is not None:
        # It is closed when this is sent, and nobody else sees to it that it is read.
        asyncio.get_running_loop().call_later(UNREAD_ERROR_S, request.transport.abort)
    return response


def _too_large() -> bytes:
    """Return the whole answer to a head of which there is too much already."""
    body = encode_json(error_body(_TOO_LARGE, "invalid_request_error", 431))
    lines = ("HTTP/1.1 431 Request Header Fields Too Large", "Content-Type: application/json", "Connection: close")
    head = "\r\n".join([*lines, f"{HEADER}: {_new_id()}", f"Content-Length: {len(body)}", "", ""])
    return head.encode() + body


def _new_id() -> str:
    return secrets.token_hex(12)


async def _end_where_no_length_is(request: web.Request, response: web.StreamResponse) -> None:
    if request.version < HttpVersion11 and response.content_length is None:
        response.force_close()
