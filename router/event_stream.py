"""The open end of one streamed answer: events go straight to the socket while its client reads.

    DIRECT ── more than HIGH_WATER_BYTES unsent, or the socket is closing ──► HELD
       ▲                                                                        │ events wait in the session; the
       └──────────────── all of them are written ◄──────────────────────────────┘ handler writes them, with its budget

1. `begin` sends the head of the response. 2. `offer` is called for each piece where it arises: no task wakes up and no
timer is set for a token. 3. A client that does not read holds up its own handler in `write`, and nobody else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final

from aiohttp import web

from router.stream import AnswerShape
from router.text import Piece

HIGH_WATER_BYTES: Final = 64 << 10
WRITE_BUDGET_S: Final = 60.0
_HEADERS: Final = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}


class EventStream:
    """Writes the events of one answer. Used by its handler, and by the session while the handler waits."""

    def __init__(self, request: web.Request, shape: AnswerShape) -> None:
        self.response = web.StreamResponse(headers=_HEADERS)
        self._request = request
        self._shape = shape
        self._transport: asyncio.WriteTransport | None = None
        self._is_chunked = False

    async def begin(self) -> None:
        """Send the head of the response."""
        await self.response.prepare(self._request)
        self._transport = self._request.transport
        self._is_chunked = self.response.headers.get("Transfer-Encoding") == "chunked"

    def offer(self, index: int, piece: Piece) -> bool:
        """Write a piece at once; False if the client has to be waited for, or is gone: then nothing was done."""
        transport = self._transport
        if transport is None or transport.is_closing() or transport.get_write_buffer_size() > HIGH_WATER_BYTES:
            return False
        data = self._shape.chunk(index, piece)
        if data:
            # The response's own `write` does the same in an awaitable, with a count of bytes for its back-pressure.
            transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data)
        return True

    async def write(self, pieces: Iterable[tuple[int, Piece]]) -> None:
        """Write pieces, waiting for the client as long as it must be. Raises as `send` does."""
        if data := b"".join(self._shape.chunk(index, piece) for index, piece in pieces):
            await self.send(data)

    async def send(self, data: bytes) -> None:
        """Write data with back-pressure.

        Raises:
            ConnectionError: the client is gone.
            TimeoutError: it has not read for WRITE_BUDGET_S, which counts as gone.
        """
        async with asyncio.timeout(WRITE_BUDGET_S):
            await self.response.write(data)
