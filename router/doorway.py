"""What a request passes before its handler: its record, keys, other origins, and limits of its connection.

1. A connection that has not sent the head of a request within its budget is closed, and so is one that stays idle.
2. A head that is too large is answered with 431, one that is no HTTP with 400, both in OpenAI's shape.
3. A browser's preflight is answered for origins that are allowed; every answer says so to its browser.
4. Without a key that is known, where keys are needed, the answer is 401.
5. Whatever is asked of the model, or refused, has a line in the access log; who looks after the server has none.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_request import BaseRequest

from router.access import OPEN_PATHS, Access, Client
from router.access_log import CLIENT_LEFT, AccessLog, current
from router.responses import encode_json, error_body
from router.text_threads import PARTY

log = logging.getLogger(__name__)

TENANT: Final = web.RequestKey("tenant", str)
REQUEST_ID: Final = web.RequestKey("request_id", str)
MAX_LINE_BYTES: Final = 8190
MAX_HEADERS: Final = 128
PREFLIGHT_AGE_S: Final = 600
UNREAD_ERROR_S: Final = 10.0
_EXPOSED: Final = "X-Request-ID, Retry-After"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


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
                noted.status = CLIENT_LEFT
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

    def __init__(self, app: web.Application, idle_s: float, shutdown_timeout: float) -> None:
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
        return None if server is None else partial(_connect, server)


class _Connection(web.RequestHandler):
    """A connection whose malformed requests are answered in OpenAI's shape."""

    __slots__ = ()

    def handle_error(
        self, request: BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Return the answer to what is no request, or to a handler that failed outside of the application."""
        if status >= 500:
            return super().handle_error(request, status, exc, message)
        is_large = isinstance(exc, LineTooLong) or "Too many" in (message or "")
        status = 431 if is_large else status
        log.info("a request that cannot be read: %s", type(exc).__name__)
        what = (
            f"the head of the request is too large: {MAX_HEADERS} headers of {MAX_LINE_BYTES} bytes" if is_large else ""
        )
        body = encode_json(error_body(what or "this is not HTTP that can be read", "invalid_request_error", status))
        response = web.Response(status=status, body=body, headers={"Content-Type": "application/json"})
        response.force_close()
        transport = self.transport
        if transport is not None:
            # It is closed when this is sent, and nobody else sees to it that it is read.
            asyncio.get_running_loop().call_later(UNREAD_ERROR_S, transport.abort)
        return response


def _connect(server: Callable[[], web.RequestHandler]) -> web.RequestHandler:
    connection = server()
    # The server makes these of a class that cannot be chosen; ours has the same slots and one other method.
    connection.__class__ = _Connection
    return connection
