"""The worker's service shell: everything around compute and transfer that both roles share.

    STARTING ─► SERVING ─SIGTERM or Drain─► DRAINING ─nothing placed here, or budget over─► STOPPED (exit code 0)
                   └── compute thread dead, dismissed for good, wrong secret ─► FAILED       (exit code 1 or 2)

1. The role loads its model and builds its parts, then `run` registers with every router and serves `/health`,
   `/livez`, `/readyz` and `/census` on the admin port.
2. A placement (`Prefill`, `Reserve`) is adopted: its router holds a lease on it until it ends here.
3. A timer reclaims what routers no longer renew; no new work is needed for that.
4. Messages about a placement go to the router connection that placed it, and nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
from collections.abc import Iterable
from enum import Enum
from typing import Protocol, assert_never

from aiohttp import web

from engine.config import ServiceConfig
from engine.router_link import RouterLink
from protocol.door import GuardedRunner
from protocol.errors import BatonError
from protocol.kv_layout import KVFingerprint
from protocol.request import TokenRow
from protocol.wire import (
    Abort,
    Declined,
    Drain,
    Heartbeat,
    Members,
    Message,
    PeerAddress,
    Prefill,
    Register,
    Reserve,
    Role,
    Tokens,
    TransferFailed,
    WorkerStats,
)

log = logging.getLogger(__name__)

REAP_INTERVAL_S = 0.25
ADMIN_CLOSE_S = 1.0


class ServiceState(Enum):
    """Where the worker stands in its life."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


class RoleHandler(Protocol):
    """What a role adds to the shell; called on the event loop, never blocks."""

    def take(self, message: Prefill | Reserve) -> None:
        """Start on a placement, which the service has adopted."""

    def abort(self, transfer_id: int, reason: str) -> None:
        """Forget a placement and free what it holds; idempotent."""

    def set_members(self, peers: tuple[PeerAddress, ...]) -> None:
        """Note the prefill workers there are."""

    def stats(self) -> WorkerStats:
        """Return current gauges and counters."""

    def progress(self) -> int:
        """Return a number that moves whenever the compute thread does anything."""

    def has_work(self) -> bool:
        """Whether the compute thread has something to do, so that its progress must move."""


