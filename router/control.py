"""The control port: where workers register, report and get their orders.

    accept (secret proved) ─► Register ─┬─► Dismissed, closed
                                        └─► Welcome, Members ─► { messages in, orders and pulses out } ─► lost

1. The first message must be `Register`, in time. 2. Whatever comes then goes to the switchboard, in order. 3. However
the conversation ends, this instance of the worker is given up, unless it has connected again meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import Final, get_args

from aiohttp import web

from protocol.channel import Conversation, accept
from protocol.door import Hearsay
from protocol.errors import BatonError, PeerLost, ProtocolError
from protocol.local_channel import LocalChannel
from protocol.wire import Dismissed, Register, Welcome, WorkerMessage
from router.config import RouterConfig
from router.members import Refusal, WorkerKey
from router.switchboard import Switchboard

log = logging.getLogger(__name__)

REGISTER_BUDGET_S: Final = 5.0
TICK_S: Final = 0.05
_WORKER_MESSAGES: Final = get_args(WorkerMessage)


class ControlServer:
    """Speaks with every worker."""

    def __init__(self, config: RouterConfig, switchboard: Switchboard) -> None:
        self._config = config
        self._switchboard = switchboard
        self.router_id = secrets.token_hex(8)
        self._hearsay = Hearsay(log)
        self._local: set[asyncio.Task[None]] = set()

    def app(self) -> web.Application:
        """Return the aiohttp application of the control port."""
        app = web.Application()
        app.router.add_get("/control", self._serve)
        return app

    def attach(self, channel: LocalChannel) -> None:
        """Speak with a worker of this process, until it or `detach` ends the conversation."""
        task = asyncio.create_task(self._converse_to_the_end(channel, "this process"))
        self._local.add(task)
        task.add_done_callback(self._local.discard)

    async def detach(self) -> None:
        """End what is left of conversations with workers of this process."""
        for task in list(self._local):
            task.cancel()
        await asyncio.gather(*self._local, return_exceptions=True)

    async def keep_time(self) -> None:
        """Pulse and tick until cancelled."""
        loop = asyncio.get_running_loop()
        pulse_s = loop.time()
        while True:
            if loop.time() >= pulse_s:
                self._switchboard.pulse()
                pulse_s = loop.time() + self._config.heartbeat_s
            self._switchboard.tick()
            await asyncio.sleep(TICK_S)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        try:
            channel = await accept(request, self._config.secret, "control")
        except BatonError as error:
            self._hearsay.warn("refused a connection from %s: %s", request.remote, error)
            return web.Response(status=403)
        await self._converse_to_the_end(channel, request.remote)
        return await channel.served()

    async def _converse_to_the_end(self, channel: Conversation, peer: str | None) -> None:
        try:
            await self._converse(channel)
        except (PeerLost, ProtocolError) as error:
            log.debug("connection from %s ended: %s", peer, error)
        finally:
            # After `close` there is nothing left to abort.
            channel.abort("conversation ended")

    async def _converse(self, channel: Conversation) -> None:
        try:
            async with asyncio.timeout(REGISTER_BUDGET_S):
                registration = await channel.receive()
        except TimeoutError as error:
            raise ProtocolError("no Register in time") from error
        if not isinstance(registration, Register):
            raise ProtocolError(f"expected Register, got {type(registration).__name__}")
        result = self._switchboard.register(registration, channel)
        if isinstance(result, Refusal):
            log.warning("worker %s is refused: %s", registration.worker_id, result.reason)
            channel.post(Dismissed(reason=result.reason[:4000], is_final=result.is_final))
            await channel.close()
            return
        reason = "its connection was cut"
        try:
            config = self._config
            channel.post(
                Welcome(router_id=self.router_id, heartbeat_s=config.heartbeat_s, lease_ttl_s=config.lease_ttl_s)
            )
            self._switchboard.welcomed(result)
            await self._listen(result.key, channel)
        except (PeerLost, ProtocolError) as error:
            reason = str(error)
            raise
        except asyncio.CancelledError:
            if isinstance(channel, LocalChannel):
                # Nobody cut it: the event loop that router and worker share is being ended.
                self._switchboard.is_draining = True
            raise
        finally:
            if self._switchboard.owns(result.key, channel):
                self._switchboard.lose(result.key, reason)

    async def _listen(self, key: WorkerKey, channel: Conversation) -> None:
        while True:
            message = await channel.receive()
            if not isinstance(message, _WORKER_MESSAGES):
                raise ProtocolError(f"a worker may not send {type(message).__name__}")
            self._switchboard.take(key, message)
