"""Plays a plan against a server inside a window; one player for each kind of plan.

ClosedLoop      N workers, each sends the next request when its last one is over; ends when none is left
OpenLoop        sends each request when it is due; ends when all are over
SteadyStreams   start ─► settle ─► open ─► time is over ─► every arrival is answered ─► each stream's next token
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

from bench.client import Reply, stream
from bench.servers import Server
from bench.window import Sent, Window
from bench.workloads.plan import Ask, ClosedLoop, SteadyStreams

_POLL_S: Final = 0.005
# A server that refuses a steady stream at once would otherwise be asked thousands of times.
_AFTER_FAILURE_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request with its body written, so that nothing but sending is left."""

    ask: Ask
    body: bytes


Starts = Callable[[Ask], Prepared]


@dataclass(frozen=True, slots=True)
class Wire:
    """How requests leave: the session, the server, the window that notes them."""

    http: aiohttp.ClientSession
    server: Server
    window: Window

    async def send(self, prepared: Prepared, reply: Reply | None = None, is_warmup: bool = False) -> Sent:
        """Send one request and return it when it is over."""
        sent = self.window.register(prepared.ask, reply or Reply(), is_warmup)
        try:
            await stream(self.http, self.server.endpoint, prepared.body, sent.reply)
        finally:
            self.window.finish(sent)
        return sent


async def play_closed(wire: Wire, plan: ClosedLoop, prepared: Sequence[Prepared]) -> None:
    """Keep `plan.concurrency` requests running until all have been answered."""
    waiting = iter(prepared)

    async def worker() -> None:
        for item in waiting:
            await wire.send(item)

    async with wire.window, asyncio.TaskGroup() as tasks:
        for _ in range(plan.concurrency):
            tasks.create_task(worker())


async def play_open(wire: Wire, prepared: Sequence[Prepared]) -> None:
    """Send each request when it is due, and wait for all of them."""
    async with wire.window, asyncio.TaskGroup() as tasks:
        for item in sorted(prepared, key=lambda p: p.ask.due_s or 0.0):
            await asyncio.sleep(max(0.0, (item.ask.due_s or 0.0) - wire.window.now_s))
            tasks.create_task(wire.send(item))


async def play_steady(wire: Wire, plan: SteadyStreams, prepared: Sequence[Prepared], starts: Starts) -> None:
    """Keep `plan.streams` running while the arrivals come; no gap is cut off at the end."""
    streams = _Streams(wire, plan, starts)
    async with asyncio.TaskGroup() as tasks:
        workers = [tasks.create_task(streams.keep(i)) for i in range(plan.streams)]
        await streams.all_begun()
        await asyncio.sleep(plan.settle_s)
        async with wire.window:
            arriving: list[tuple[asyncio.Task[Sent], Reply]] = []
            for item in prepared:
                await asyncio.sleep(max(0.0, (item.ask.due_s or 0.0) - wire.window.now_s))
                reply = Reply()
                arriving.append((tasks.create_task(wire.send(item, reply)), reply))
            await asyncio.sleep(max(0.0, plan.window_s - wire.window.now_s))
            for reply in await _wait_for(arriving, plan.drain_s):
                reply.error = f"not answered within {plan.drain_s:g} s after the window"
            await streams.end(workers)


async def _wait_for(running: Sequence[tuple[asyncio.Task[Any], Reply]], budget_s: float) -> list[Reply]:
    """Wait for tasks, cancel those that outlast the budget, and return the replies of these."""
    if not running:
        return []
    _, late = await asyncio.wait([task for task, _ in running], timeout=budget_s)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    return [reply for task, reply in running if task in late]


class _Streams:
    """The steady streams of one phase: each is started again when it ends, until the end is asked for."""

    def __init__(self, wire: Wire, plan: SteadyStreams, starts: Starts) -> None:
        self._wire, self._plan, self._starts = wire, plan, starts
        self._current: dict[int, Reply] = {}
        self._num_started = plan.streams
        self._is_ending = False

    async def keep(self, slot: int) -> None:
        """Run one stream after the other in this slot."""
        index = slot
        while not self._is_ending:
            reply = self._current[slot] = Reply()
            await self._wire.send(self._starts(self._plan.steady(index)), reply)
            index, self._num_started = self._num_started, self._num_started + 1
            if reply.error is not None and not self._is_ending:
                await asyncio.sleep(_AFTER_FAILURE_S)

    async def all_begun(self) -> None:
        """Wait until every stream has had a token, or has failed."""
        give_up_s = time.monotonic() + self._plan.drain_s
        while time.monotonic() < give_up_s:
            replies = [self._current.get(slot) for slot in range(self._plan.streams)]
            if all(reply is not None and (reply.chunk_s or reply.error) for reply in replies):
                return
            await asyncio.sleep(_POLL_S)

    async def end(self, workers: Sequence[asyncio.Task[None]]) -> None:
        """Let every stream see its next token, then hang up; a gap that outlasts the budget counts up to there."""
        self._is_ending = True
        for reply in self._current.values():
            reply.is_asked_to_stop = True
        running = list(zip(workers, (self._current[slot] for slot in range(len(workers))), strict=True))
        for reply in await _wait_for(running, self._plan.drain_s):
            if reply.error is None and not reply.chunk_s:
                reply.error = f"no token within {self._plan.drain_s:g} s after the window"
            elif reply.error is None:
                reply.chunk_s.append(reply.finished_s)
                reply.chunk_tokens.append(0)
