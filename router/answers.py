"""Writes whole answers: everything that is said to clients and is no stream of events.

    handler returns a response ─► AnswerWriter.watched ──┐
    handler calls AnswerWriter.send(parts) ──────────────┴─► head ─► SENT_BYTES ─► settle ─► ... ─► all is sent
                                                                                     └─ no reader ► cut

1. `watched` is the outermost middleware: no answer of a handler, and no error, is left to a client that does not read.
2. `send` takes the parts of a large answer as they were shaped; what the kernel has not taken is held once.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from aiohttp import web

from router.access_log import current
from router.outlet import GO_ON_BYTES, Outlet, Unread

log = logging.getLogger(__name__)

SENT_BYTES: Final = 128 << 10
# Below the mark of a transport, above which whoever writes waits for a reader.
SMALL_BYTES: Final = 32 << 10
_JSON: Final = {"Content-Type": "application/json"}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class AnswerWriter:
    """Used by the handlers of one server."""

    def __init__(self, unread: Unread) -> None:
        self._unread = unread

    @property
    def watched(self) -> Any:
        """A middleware that writes what a handler returns, unless it has been written."""

        @web.middleware
        async def write(request: web.Request, handler: Handler) -> web.StreamResponse:
            response = await handler(request)
            if not isinstance(response, web.Response) or response.prepared:
                return response
            body = response.body
            if not isinstance(body, bytes) or len(body) <= SMALL_BYTES:
                return await self._send_small(request, response)
            headers = {name: value for name, value in response.headers.items() if name != "Content-Length"}
            return await self.send(request, [body], response.status, headers)

        return write

    async def send(
        self,
        request: web.Request,
        parts: Sequence[bytes],
        status: int = 200,
        headers: Mapping[str, str] = _JSON,
    ) -> web.StreamResponse:
        """Write an answer and wait until its client has read it, or is cut.

        Args:
            request: what is answered.
            parts: of the body.
            status: of the answer.
            headers: without a length.
        """
        num_left = sum(map(len, parts))
        if num_left <= SMALL_BYTES:
            return await self._send_small(request, web.Response(status=status, headers=headers, body=b"".join(parts)))
        response = web.StreamResponse(status=status, headers=headers)
        response.content_length = num_left
        outlet = Outlet(request, response, self._unread)
        try:
            writer = await response.prepare(request)
            assert writer is not None, "nothing was sent yet"
            writer.send_headers()
            outlet.open(writer)
            for part in parts:
                view = memoryview(part)
                for at in range(0, len(view), SENT_BYTES):
                    piece = view[at : at + SENT_BYTES]
                    outlet.write(piece)
                    num_left -= len(piece)
                    if outlet.unsent_bytes > SENT_BYTES:
                        await outlet.settle(GO_ON_BYTES, num_left)
            await outlet.finish()
        except (ConnectionError, TimeoutError) as error:
            _cut(request, outlet, error)
        return response

    async def _send_small(self, request: web.Request, response: web.Response) -> web.Response:
        outlet = Outlet(request, response, self._unread)
        try:
            writer = await response.prepare(request)
            if writer is None:
                return response
            outlet.open(writer)
            await response.write_eof()
            await outlet.finish()
        except (ConnectionError, TimeoutError) as error:
            _cut(request, outlet, error)
        return response


def _cut(request: web.Request, outlet: Outlet, error: Exception) -> None:
    current().failed(error)
    log.info("answer to %s %s: connection ended: %s", request.method, request.path[:200], error)
    outlet.cut()
