"""What a transport promises: listeners, and endpoints that carry ordered messages and tagged payload.

    listen() ──► Listener ──► on_endpoint(Endpoint)          (prefill worker)
    dial()   ───────────────► Endpoint                       (decode worker)

    Endpoint:  OPEN ──abort(), close(), peer gone, malformed message──► LOST (for good; dial again)

An endpoint that exists has passed everything: the secret, the fingerprints, the agreement on memory and checksum, and
on UCX a payload round trip. Messages and payload travel on separate paths, so a message never waits behind payload,
and neither path orders the other.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from kvtransfer.config import TransferConfig
from kvtransfer.slots import SlotStore
from protocol.errors import BatonError
from protocol.kv_layout import HostSlots, KVFingerprint, SlotBuffer, SlotKind
from protocol.wire import PeerAddress, PeerMessage

Buffer = SlotBuffer


def _host_slots() -> SlotStore:
    return SlotStore(HostSlots(), TransferConfig(kv_staging="host", slot_bytes=1 << 16))


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a worker is to its peers.

    Attributes:
        instance: new at every start of its process.
        slots: what its side of transfers sends from and receives into: a SendSide's `slot_store`; a ReceiveSide puts
            its own here. Without it they are small ones in host memory, which serve the self-test and nobody else.
    """

    worker_id: str
    instance: int
    fingerprint: KVFingerprint
    slots: SlotStore = field(default_factory=_host_slots, compare=False)


@dataclass(frozen=True, slots=True)
class Agreement:
    """What the two ends of a connection settled on.

    Attributes:
        kind: the memory that this end's slots lie in.
        checksum: the algorithm of every piece's checksum.
    """

    kind: SlotKind
    checksum: str


class Completion(asyncio.Future[None]):
    """Done when the transport is finished with a buffer; fails with TransferError, also only then.

    It cannot be cancelled: a cancelled waiter gets its CancelledError once the buffer is free. Nothing ever "stops
    waiting" and frees memory that the network still writes.
    """

    def cancel(self, msg: object | None = None) -> bool:
        """Refuse: the buffer is still in use."""
        return False

    def finish(self, error: BatonError | None = None) -> None:
        """Resolve, if not yet; an error that nobody awaits is not reported twice."""
        if self.done():
            return
        if error is None:
            self.set_result(None)
        else:
            self.set_exception(error)
            self.exception()


class Endpoint(ABC):
    """One authenticated connection between two workers. Used on one event loop, by one reader."""

    peer_id: str
    peer_instance: int
    agreement: Agreement

    @property
    @abstractmethod
    def lost(self) -> asyncio.Future[str]:
        """Future that resolves to the reason when the connection is over; never cancel it.

        That the peer is gone shows while somebody receives, and only then for certain.
        """

    @abstractmethod
    def post(self, message: PeerMessage) -> None:
        """Queue a message in order; dropped if the connection is over. Never blocks."""

    @abstractmethod
    async def receive(self) -> PeerMessage:
        """Return the next message. Cancel-safe.

        Raises:
            PeerLost: the connection is over.
            ProtocolError: malformed message; the endpoint is aborted.
        """

    @abstractmethod
    def post_receive(self, buffer: Buffer, tag: int) -> Completion:
        """Receive one payload sent under `tag`, at most as long as `buffer`, which is in use until completion."""

    @abstractmethod
    def send(self, buffer: Buffer, tag: int) -> Completion:
        """Send `buffer`, which must not change until completion. Completion does not mean arrival."""

    @abstractmethod
    def abort(self, reason: str) -> None:
        """End the connection at once; idempotent. Every pending completion fails soon after."""

    @abstractmethod
    async def close(self) -> None:
        """Send what messages are queued, then end the connection. Payload in flight is cut."""


class Listener(ABC):
    """Accepts endpoints until closed."""

    address: PeerAddress

    @abstractmethod
    async def close(self) -> None:
        """Stop accepting and end every endpoint that came from here."""


class Transport(ABC):
    """A way to move blocks. One object per worker, used on one event loop."""

    name: str

    @abstractmethod
    async def listen(self, identity: Identity, on_endpoint: Callable[[Endpoint], None]) -> Listener:
        """Accept peers; `on_endpoint` is called on the event loop with each one that passed the handshake."""

    @abstractmethod
    async def dial(self, address: PeerAddress, identity: Identity) -> Endpoint:
        """Connect to a listener. Cancel-safe: nothing is left open.

        Raises:
            PeerLost: nobody answers there, or not within `connect_s`.
            AuthenticationFailed: the secrets differ.
            FingerprintMismatch: the models or layouts differ, or no checksum is known to both ends; the acceptor says
                the same in its log.
            ProtocolError: another worker or instance answers at this address.
        """

    @abstractmethod
    async def close(self) -> None:
        """End every listener and endpoint and return once all buffers are free."""