class WorkerService:
    """Runs one worker in this process; a colocated process runs two.

    Args:
        registration: what this worker is; `instance` and `pid` are filled in by `new_registration`.
    """

    def __init__(self, config: ServiceConfig, registration: Register, handler: RoleHandler) -> None:
        self.config = config
        self.registration = registration
        self.state = ServiceState.STARTING
        self._handler = handler
        self._home: dict[int, tuple[RouterLink, int]] = {}
        self._links = [
            RouterLink(url, config.secret, self, lambda: self.registration, config.connect_retry_s)
            for url in config.router_urls
        ]
        self._on_connect: list[Message] = []
        self._failure: Exception | None = None
        self._stop = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()

    # --- for the role ---

    def announce(self, *messages: Message) -> None:
        """Send to every router now, and again on each new connection instead of what was announced before."""
        self._on_connect = list(messages)
        for link in self._links:
            for message in messages:
                link.post(message)

    def tell(self, transfer_id: int, message: Message) -> None:
        """Send to the router that placed `transfer_id`; dropped when that placement has ended here."""
        home = self._home.get(transfer_id)
        if home is not None:
            home[0].post(message, home[1])

    def tell_rows(self, rows: Iterable[tuple[int, TokenRow]]) -> None:
        """Send one `Tokens` message per router with its rows, given as (transfer_id, row)."""
        by_home: dict[tuple[RouterLink, int], list[TokenRow]] = {}
        for transfer_id, row in rows:
            home = self._home.get(transfer_id)
            if home is not None:
                by_home.setdefault(home, []).append(row)
        for (link, connection), batch in by_home.items():
            link.post(Tokens(rows=tuple(batch)), connection)

    def release(self, transfer_id: int) -> None:
        """Note that a placement has ended here; idempotent."""
        home = self._home.pop(transfer_id, None)
        if home is not None:
            home[0].release(transfer_id)
            if not self._home:
                self._empty.set()

    def holds(self, transfer_id: int) -> bool:
        """Whether a placement is alive here."""
        return transfer_id in self._home

    def on_dead(self, error: BaseException) -> None:
        """Take the news that the compute thread, or a task that never ends, died: the process must end."""
        self.on_fatal(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    # --- LinkOwner ---

    def on_connected(self, link: RouterLink) -> None:
        """Repeat what was announced on the fresh connection."""
        for message in self._on_connect:
            link.post(message)

    def on_fatal(self, error: Exception) -> None:
        """End the worker with this error; the first one counts."""
        if self._failure is None:
            self._failure = error
            self.state = ServiceState.FAILED
            self._stop.set()
            self._empty.set()

    def heartbeat(self) -> Heartbeat:
        """Return the current heartbeat."""
        return Heartbeat(
            progress=self._handler.progress(),
            has_work=self._handler.has_work(),
            stats=self._handler.stats(),
            is_draining=self.state is ServiceState.DRAINING,
        )

    def on_message(self, link: RouterLink, message: Prefill | Reserve | Abort | Members | Drain) -> None:
        """Route one message of a router to the role."""
        if isinstance(message, Prefill | Reserve):
            self._adopt(link, message)
        elif isinstance(message, Abort):
            self._handler.abort(message.transfer_id, message.reason)
            self.release(message.transfer_id)
        elif isinstance(message, Members):
            self._handler.set_members(message.peers)
        elif isinstance(message, Drain):
            self.begin_drain()
        else:
            assert_never(message)

    def _adopt(self, link: RouterLink, message: Prefill | Reserve) -> None:
        if self.state is not ServiceState.SERVING:
            link.post(Declined(transfer_id=message.transfer_id, reason="draining"), link.connection)
            return
        if message.transfer_id in self._home:
            log.warning("placement %d came twice and was ignored", message.transfer_id)
            return
        self._home[message.transfer_id] = (link, link.connection)
        self._empty.clear()
        link.hold(message.transfer_id)
        self._handler.take(message)

    # --- life cycle ---

    def begin_drain(self) -> None:
        """Take nothing new; `run` returns when nothing is left or the budget is over. At once if it has not begun."""
        if self.state in (ServiceState.STARTING, ServiceState.SERVING):
            self.state = ServiceState.DRAINING
            log.info("draining %d placements", len(self._home))
            for link in self._links:
                link.post(self.heartbeat())
            self._stop.set()

    async def run(self) -> int:
        """Serve until drained or failed; return the exit code of the process.

        On cancellation connections are dropped and the error is re-raised.
        """
        admin = await self._start_admin()
        tasks = [asyncio.create_task(link.run()) for link in self._links]
        tasks.append(asyncio.create_task(self._reap()))
        for task in tasks:
            task.add_done_callback(self._on_task_over)
        if self.state is ServiceState.STARTING:
            self.state = ServiceState.SERVING
        try:
            await self._stop.wait()
            if self._failure is None:
                await self._drain()
            return self._exit_code()
        finally:
            for link in self._links:
                await link.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if admin is not None:
                await admin.cleanup()

    def _on_task_over(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("%s failed by its own fault", self.registration.worker_id, exc_info=error)
            self.on_dead(error)

    def census(self) -> dict[str, object]:
        """Return the report of what this worker holds: every block is free, cached or leased."""
        stats = self._handler.stats()
        return {
            "worker_id": self.registration.worker_id,
            "instance": self.registration.instance,
            "role": str(self.registration.role),
            "state": self.state.value,
            "num_placements": len(self._home),
            "num_tasks": len(asyncio.all_tasks()),
            "blocks": {
                "free": stats.blocks_free,
                "cached": stats.blocks_cached,
                "leased": stats.blocks_leased,
                "total": stats.blocks_total,
            },
            "is_balanced": stats.blocks_free + stats.blocks_cached + stats.blocks_leased == stats.blocks_total,
        }

    async def _drain(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.drain_s):
                await self._empty.wait()
        if self._home:
            log.warning("drain budget over with %d placements left", len(self._home))

    def _exit_code(self) -> int:
        if self._failure is None:
            self.state = ServiceState.STOPPED
            return 0
        log.error("%s ends: %s", self.registration.worker_id, self._failure)
        return 2 if isinstance(self._failure, BatonError) else 1

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(REAP_INTERVAL_S)
            for link in self._links:
                for transfer_id in link.expired():
                    log.warning("lease on placement %d ran out", transfer_id)
                    # Its router may be there all the same: our pause may have been a little longer than its own.
                    reason = "its lease ran out on the worker"
                    self.tell(transfer_id, TransferFailed(transfer_id=transfer_id, reason=reason))
                    self._handler.abort(transfer_id, "lease ran out")
                    self.release(transfer_id)

    async def _start_admin(self) -> web.AppRunner | None:
        if self.config.admin_port is None:
            return None
        app = web.Application()
        app.router.add_get("/census", self._serve_census)
        app.router.add_get("/health", self._serve_health)
        app.router.add_get("/readyz", self._serve_health)
        app.router.add_get("/livez", self._serve_life)
        runner = GuardedRunner(app, ADMIN_CLOSE_S)
        await runner.setup()
        site = web.TCPSite(runner, self.config.admin_host, self.config.admin_port)
        await site.start()
        log.info("admin of %s on %s", self.registration.worker_id, runner.addresses[0])
        return runner

    async def _serve_census(self, _: web.Request) -> web.Response:
        return web.json_response(self.census())

    async def _serve_health(self, _: web.Request) -> web.Response:
        status = 200 if self.state is ServiceState.SERVING else 503
        return web.json_response({"state": self.state.value}, status=status)

    async def _serve_life(self, _: web.Request) -> web.Response:
        return web.json_response({"state": self.state.value})


def new_registration(
    config: ServiceConfig,
    role: Role,
    fingerprint: KVFingerprint,
    sizes: RegistrationSizes,
    backend: str,
    phases_agree: bool,
) -> Register:
    """Return the registration of a fresh instance of a worker."""
    return Register(
        worker_id=config.worker_id,
        instance=secrets.randbits(62),
        role=role,
        fingerprint=fingerprint,
        num_blocks=sizes[0],
        max_num_seqs=sizes[1],
        max_model_len=sizes[2],
        backend=backend[:4000],
        pid=os.getpid(),
        phases_agree=phases_agree,
    )


RegistrationSizes = tuple[int, int, int]
"""Blocks of the pool, sequences at once, longest sequence in tokens."""


def drain_on_signals(*services: WorkerService) -> None:
    """Let SIGTERM and SIGINT begin the drain of these services; call it on their running event loop."""
    loop = asyncio.get_running_loop()

    def begin() -> None:
        for service in services:
            service.begin_drain()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, begin)
