"""The transport inside one process, for workers whose pools are apart. Payload is one copy, buffer to buffer; between
host and device memory, one through the host.

    listen() ─ puts its identity into the transport's table
    dial()   ─ looks it up, compares, makes two endpoints that point at each other

Both sides share one InprocTransport object and one event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from kvtransfer.agreement import check_hello, check_ready, hello_of, ready_of
from kvtransfer.transport import Agreement, Buffer, Completion, Endpoint, Identity, Listener, Transport
from protocol.errors import FingerprintMismatch, PeerLost, TransferError
from protocol.kv_layout import SlotMemory
from protocol.wire import PeerAddress, PeerMessage

log = logging.getLogger(__name__)


class InprocEndpoint(Endpoint):
    """One of two ends that point at each other."""

    def __init__(self, peer_id: str, peer_instance: int, agreement: Agreement, memory: SlotMemory) -> None:
        self.peer_id = peer_id
        self.peer_instance = peer_instance
        self.agreement = agreement
        self._memory = memory
        self.other: InprocEndpoint = self
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._inbox: asyncio.Queue[PeerMessage | None] = asyncio.Queue()
        self._receives: dict[int, tuple[Buffer, Completion]] = {}
        self._unmatched: dict[int, tuple[Buffer, Completion]] = {}  # sent here before a receive was posted

    @property
    def lost(self) -> asyncio.Future[str]:
        """Future with the reason."""
        return self._lost

    def post(self, message: PeerMessage) -> None:
        """Queue a message at the other end."""
        if not self._lost.done():
            self.other._inbox.put_nowait(message)

    async def receive(self) -> PeerMessage:
        """Return the next message; what was posted before the end is still delivered."""
        message = await self._inbox.get()
        if message is None:
            self._inbox.put_nowait(None)
            raise PeerLost(self._lost.result() if self._lost.done() else "closed by peer")
        return message

    def post_receive(self, buffer: Buffer, tag: int) -> Completion:
        """Offer a buffer for one payload."""
        done = Completion()
        if self._lost.done():
            done.finish(PeerLost(self._lost.result()))
        elif (sent := self._unmatched.pop(tag, None)) is not None:
            self._take(sent, (buffer, done))
        else:
            assert tag not in self._receives, "two receives under one tag"
            self._receives[tag] = (buffer, done)
        return done

    def send(self, buffer: Buffer, tag: int) -> Completion:
        """Copy into the receive posted at the other end, now or when it is posted."""
        done = Completion()
        if self._lost.done():
            done.finish(PeerLost(self._lost.result()))
        elif (posted := self.other._receives.pop(tag, None)) is not None:
            self.other._take((buffer, done), posted)
        else:
            self.other._unmatched[tag] = (buffer, done)
        return done

    def abort(self, reason: str) -> None:
        """End both ends."""
        if self._lost.done():
            return
        self._end(reason)
        self.other._end(f"closed by peer: {reason}")

    async def close(self) -> None:
        """End both ends; messages are delivered already."""
        self.abort("closed")

    def _take(self, sent: tuple[Buffer, Completion], posted: tuple[Buffer, Completion]) -> None:
        """Copy what the other end sent into what was posted here."""
        (source, sent_done), (target, received) = sent, posted
        sent_done.finish()
        if source.nbytes > target.nbytes:
            received.finish(TransferError(f"payload of {source.nbytes} bytes for a receive of {target.nbytes}"))
            return
        if self.other.agreement.kind not in ("host", self.agreement.kind):
            source = self.other._memory.read(source)
        self._memory.write(target[: source.nbytes], source)
        received.finish()

    def _end(self, reason: str) -> None:
        if self._lost.done():
            return
        self._lost.set_result(reason)
        for _, done in [*self._receives.values(), *self._unmatched.values()]:
            done.finish(PeerLost(reason))
        self._receives.clear()
        self._unmatched.clear()
        self._inbox.put_nowait(None)


class InprocListener(Listener):
    """An entry in the transport's table."""

    def __init__(self, table: dict[tuple[str, int], InprocListener], identity: Identity) -> None:
        self.address = PeerAddress(worker_id=identity.worker_id, instance=identity.instance, transport="inproc")
        self.identity = identity
        self.endpoints: list[InprocEndpoint] = []
        self._table = table

    async def close(self) -> None:
        """Leave the table and end what came from here."""
        self._table.pop((self.identity.worker_id, self.identity.instance), None)
        for endpoint in self.endpoints:
            endpoint.abort("listener closed")
        self.endpoints.clear()


class InprocTransport(Transport):
    """Transport between parts of one process that share this object."""

    name = "inproc"

    def __init__(self) -> None:
        self._listeners: dict[tuple[str, int], InprocListener] = {}
        self._callbacks: dict[tuple[str, int], Callable[[Endpoint], None]] = {}

    async def listen(self, identity: Identity, on_endpoint: Callable[[Endpoint], None]) -> Listener:
        """Enter the table."""
        key = (identity.worker_id, identity.instance)
        self._callbacks[key] = on_endpoint
        self._listeners[key] = InprocListener(self._listeners, identity)
        return self._listeners[key]

    async def dial(self, address: PeerAddress, identity: Identity) -> Endpoint:
        """Make a pair of endpoints with a listener of the table."""
        key = (address.worker_id, address.instance)
        listener = self._listeners.get(key)
        if listener is None:
            raise PeerLost(f"no worker {address.worker_id} instance {address.instance} in this process")
        there = listener.identity
        hello = hello_of(identity, identity.slots.staging)
        try:
            there_agreed = check_hello(there, there.slots.staging, hello)
        except FingerprintMismatch as refusal:
            log.warning("refused %s: %s", identity.worker_id, refusal)
            raise
        ready = ready_of(there, there.slots.staging, there_agreed.checksum)
        agreed = check_ready(address, identity, hello.staging, ready)
        ours = InprocEndpoint(there.worker_id, there.instance, agreed, identity.slots.memory)
        theirs = InprocEndpoint(identity.worker_id, identity.instance, there_agreed, there.slots.memory)
        ours.other, theirs.other = theirs, ours
        listener.endpoints = [e for e in listener.endpoints if not e.lost.done()]
        listener.endpoints.append(theirs)
        self._callbacks[key](theirs)
        return ours

    async def close(self) -> None:
        """Close every listener."""
        for listener in list(self._listeners.values()):
            await listener.close()
