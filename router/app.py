"""A router process, from start to end.

    load tokenizer ─► listen for workers and clients ─► serve ─SIGINT, SIGTERM─► drain ─► close ─► exit code 0

1. Both ports are open before the first worker is there; /health says 503 and what is missing.
2. Draining: new requests get 503, running ones go on until they finish or `drain_s` is over. A second signal ends it.
3. SIGTERM to a router whose sockets are a supervisor's means that a successor follows: nothing is refused. New
   connections wait in the socket for it; each open one may bring one more request, and is closed with the answer.
4. `reload` takes over keys, origins and limits; what runs goes on.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from aiohttp import web

from protocol.door import GuardedRunner
from protocol.errors import ConfigError
from protocol.local_channel import SCHEME, listen
from router.config import RouterConfig
from router.control import ControlServer
from router.core import Core
from router.doorway import ClientRunner
from router.metrics import Metrics
from router.server import HttpServer
from router.switchboard import Switchboard
from router.tokenizer import Tokenizer

if TYPE_CHECKING:
    from router.grpc_server import GrpcServer

log = logging.getLogger(__name__)

CLOSE_BUDGET_S: Final = 1.0
BACKLOG: Final = 1024


class Router:
    """One router on the running event loop: `start` (or `start_in_process`), `drain`, `close`.

    Args:
        tokenizer: of the model that is served.
    """

    def __init__(self, config: RouterConfig, tokenizer: Tokenizer) -> None:
        metrics = Metrics(config.served_model_names[0])
        self._config = config
        self.switchboard = Switchboard(config, tokenizer, metrics, time.monotonic)
        self._control = ControlServer(config, self.switchboard)
        self.core = Core(config, tokenizer, self.switchboard)
        self._http = HttpServer(config, self.core, metrics)
        self._runners: list[web.AppRunner] = []
        self._is_handing_over = False
        self.clock: asyncio.Task[None] | None = None
        self.http_port = self.control_port = 0
        self._unlisten: Callable[[], None] | None = None
        self._grpc: GrpcServer | None = None

    async def start(self) -> None:
        """Open both ports.

        Raises:
            OSError: a port cannot be had.
        """
        config = self._config
        workers = GuardedRunner(self._control.app(), CLOSE_BUDGET_S, handler_cancellation=True)
        self.control_port = await self._listen(workers, config.control_host, config.control_port, config.control_fd)
        app = self._http.app()
        app.on_response_prepare.append(self._close_after)
        clients = ClientRunner(app, self._http.access_log, config.idle_s, CLOSE_BUDGET_S)
        self.http_port = await self._listen(clients, config.http_host, config.http_port, config.http_fd)
        if config.grpc_port is not None:
            self._grpc = _grpc_server(config, self.core)
            await self._grpc.start()
        self.clock = asyncio.create_task(self._control.keep_time())
        log.info("clients on port %d, workers on port %d", self.http_port, self.control_port)

    def reload(self, config: RouterConfig) -> None:
        """Take over what may change while a router runs, `RELOADED`, and nothing else.

        Raises:
            ConfigError: it cannot be used, and nothing has changed.
        """
        found = self._config.reloaded(config)
        if self._grpc is not None:
            self._grpc.reload(found)
        self._http.reload(found)
        self.core.reload(found)
        self._config = found

    @property
    def grpc_port(self) -> int:
        """The port that gRPC clients connect to; 0 if there is none."""
        return 0 if self._grpc is None else self._grpc.port

    def start_in_process(self) -> str:
        """Open no port: workers of this process attach under the URL returned, and requests come through `core`."""
        url = f"{SCHEME}{self._control.router_id}"
        self._unlisten = listen(url, self._control.attach)
        self.clock = asyncio.create_task(self._control.keep_time())
        return url

    async def drain(self, has_successor: bool = False) -> None:
        """Take nothing new and wait for what runs, at most `drain_s`. Cancel-safe.

        Args:
            has_successor: leave new connections in the socket, which is not ours alone, and refuse nothing.
        """
        log.info("draining %d requests", self.switchboard.num_requests)
        if has_successor:
            self._is_handing_over = True
            await asyncio.gather(*(site.stop() for site in self._runners[-1].sites))
            if self._grpc is not None:
                self._grpc.drain()
        else:
            self.switchboard.is_draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(self._config.drain_s):
                await self.switchboard.idle.wait()

    async def close(self) -> None:
        """Fail what still runs, close clients' connections, then workers'."""
        self.switchboard.is_draining = True
        self.switchboard.abandon()
        if self._grpc is not None:
            await self._grpc.close()
        if self._runners:
            await self._runners.pop().cleanup()
        # Flushes the aborts.
        await self.switchboard.close()
        for runner in self._runners:
            await runner.cleanup()
        if self._unlisten is not None:
            self._unlisten()
            await self._control.detach()
        if self.clock is not None:
            self.clock.cancel()
            with suppress(asyncio.CancelledError):
                await self.clock
        self._http.close()
        await self.core.close()

    async def _close_after(self, _: web.Request, response: web.StreamResponse) -> None:
        if self._is_handing_over:
            response.force_close()

    async def _listen(self, runner: web.AppRunner, host: str, port: int, fd: int | None) -> int:
        await runner.setup()
        self._runners.append(runner)
        site: web.BaseSite
        if fd is not None:
            # It came over an exec, and would go on into every process that is started here.
            os.set_inheritable(fd, False)
            site = web.SockSite(runner, socket.socket(fileno=fd), backlog=BACKLOG)
        else:
            site = web.TCPSite(runner, host, port, backlog=BACKLOG)
        await site.start()
        address = runner.addresses[0]
        return int(address[1]) if isinstance(address, tuple) else 0


def _grpc_server(config: RouterConfig, core: Core) -> GrpcServer:
    """Import gRPC only where it is asked for. Raises ConfigError where it is not installed."""
    try:
        from router.grpc_server import GrpcServer
    except ImportError as error:
        raise ConfigError(f"grpc-port: needs the extra: pip install '.[grpc]' in the checkout ({error})") from error
    return GrpcServer(config, core)


Reload = Callable[[RouterConfig], None]
"""Takes over a new configuration; raises ConfigError where it cannot be used."""


async def run(config: RouterConfig, on_running: Callable[[Reload], None] = lambda _: None) -> int:
    """Run a router until SIGTERM or SIGINT has drained it; return the exit code.

    Args:
        config: what it begins with.
        on_running: is given the router's `reload` once there is one.

    Raises:
        ConfigError: tokenizer or chat template cannot be used.
        OSError: a port cannot be had.
    """
    tokenizer = await asyncio.to_thread(Tokenizer, config.model_path, config.chat_template)
    router = Router(config, tokenizer)
    stop, stop_now = asyncio.Event(), asyncio.Event()
    signals: list[int] = []

    def on_signal(number: int) -> None:
        signals.append(number)
        (stop_now if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    try:
        await router.start()
        on_running(router.reload)
        router.core.grammars.warm()
        tokenizer.warm()
        # What is there now stays: a collection that walks through it would hold up every stream for tens of ms.
        gc.freeze()
        assert router.clock is not None
        await _first_of(stop.wait(), asyncio.shield(router.clock))
        if router.clock.done():
            log.error("the router's clock stopped", exc_info=router.clock.exception())
            return 1
        has_successor = signals[0] == signal.SIGTERM and config.http_fd is not None
        await _first_of(router.drain(has_successor), stop_now.wait())
        return 0
    finally:
        await router.close()


async def _first_of(*waits: object) -> None:
    """Wait until the first is over; cancel the others."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]  # type: ignore[call-overload]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
