"""What a transport promises: listeners, and endpoints that carry ordered messages and tagged payload.

    listen() ──► Listener ──► on_endpoint(Endpoint)          (prefill worker)
    dial()   ───────────────► Endpoint                       (decode worker)

    Endpoint:  OPEN ──abort(), close(), peer gone, malformed message──► LOST (for good; dial again)

An endpoint that exists has passed everything: the secret, the fingerprints, and on UCX a payload round trip. Messages
and payload travel on separate paths, so a message never waits behind payload, and neither path orders the other.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protocol.errors import BatonError, FingerprintMismatch, ProtocolError
from protocol.kv_layout import KVFingerprint
from protocol.wire import PeerAddress, PeerHello, PeerMessage, PeerReady

Buffer = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a worker is to its peers. `instance` is new at every start of its process."""

    worker_id: str
    instance: int
    fingerprint: KVFingerprint


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

    @property
    @abstractmethod
    def lost(self) -> asyncio.Future[str]:
        """Future that resolves to the reason when the connection is over; never cancel it."""

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
            FingerprintMismatch: the models or layouts differ; the acceptor says the same in its log.
            ProtocolError: another worker or instance answers at this address.
        """

    @abstractmethod
    async def close(self) -> None:
        """End every listener and endpoint and return once all buffers are free."""


def check_hello(identity: Identity, hello: PeerHello) -> str | None:
    """Compare fingerprints on the accepting side; return the refusal as the dialer should read it, or None."""
    try:
        hello.fingerprint.require_equal(identity.fingerprint, f"worker {identity.worker_id}")
    except FingerprintMismatch as mismatch:
        return str(mismatch)
    return None


def check_ready(address: PeerAddress, ready: PeerReady) -> None:
    """Verify on the dialing side that the one who answers is the one dialled.

    Raises:
        ProtocolError: it is another worker, or another start of it.
    """
    if (ready.worker_id, ready.instance) != (address.worker_id, address.instance):
        raise ProtocolError(
            f"dialled worker {address.worker_id} instance {address.instance}, "
            f"but {ready.worker_id} instance {ready.instance} answers there"
        )
