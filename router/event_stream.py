"""The open end of one streamed answer: events go straight to the socket while its client reads.

    DIRECT ── more than PAUSE_BYTES unsent, or the socket is closing ──► FULL
       ▲                                                                   │ generation is paused at once, its blocks
       │                                                                   │ go back; the handler waits in `settle`
       ├──────────────── at most GO_ON_BYTES unsent ◄──────────────────────┤
       │                                                                   │
       └─ finish ► all is sent                 CUT ◄── nothing was read for `stall_s`, also after the last event

1. `begin` sends the head of the response. 2. `offer` is called for each piece where it arises: no task wakes up and no
timer is set for a token. 3. A client that does not read holds up its own stream, and nobody else.

What is held for a client is bounded: between PAUSE_BYTES and LIMIT_BYTES is room for what was on its way already;
only single events that are larger than that (a long prompt echoed) go beyond. The kernel keeps little more than
what is on its way (TCP_NOTSENT_LOWAT), so that what is unsent is seen here, and that a slow reader is seen to read.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from router.shape import Shape
from router.switchboard import Session
from router.text import Piece

PAUSE_BYTES: Final = 192 << 10
GO_ON_BYTES: Final = 64 << 10
LIMIT_BYTES: Final = 256 << 10
KERNEL_UNSENT_BYTES: Final = 16 << 10
NUM_STALL_CHECKS: Final = 8
# Without the charset there are clients that read Latin-1.
EVENT_HEADERS: Final = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}


class EventStream:
    """Writes the events of one answer. Used by its handler, and by the session while the handler waits.

    Args:
        shape: shapes what is offered and written; events that are pushed are bytes already.
        session: paused while its client does not read what is offered and written.
        stall_s: how long a client may read nothing of what is there for it.
    """

    def __init__(self, request: web.Request, shape: Shape, session: Session, stall_s: float) -> None:
        self.response = web.StreamResponse(headers=EVENT_HEADERS)
        self._request = request
        self._shape = shape
        self._session = session
        self._stall_s = stall_s
        self._transport: asyncio.WriteTransport | None = None
        self._writer: AbstractStreamWriter | None = None
        self._is_chunked = False

    @property
    def unsent_bytes(self) -> int:
        """Bytes that the kernel has not taken yet; 0 before the head is sent."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    async def begin(self) -> None:
        """Send the head of the response."""
        self._writer = await self.response.prepare(self._request)
        assert self._writer is not None, "nothing was sent yet"
        self._is_chunked = self.response.headers.get("Transfer-Encoding") == "chunked"
        self._writer.send_headers()
        self._transport = self._request.transport
        if self._transport is not None:
            connection = self._transport.get_extra_info("socket")
            # Without it, everything works the same, with more of it in the kernel.
            with suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, KERNEL_UNSENT_BYTES)

    def offer(self, index: int, piece: Piece) -> bool:
        """Write a piece at once; False if the client has to be waited for, or is gone: then nothing was done."""
        transport = self._transport
        if transport is None or transport.is_closing() or transport.get_write_buffer_size() > PAUSE_BYTES:
            # Now, not when the handler runs: there may be any number of tokens before that.
            self._session.pause()
            return False
        data = self._shape.chunk(index, piece)
        if data:
            # The response's own `write` does the same in an awaitable, with a count of bytes for its back-pressure.
            transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data)
        return True

    async def write(self, pieces: Iterable[tuple[int, Piece]]) -> None:
        """Write pieces, and wait for the client where too much is unsent. Raises as `settle` does."""
        self.push(b"".join(self._shape.chunk(index, piece) for index, piece in pieces))
        if self.unsent_bytes > PAUSE_BYTES:
            self._session.pause()
            await self.settle(GO_ON_BYTES)
        self._session.go_on()

    def push(self, data: bytes) -> None:
        """Write events whatever is unsent.

        Raises:
            ConnectionError: the client is gone.
        """
        transport = self._open_transport()
        if data:
            transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data)

    async def settle(self, max_unsent_bytes: int) -> None:
        """Wait until the client has read on. Cancel-safe; nothing may be written meanwhile.

        Raises:
            ConnectionError: the client is gone.
            TimeoutError: it has read nothing for `stall_s`; cut it.
        """
        transport, loop = self._open_transport(), asyncio.get_running_loop()
        # The transport ends the drain at this mark.
        transport.set_write_buffer_limits(max_unsent_bytes, max_unsent_bytes)
        least_bytes, since_s = transport.get_write_buffer_size(), loop.time()
        if least_bytes <= max_unsent_bytes:
            return
        assert self._writer is not None
        # A task: whoever is cancelled in a drain takes all later drains of that connection with it.
        drained = loop.create_task(self._writer.drain())
        # What breaks it while we are cancelled has been seen, too.
        drained.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            while not (await asyncio.wait({drained}, timeout=self._stall_s / NUM_STALL_CHECKS))[0]:
                unsent_bytes, now_s = self._open_transport().get_write_buffer_size(), loop.time()
                if unsent_bytes < least_bytes:
                    least_bytes, since_s = unsent_bytes, now_s
                elif now_s - since_s >= self._stall_s:
                    raise TimeoutError(f"its client has read nothing for {self._stall_s:g} s")
            drained.result()
        finally:
            drained.cancel()

    async def finish(self, data: bytes) -> None:
        """Write the last events and wait until all is sent: what is unsent has nobody who watches it later.

        Raises as `settle` does.
        """
        self.push(data)
        await self.settle(0)
        # The connection may bring another request.
        self._open_transport().set_write_buffer_limits()

    def cut(self) -> None:
        """End the connection at once; what is unsent is dropped, by the kernel too: it would wait for a reader."""
        self.response.force_close()
        transport = self._request.transport
        if transport is not None:
            with suppress(OSError):
                no_linger = struct.pack("ii", 1, 0)
                transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
            transport.abort()

    def _open_transport(self) -> asyncio.WriteTransport:
        transport = self._transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the connection is closed")
        return transport
