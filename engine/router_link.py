"""A worker's conversation with one router.

    dial ─► Register ─► Welcome ─► { heartbeats out, placements and pulses in } ─► lost ─► dial again
                  └──► Dismissed(is_final) or wrong secret: the worker ends with a clear error

Every connection is a new holder of leases: what an earlier connection placed is never renewed again and runs out, since
the router has given those placements up as well.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from typing import Protocol

import aiohttp

from protocol.channel import Conversation, dial
from protocol.errors import AuthenticationFailed, ConfigError, PeerLost, ProtocolError, VersionMismatch
from protocol.lease import LeaseTable
from protocol.local_channel import SCHEME, dial_local
from protocol.wire import (
    Abort,
    AnyMessage,
    Dismissed,
    Drain,
    Heartbeat,
    Members,
    Message,
    Prefill,
    Pulse,
    Register,
    Reserve,
    Welcome,
)

log = logging.getLogger(__name__)

WELCOME_BUDGET_S = 5.0
FIRST_RETRY_S = 0.05
# A router whose cable was cut is dialled anew before TCP gives up; its leases have run out by then.
NUM_SILENT_TTLS = 2.0


class LinkOwner(Protocol):
    """What a link tells the worker service; called on the event loop."""

    def on_connected(self, link: RouterLink) -> None:
        """Registration was accepted on a fresh connection."""

    def on_message(self, link: RouterLink, message: Prefill | Reserve | Abort | Members | Drain) -> None:
        """Take one message of the router."""

    def on_fatal(self, error: Exception) -> None:
        """This worker can never work with that router as configured."""

    def heartbeat(self) -> Heartbeat:
        """Return the current heartbeat."""


class RouterLink:
    """Keeps one worker registered with one router.

    Args:
        url: `http://host:port` of the router's control port, or the `inproc` URL of a router in this process.
        register: makes the registration.
        max_retry_s: longest pause between two attempts.
    """

    def __init__(
        self, url: str, secret: bytes, owner: LinkOwner, register: Callable[[], Register], max_retry_s: float
    ) -> None:
        self.url = url
        self.connection = 0
        self._secret = secret
        self._owner = owner
        self._register = register
        self._max_retry_s = max_retry_s
        self._channel: Conversation | None = None
        self._leases: LeaseTable | None = None

    def post(self, message: Message, connection: int | None = None) -> None:
        """Send a message; dropped when not connected, or when meant for an earlier connection."""
        if self._channel is not None and connection in (None, self.connection):
            self._channel.post(message)

    def hold(self, transfer_id: int) -> None:
        """Grant the current connection a lease on what it placed."""
        if self._leases is not None:
            self._leases.grant(transfer_id, str(self.connection), time.monotonic())

    def release(self, transfer_id: int) -> None:
        """End a lease; idempotent."""
        if self._leases is not None:
            self._leases.release(transfer_id)

    def expired(self) -> list[int]:
        """Return and forget the transfers whose lease ran out."""
        return [] if self._leases is None else self._leases.expire(time.monotonic())

    async def run(self) -> None:
        """Stay connected until cancelled or a fatal error is reported."""
        pause_s, announced = FIRST_RETRY_S, False
        async with aiohttp.ClientSession() as session:
            while True:
                try:
                    channel = await self._dial(session)
                    pause_s, announced = FIRST_RETRY_S, False
                    await self._converse(channel)
                except (AuthenticationFailed, VersionMismatch, ConfigError) as error:
                    self._owner.on_fatal(error)
                    return
                except (PeerLost, ProtocolError) as error:
                    log.log(logging.DEBUG if announced else logging.INFO, "router %s: %s", self.url, error)
                    announced = True
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(2 * pause_s, self._max_retry_s)

    async def _dial(self, session: aiohttp.ClientSession) -> Conversation:
        if self.url.startswith(SCHEME):
            return dial_local(self.url)
        return await dial(session, f"{self.url}/control", self._secret, "control")

    async def close(self) -> None:
        """Flush and close the current connection."""
        if self._channel is not None:
            await self._channel.close()

    async def _converse(self, channel: Conversation) -> None:
        beat: asyncio.Task[None] | None = None
        try:
            channel.post(self._register())
            welcome = await _next(channel, WELCOME_BUDGET_S, "no Welcome in time")
            self._check_welcome(welcome)
            assert isinstance(welcome, Welcome)
            self._enter(channel, welcome)
            beat = asyncio.create_task(self._beat(channel, welcome.heartbeat_s))
            silence_s = NUM_SILENT_TTLS * welcome.lease_ttl_s
            while True:
                self._dispatch(await _next(channel, silence_s, f"the router was silent for {silence_s:g} s"))
        finally:
            if beat is not None:
                beat.cancel()
            self._channel = None
            channel.abort("conversation ended")

    def _check_welcome(self, message: AnyMessage) -> None:
        if isinstance(message, Dismissed):
            if message.is_final:
                raise ConfigError(f"router {self.url} refuses this worker: {message.reason}")
            raise PeerLost(f"dismissed: {message.reason}")
        if not isinstance(message, Welcome):
            raise ProtocolError(f"expected Welcome, got {type(message).__name__}")

    def _enter(self, channel: Conversation, welcome: Welcome) -> None:
        self.connection += 1
        self._channel = channel
        if self._leases is None:
            self._leases = LeaseTable(welcome.lease_ttl_s)
        self._leases.ttl_s = welcome.lease_ttl_s
        log.info("registered with router %s", welcome.router_id)
        self._owner.on_connected(self)

    def _dispatch(self, message: AnyMessage) -> None:
        if isinstance(message, Pulse):
            if self._leases is not None:
                self._leases.renew(str(self.connection), time.monotonic())
        elif isinstance(message, Dismissed):
            self._check_welcome(message)
        elif isinstance(message, Prefill | Reserve | Abort | Members | Drain):
            self._owner.on_message(self, message)
        else:
            raise ProtocolError(f"a router may not send {type(message).__name__}")

    async def _beat(self, channel: Conversation, interval_s: float) -> None:
        while True:
            channel.post(self._owner.heartbeat())
            await asyncio.sleep(interval_s)


async def _next(channel: Conversation, budget_s: float, reason: str) -> AnyMessage:
    """Return the next message, or raise PeerLost with this reason when there is none in time."""
    try:
        async with asyncio.timeout(budget_s):
            return await channel.receive()
    except TimeoutError as error:
        raise PeerLost(reason) from error
