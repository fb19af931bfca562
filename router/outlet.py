"""The open end of a connection: one answer goes out by it while its client reads.

    open ─► write ─► settle ─► write ─► ... ─► settle(0) ─► closed
                       │  └─ nothing was read for `stall_s` ─► TimeoutError: cut it
                       └─ what all wait with is too much ─► CUT: whose client has been silent for longest

1. Everything that is said to clients over HTTP goes through one: streams, whole answers, errors. 2. Whoever writes
settles before it writes more than a little, and at the end: what is unsent later has nobody who watches it. 3. The
kernel keeps little more than what is on its way (TCP_NOTSENT_LOWAT), so that what is unsent is seen here, and that a
slow reader is seen to read. 4. `Unread` adds up what outlets wait with, what they are going to write included.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from contextlib import suppress
from typing import Final

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

log = logging.getLogger(__name__)

GO_ON_BYTES: Final = 64 << 10
KERNEL_UNSENT_BYTES: Final = 16 << 10
NUM_STALL_CHECKS: Final = 8
# Who reads more slowly, over the time in which it must read, reads to hold what is there for it.
LEAST_BYTES_PER_S: Final = 512


class Unread:
    """What is held for clients that do not read, of all connections of a router.

    Args:
        max_bytes: beyond it, connections are cut, first those whose clients have been silent for longest.
        stall_s: how long a client may read nothing of what is there for it.
    """

    def __init__(self, max_bytes: int, stall_s: float) -> None:
        self.stall_s = stall_s
        self.num_bytes = self.num_cut = 0
        self._max_bytes = max_bytes
        self._waiting: dict[Outlet, int] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def hold(self, outlet: Outlet, num_bytes: int) -> None:
        """Note what an outlet waits with now."""
        self.num_bytes += num_bytes - self._waiting.get(outlet, 0)
        self._waiting[outlet] = num_bytes
        while self.num_bytes > self._max_bytes and self._waiting:
            silent = min(self._waiting, key=lambda one: one.silent_since_s)
            log.warning("answers of %d bytes are unread: the longest silent client is cut", self.num_bytes)
            self.num_cut += 1
            self.release(silent)
            silent.cut()

    def release(self, outlet: Outlet) -> None:
        """Forget an outlet that waits no longer; idempotent."""
        self.num_bytes -= self._waiting.pop(outlet, 0)


class Outlet:
    """Writes to one client. Used by its handler."""

    def __init__(self, request: web.Request, response: web.StreamResponse, unread: Unread) -> None:
        self.response = response
        self.silent_since_s = 0.0
        self._request = request
        self._unread = unread
        self._writer: AbstractStreamWriter | None = None
        self.transport: asyncio.WriteTransport | None = None

    @property
    def unsent_bytes(self) -> int:
        """Bytes that the kernel has not taken yet; 0 before the head is sent."""
        return 0 if self.transport is None else self.transport.get_write_buffer_size()

    def open(self, writer: AbstractStreamWriter) -> None:
        """Begin with the writer of a prepared response."""
        self._writer = writer
        self.transport = self._request.transport
        if self.transport is not None:
            connection = self.transport.get_extra_info("socket")
            # Without it, everything works the same, with more of it in the kernel.
            with suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, KERNEL_UNSENT_BYTES)

    def write(self, data: bytes | memoryview) -> None:
        """Write, whatever is unsent.

        Raises:
            ConnectionError: the client is gone.
        """
        self._open_transport().write(data)

    async def settle(self, max_unsent_bytes: int, num_more_bytes: int = 0) -> None:
        """Wait until the client has read on. Cancel-safe; nothing may be written meanwhile.

        Args:
            max_unsent_bytes: so many may still be unsent then.
            num_more_bytes: to be written later, and held until then.

        Raises:
            ConnectionError: the client is gone, or was cut.
            TimeoutError: it has read nothing, or less than LEAST_BYTES_PER_S, for `stall_s`; cut it.
        """
        transport, loop = self._open_transport(), asyncio.get_running_loop()
        # The transport ends the drain at this mark.
        transport.set_write_buffer_limits(max_unsent_bytes, max_unsent_bytes)
        least_bytes, self.silent_since_s = transport.get_write_buffer_size(), loop.time()
        if least_bytes <= max_unsent_bytes:
            return
        assert self._writer is not None
        # A task: whoever is cancelled in a drain takes all later drains of that connection with it.
        drained = loop.create_task(self._writer.drain())
        # What breaks it while we are cancelled has been seen, too.
        drained.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            self._unread.hold(self, least_bytes + num_more_bytes)
            while not (await asyncio.wait({drained}, timeout=self._unread.stall_s / NUM_STALL_CHECKS))[0]:
                num_read, now_s = least_bytes - self._open_transport().get_write_buffer_size(), loop.time()
                if num_read > LEAST_BYTES_PER_S * self._unread.stall_s:
                    least_bytes, self.silent_since_s = least_bytes - num_read, now_s
                    self._unread.hold(self, least_bytes + num_more_bytes)
                elif now_s - self.silent_since_s >= self._unread.stall_s:
                    what = f"only {num_read} bytes" if num_read else "nothing"
                    raise TimeoutError(f"its client has read {what} for {self._unread.stall_s:g} s")
            drained.result()
        finally:
            drained.cancel()
            self._unread.release(self)

    async def finish(self) -> None:
        """Wait until all is sent. Raises as `settle` does."""
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
        transport = self.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the connection is closed")
        return transport
