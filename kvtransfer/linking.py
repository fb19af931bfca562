"""Keeps one link from a decode worker to each prefill worker it was told of.

    listed ──► dial ──► linked ──lost──► pause ──► dial …       (0.1 s doubling to 2 s, with jitter)
       └── no longer listed, or listed as another instance: the link is dropped

A worker whose model or layout differs is asked again at the longest pause only: it may be replaced, not repaired.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable

from kvtransfer.transport import Endpoint, Identity, Transport
from protocol.errors import BatonError, FingerprintMismatch
from protocol.wire import PeerAddress

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 2.0


class Linking:
    """Dials listed prefill workers, again and again.

    Args:
        transport: makes the endpoints.
        identity: who we are.
        on_endpoint: called on the event loop with each fresh endpoint.
        on_broken: called with an error of our own that ended the dialling of one of them.
    """

    def __init__(
        self,
        transport: Transport,
        identity: Identity,
        on_endpoint: Callable[[Endpoint], None],
        on_broken: Callable[[BaseException], None] = lambda _: None,
    ) -> None:
        self._transport = transport
        self._identity = identity
        self._on_endpoint = on_endpoint
        self._on_broken = on_broken
        self._dialling: dict[PeerAddress, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()

    def set_peers(self, addresses: Iterable[PeerAddress]) -> None:
        """Replace the list of prefill workers; those of another transport are none of ours."""
        wanted = {address for address in addresses if address.transport == self._transport.name}
        for address in [a for a in self._dialling if a not in wanted]:
            task = self._dialling.pop(address)
            task.cancel()
            self._ending.add(task)
        for address in wanted - self._dialling.keys():
            task = asyncio.create_task(self._keep(address))
            task.add_done_callback(self._ended)
            self._dialling[address] = task

    async def close(self) -> None:
        """Drop every link."""
        self.set_peers([])
        if self._ending:
            await asyncio.wait(self._ending)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._ending.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("linking failed by our own fault", exc_info=error)
            self._on_broken(error)

    async def _keep(self, address: PeerAddress) -> None:
        pause_s, told = FIRST_PAUSE_S, ""
        while True:
            try:
                endpoint = await self._transport.dial(address, self._identity)
            except BatonError as error:
                level = logging.ERROR if isinstance(error, FingerprintMismatch) else logging.WARNING
                if isinstance(error, FingerprintMismatch):
                    pause_s = LONGEST_PAUSE_S
                if str(error) != told:
                    log.log(level, "no link with prefill worker %s: %s", address.worker_id, error)
                told = str(error)
            else:
                pause_s, told = FIRST_PAUSE_S, ""
                reason = await self._hold(endpoint)
                log.warning("link with prefill worker %s lost: %s", address.worker_id, reason)
            # Jitter only lengthens: two seconds after a mismatch are a promise.
            await asyncio.sleep(pause_s * random.uniform(1.0, 1.25))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _hold(self, endpoint: Endpoint) -> str:
        """Hand the endpoint over and wait for its end; when no longer wanted, end it."""
        self._on_endpoint(endpoint)
        try:
            await asyncio.wait({endpoint.lost})
        finally:
            endpoint.abort("no longer listed")
        return endpoint.lost.result()
