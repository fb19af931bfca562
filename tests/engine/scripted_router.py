"""A router for tests of workers: speaks the real control wire on a real WebSocket, and does what the test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web

from protocol.channel import Channel, accept
from protocol.errors import PeerLost, ProtocolError
from protocol.wire import AnyMessage, Message, Welcome

SECRET = b"s" * 32


class ScriptedRouter:
    """Accepts workers, answers their registration, and keeps what they say."""

    def __init__(self, secret: bytes = SECRET, welcome: Message | None = None) -> None:
        self.secret = secret
        self.welcome = welcome or Welcome(router_id="r0", heartbeat_s=0.05, lease_ttl_s=0.4)
        self.channels: list[Channel] = []
        self.received: list[AnyMessage] = []
        self.url = ""
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/control", self._serve)
        self._runner = web.AppRunner(app, shutdown_timeout=0.2)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        for channel in self.channels:
            channel.abort("test over")
        assert self._runner is not None
        await self._runner.cleanup()

    async def until(self, condition: Callable[[AnyMessage], bool]) -> AnyMessage:
        """Wait for a message that fits."""
        async with asyncio.timeout(5):
            while True:
                for message in self.received:
                    if condition(message):
                        return message
                await asyncio.sleep(0.01)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        try:
            channel = await accept(request, self.secret, "control")
            self.received.append(await channel.receive())
            channel.post(self.welcome)
            self.channels.append(channel)
            while True:
                self.received.append(await channel.receive())
        except (PeerLost, ProtocolError):
            return web.Response()
