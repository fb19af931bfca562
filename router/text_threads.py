"""Threads for long texts: each is parsed and tokenised in one, and nobody's texts take all of them.

    run ─► waits in its party's lane ── a thread is free, and the party may have it ──► runs ─► its place is free
             └─ cancelled: it leaves the lane                                 └─ cancelled: the thread works on

1. A party is a tenant, or a client's address where there are no keys; `PARTY` says whose request a task serves.
2. Parties take turns. Each holds at most PARTY_THREADS, and PARTY_HEAVY with texts of more than HEAVY_BYTES: whatever
   others send, one thread is left for a newcomer, and whatever a party sends, its short texts pass its long ones.
3. What waits is bounded, in number and in bytes. A thread cannot be stopped, so that all work done in one is linear in
   what a client sent, and `TextBudget` bounds what it may send.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from protocol.errors import InvalidRequest, Overloaded

NUM_THREADS: Final = 4
PARTY_THREADS: Final = NUM_THREADS - 1
PARTY_HEAVY: Final = PARTY_THREADS - 1
HEAVY_BYTES: Final = 256 << 10
MAX_PARTY_BYTES: Final = 64 << 20
# Of all texts of one request: one to six seconds of a thread, whatever the texts say.
MAX_REQUEST_CHARS: Final = 6 << 20
RETRY_S: Final = 1.0

PARTY: Final[ContextVar[str]] = ContextVar("party", default="")
Result = TypeVar("Result")


@dataclass(slots=True, eq=False)
class _Work:
    """One text's work. `future` belongs to the event loop."""

    party: str
    num_bytes: int
    work: Callable[[], Any]
    future: asyncio.Future[Any]

    @property
    def is_heavy(self) -> bool:
        return self.num_bytes > HEAVY_BYTES


@dataclass(slots=True)
class _Party:
    """What one party has waiting and running."""

    waiting: deque[_Work] = field(default_factory=deque)
    num_bytes: int = 0
    num_running: int = 0
    num_heavy: int = 0

    def next(self) -> _Work | None:
        """Return what may run now; None if nothing may."""
        if self.num_running >= PARTY_THREADS:
            return None
        return next((work for work in self.waiting if not work.is_heavy or self.num_heavy < PARTY_HEAVY), None)


class TextThreads:
    """The threads of one router. Used on one event loop.

    Args:
        max_num_works: that wait or run at once.
    """

    def __init__(self, max_num_works: int) -> None:
        self._max_num_works = max_num_works
        self._num_works = self._num_running = 0
        self._parties: dict[str, _Party] = {}
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="text")

    async def run(self, num_bytes: int, work: Callable[[], Result]) -> Result:
        """Run work in a thread, on behalf of the party that the running task serves.

        Args:
            num_bytes: length of what its client sent.
            work: linear in that.

        Raises:
            Overloaded: as many as may wait do, of everybody or of this party.
        """
        name = PARTY.get()
        party = self._parties.get(name) or _Party()
        is_full = party.num_bytes and party.num_bytes + num_bytes > MAX_PARTY_BYTES
        if self._num_works >= self._max_num_works or is_full:
            raise Overloaded(f"{self._num_works} long texts wait to be tokenised", RETRY_S)
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        one = _Work(name, num_bytes, work, future)
        self._parties[name] = party
        party.waiting.append(one)
        party.num_bytes += num_bytes
        self._num_works += 1
        self._start_next()
        try:
            return await future
        finally:
            if one in party.waiting:
                party.waiting.remove(one)
                self._forget(party, one)

    def close(self) -> None:
        """Let the threads go."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _start_next(self) -> None:
        """Give free threads to the parties in turn."""
        for name in list(self._parties):
            if self._num_running >= NUM_THREADS:
                return
            party = self._parties[name]
            if (one := party.next()) is not None:
                # Its turn comes again behind all others.
                self._parties[name] = self._parties.pop(name)
                self._start(party, one)

    def _start(self, party: _Party, one: _Work) -> None:
        party.waiting.remove(one)
        party.num_running += 1
        party.num_heavy += one.is_heavy
        self._num_running += 1
        running = asyncio.get_running_loop().run_in_executor(self._threads, one.work)
        running.add_done_callback(lambda done: self._ended(party, one, done))

    def _ended(self, party: _Party, one: _Work, done: asyncio.Future[Any]) -> None:
        # A thread works on for a client that has left, so its place is free when the thread is.
        party.num_running -= 1
        party.num_heavy -= one.is_heavy
        self._num_running -= 1
        self._forget(party, one)
        error = asyncio.CancelledError() if done.cancelled() else done.exception()
        if not one.future.done():
            if error is None:
                one.future.set_result(done.result())
            elif done.cancelled():
                one.future.cancel()
            else:
                one.future.set_exception(error)
        self._start_next()

    def _forget(self, party: _Party, one: _Work) -> None:
        party.num_bytes -= one.num_bytes
        self._num_works -= 1
        if not party.waiting and not party.num_running:
            self._parties.pop(one.party, None)


class TextBudget:
    """Characters that the texts of one request may still have."""

    def __init__(self, max_chars: int = MAX_REQUEST_CHARS) -> None:
        self._max_chars = self._num_left = max_chars

    def spend(self, num_chars: int, param: str) -> None:
        """Count a text that is about to be tokenised.

        Raises:
            InvalidRequest: together with those before it, it is too long; names the field.
        """
        self._num_left -= num_chars
        if self._num_left < 0:
            raise InvalidRequest(
                f"{param}: the texts of one request may have {self._max_chars} characters together; send fewer",
                param.partition("[")[0],
            )
