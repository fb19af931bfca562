"""A channel inside one process: the messages themselves go over, nothing is encoded and nothing is proved.

    listen(url) ◄── dial_local(url)          both on one event loop
       │ accept(channel)   │
       └──── LocalChannel ─┘  post ─► the other end's inbox ─► receive

1. Who listens under a URL of the scheme `inproc` gets one end of each conversation, who dials it the other.
2. `close` lets the other end read what was posted before it; `abort` drops that, on both ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, cast

from protocol.errors import PeerLost
from protocol.wire import AnyMessage, Message

SCHEME: Final = "inproc://"
MAX_QUEUED_MESSAGES: Final = 1 << 17


class LocalChannel:
    """One end of a conversation. Made in pairs by `local_pair`; used on one event loop, and read by one reader."""

    def __init__(self) -> None:
        self._inbox: asyncio.Queue[AnyMessage | None] = asyncio.Queue()
        self._peer: LocalChannel | None = None
        self._reason: str | None = None

    @property
    def is_lost(self) -> bool:
        """Whether the conversation is over."""
        return self._reason is not None

    def post(self, message: Message) -> None:
        """Hand a message to the other end; dropped if the conversation is over. Never blocks."""
        peer = self._peer
        if self.is_lost or peer is None:
            return
        if peer._inbox.qsize() >= MAX_QUEUED_MESSAGES:
            self.abort(f"peer does not read: {peer._inbox.qsize()} messages queued")
            return
        peer._inbox.put_nowait(cast(AnyMessage, message))

    async def receive(self) -> AnyMessage:
        """Return the next message. Cancel-safe.

        Raises:
            PeerLost: the conversation is over.
        """
        if self.is_lost and self._inbox.empty():
            raise PeerLost(self._reason or "")
        message = await self._inbox.get()
        if message is None:
            self._reason = self._reason or "closed by peer"
            raise PeerLost(self._reason)
        return message

    async def close(self) -> None:
        """End the conversation; the other end still reads what was posted."""
        if not self.is_lost:
            self._reason = "closed here"
            self._inbox.put_nowait(None)
            if self._peer is not None:
                self._peer._inbox.put_nowait(None)

    def abort(self, reason: str) -> None:
        """End the conversation at once, dropping what is queued; idempotent."""
        for end, why in ((self, reason), (self._peer, f"closed by peer: {reason}")):
            if end is not None and not end.is_lost:
                end._reason = why
                while not end._inbox.empty():
                    end._inbox.get_nowait()
                end._inbox.put_nowait(None)


Acceptor = Callable[[LocalChannel], None]
"""Takes the accepting end of a new conversation."""

_acceptors: dict[str, Acceptor] = {}


def local_pair() -> tuple[LocalChannel, LocalChannel]:
    """Return the two ends of a new conversation."""
    one, other = LocalChannel(), LocalChannel()
    one._peer, other._peer = other, one
    return one, other


def listen(url: str, accept: Acceptor) -> Callable[[], None]:
    """Let `accept` take conversations that are dialled under a URL of this process; return what ends that."""
    assert url.startswith(SCHEME) and url not in _acceptors
    _acceptors[url] = accept
    return lambda: _acceptors.pop(url, None) and None


def dial_local(url: str) -> LocalChannel:
    """Begin a conversation with who listens under `url`.

    Raises:
        PeerLost: nobody does.
    """
    accept = _acceptors.get(url)
    if accept is None:
        raise PeerLost(f"nobody listens under {url}")
    ours, theirs = local_pair()
    accept(theirs)
    return ours
