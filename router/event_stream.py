"""The open end of one streamed answer: events go straight to the socket while its client reads.

    DIRECT ── more than PAUSE_BYTES unsent, or the socket is closing ──► FULL
       ▲                                                                   │ generation is paused at once, its blocks
       │                                                                   │ go back; the handler waits in `settle`
       ├──────────────── at most GO_ON_BYTES unsent ◄──────────────────────┤
       │                                                                   │
       └─ finish ► all is sent                 CUT ◄── nothing was read for `stall_s`, also after the last event

1. The head of the response goes out with its first event, the end of the body with its last one: each write is a call
of the system. 2. `offer` is called for each piece where it arises: no task wakes up and no timer is set for a token.
3. A client that does not read holds up its own stream, and nobody else.

What is held for a client is bounded: between PAUSE_BYTES and LIMIT_BYTES is room for what was on its way already;
only single events that are larger than that (a long prompt echoed) go beyond, and count in `Unread`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final, Protocol

from aiohttp import web
from aiohttp.http import StreamWriter

from router.outlet import GO_ON_BYTES, KERNEL_UNSENT_BYTES, Outlet, Unread
from router.shape import Shape
from router.slices import Slices
from router.text import Piece

PAUSE_BYTES: Final = 192 << 10
LIMIT_BYTES: Final = 256 << 10
# Without the charset there are clients that read Latin-1.
EVENT_HEADERS: Final = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}


class Source(Protocol):
    """Where pieces come from: a session, as a rule."""

    def pause(self) -> None:
        """Generate nothing until `go_on`."""
        ...

    def go_on(self) -> None:
        """Go on after a pause."""
        ...


class Nothing:
    """The source of what is there already."""

    def pause(self) -> None:
        """Nothing is generated."""

    def go_on(self) -> None:
        """Nothing will be."""


class _Response(web.StreamResponse):
    # aiohttp's own name for it; its whole responses say the same.
    _send_headers_immediately = False


class EventStream:
    """Writes the events of one answer. Used by its handler, and by the session while the handler waits.

    Args:
        shape: shapes what is offered and written; events that are pushed are bytes already.
        source: paused while its client does not read what is offered and written.
        unread: of all connections.
        slices: of the event loop, for what is written many pieces at a time.
    """

    def __init__(self, request: web.Request, shape: Shape, source: Source, unread: Unread, slices: Slices) -> None:
        self.response = _Response(headers=EVENT_HEADERS)
        self._request = request
        self._shape = shape
        self._source = source
        self._slices = slices
        self._outlet = Outlet(request, self.response, unread)
        self._writer: StreamWriter | None = None
        # None until the head has been sent.
        self._transport: asyncio.WriteTransport | None = None
        self._is_chunked = False

    @property
    def unsent_bytes(self) -> int:
        """Bytes that the kernel has not taken yet; 0 before the head is sent."""
        return self._outlet.unsent_bytes

    async def begin(self) -> None:
        """Prepare the head of the response; `write`, `push` or `finish` sends it."""
        writer = await self.response.prepare(self._request)
        assert isinstance(writer, StreamWriter), "nothing was sent yet"
        self._writer = writer
        self._is_chunked = writer.chunked
        self._outlet.open(writer)

    def offer(self, index: int, piece: Piece) -> bool:
        """Write a piece at once; False if the client has to be waited for, or is gone: then nothing was done."""
        transport = self._transport
        if transport is None or transport.is_closing() or transport.get_write_buffer_size() > PAUSE_BYTES:
            # Now, not when the handler runs: there may be any number of tokens before that.
            self._source.pause()
            return False
        data = self._shape.chunk(index, piece)
        if data:
            # The response's own `write` does the same in an awaitable, with a count of bytes for its back-pressure.
            transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data)
        return True

    async def write(self, pieces: Iterable[tuple[int, Piece]]) -> None:
        """Write pieces, and wait for the client where too much is unsent. Raises as `settle` does."""
        async for chunks in self._slices.each(self._shape.chunk(index, piece) for index, piece in pieces):
            await self.push(b"".join(chunks))
            if self.unsent_bytes > PAUSE_BYTES:
                self._source.pause()
                await self.settle(GO_ON_BYTES)
        if self._transport is None:
            await self.push(b"")
        self._source.go_on()

    async def push(self, data: bytes) -> None:
        """Write events whatever is unsent; never waits for the client.

        Raises:
            ConnectionError: the client is gone.
        """
        if self._transport is None:
            assert self._writer is not None, "it has begun"
            # Whoever reads slowly is for `settle` to see.
            await self._writer.write(data, drain=False)
            self._transport = self._outlet.transport
        elif data:
            self._outlet.write(b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data)

    async def settle(self, max_unsent_bytes: int) -> None:
        """Wait until the client has read on. Cancel-safe; raises as `Outlet.settle` does."""
        await self._outlet.settle(max_unsent_bytes)

    async def finish(self, data: bytes) -> None:
        """Write the last events and wait until all is sent. Raises as `settle` does."""
        if self.unsent_bytes == 0 and len(data) <= KERNEL_UNSENT_BYTES:
            # It would wait for the client, unwatched, only beyond the mark of the transport.
            await self.response.write_eof(data)
        else:
            await self.push(data)
        await self._outlet.finish()

    def cut(self) -> None:
        """End the connection at once."""
        self._outlet.cut()
