"""Requests by the pool, what they should answer, and the two ways to ask: a closed loop and an open one.

1. A pool is drawn from a seed: greedy and seeded requests, prompts of their own and prompts with a long common head.
2. Its oracles are asked once in peace, one at a time, and may be kept in a JSON file for the next campaign; a kept file
   is tried on a few requests first, since another build may answer otherwise.
3. A closed loop keeps so many streams running; each finished one is held against its oracle and then forgotten.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.ledger import Ledger, Record, Request

NUM_CHECKED_ORACLES = 3
_TEMPERATURES = (0.0, 0.0, 0.7, 1.0)
_PLACES = ("a small harbour", "the night shift", "a school in the hills", "the archive", "a kitchen", "the last train")
_HEAD = (
    "Judge the candidate against each qualification and answer with one line for each of them. The hirer asks for "
    "five years of work with distributed systems, two years of Rust or C++, experience with on-call duty, the "
    "ability to explain a decision to people who do not write programs, and the patience to read other people's "
    "logs. Degrees do not matter; published work does. Candidates who live more than two hours away need to be "
    "willing to travel twice a month. "
)


def draw_pool(seed: int, num_requests: int, num_tokens: tuple[int, int]) -> list[Request]:
    """Draw distinct requests with `num_tokens` (least, most) output tokens; half of them share a long head."""
    dice, pool = random.Random(f"pool {seed}"), []
    for number in range(num_requests):
        head = _HEAD if number % 2 else ""
        pool.append(
            Request(
                prompt=f"{head}Candidate {number} of {seed}, from {dice.choice(_PLACES)}:",
                max_tokens=dice.randint(*num_tokens),
                temperature=dice.choice(_TEMPERATURES),
                seed=dice.randrange(1 << 30),
            )
        )
    return pool


def long_prompt(dice: random.Random, num_words: int) -> str:
    """Return a prompt of about 1.3 tokens a word that no other prompt shares its first block with."""
    words = _HEAD.lower().replace(",", "").replace(".", "").split()
    return f"{dice.randrange(1 << 48):x} " + " ".join(dice.choice(words) for _ in range(num_words))


class Oracles:
    """What the requests of a pool answer without a fault.

    Args:
        path: a JSON file that they are read from and written to, or None.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known: dict[str, list[int]] = {}
        if path is not None and path.exists():
            self._known = json.loads(path.read_text())

    async def ask(self, ledger: Ledger, pool: Sequence[Request]) -> dict[Request, list[int]]:
        """Return the tokens of each request of a pool, asking a server in peace for those that are not known.

        Raises:
            RuntimeError: what is kept in the file is not what this build answers.
        """
        kept = [request for request in pool if _key(request) in self._known]
        for request in kept[:NUM_CHECKED_ORACLES]:
            if await ledger.oracle(request) != self._known[_key(request)]:
                raise RuntimeError(f"{self._path} is of another build (request {request}): remove it")
        for request in pool:
            if _key(request) not in self._known:
                self._known[_key(request)] = await ledger.oracle(request)
        if self._path is not None and len(kept) < len(pool):
            self._path.write_text(json.dumps(self._known) + "\n")
        return {request: self._known[_key(request)] for request in pool}


def _key(request: Request) -> str:
    words = [request.prompt, request.max_tokens, request.temperature, request.seed]
    return json.dumps([*words, request.regex] if request.regex else words)


@dataclass(slots=True)
class Tally:
    """What finished streams were like, added up.

    Attributes:
        num_explicit: streams that ended with exactly one error, where that is allowed.
        faults: what was wrong, in words.
        ttfts_s: arrival to first token.
    """

    num_streams: int = 0
    num_tokens: int = 0
    num_explicit: int = 0
    faults: list[str] = field(default_factory=list)
    ttfts_s: list[float] = field(default_factory=list)

    def add(self, record: Record, oracle: Sequence[int], may_fail: bool = False) -> None:
        """Judge a stream that has ended."""
        self.num_streams += 1
        self.num_tokens += len(record.token_ids)
        if record.ttft_s is not None:
            self.ttfts_s.append(record.ttft_s)
        if may_fail and record.is_explicit_failure(oracle):
            self.num_explicit += 1
            return
        self.faults += [f"request {record.request.seed}: {fault}" for fault in record.faults(oracle)]


class ClosedLoop:
    """Keeps `width` streams of a pool running until told to stop. Used on one event loop.

    Args:
        oracles: what each request answers; its keys are the pool.
        dice: draws the order.
        on_done: takes every stream that has ended, after it was judged.
    """

    def __init__(
        self,
        ledger: Ledger,
        oracles: Mapping[Request, Sequence[int]],
        dice: random.Random,
        *,
        width: int,
        may_fail: bool = False,
        on_done: Callable[[Record], None] | None = None,
    ) -> None:
        self.tally = Tally()
        self.running: list[Record] = []
        self.ended: list[Record] = []
        self._ledger = ledger
        self._oracles = oracles
        self.pool = list(oracles)
        self._dice = dice
        self._width = width
        self._may_fail = may_fail
        self._on_done = on_done
        self._is_ending = False
        self._num_left: int | None = None

    async def run(self, num_requests: int | None = None) -> Tally:
        """Ask until `num_requests` have ended, or `stop` was called and the last stream has ended.

        On cancellation the connections are dropped and the error is re-raised.
        """
        self._num_left = num_requests
        await asyncio.gather(*(self._client() for _ in range(self._width)))
        return self.tally

    async def during(self, fault: Awaitable[None]) -> Tally:
        """Ask while a fault goes on, then let every running stream end."""
        running = asyncio.create_task(self.run())
        try:
            await fault
        finally:
            self.stop()
            await running
        return self.tally

    def stop(self) -> None:
        """Begin no more streams."""
        self._is_ending = True

    def begin_no_more(self) -> None:
        """Let the run that goes on end with the streams that are running."""
        self._num_left = 0

    def forget_ended(self, before_s: float) -> None:
        """Drop records of streams that ended before this moment."""
        self.ended = [record for record in self.ended if record.ended_s >= before_s]

    async def _client(self) -> None:
        while not self._is_ending and self._num_left != 0:
            if self._num_left is not None:
                self._num_left -= 1
            request = self._dice.choice(self.pool)
            record = Record(request)
            self.running.append(record)
            await self._ledger.stream(request, record)
            self.running.remove(record)
            self.ended.append(record)
            self.tally.add(record, self._oracles[request], self._may_fail)
            if self._on_done is not None:
                self._on_done(record)


async def open_loop(
    ledger: Ledger, requests: Callable[[], Request], dice: random.Random, *, rate_per_s: float, for_s: float
) -> list[Record]:
    """Ask with Poisson arrivals, waiting for nobody; return every record once the last has ended."""
    begin_s, next_s = time.monotonic(), 0.0
    records: list[Record] = []
    async with asyncio.TaskGroup() as group:
        while (next_s := next_s + dice.expovariate(rate_per_s)) < for_s:
            await asyncio.sleep(max(0.0, begin_s + next_s - time.monotonic()))
            record = Record(requests())
            records.append(record)
            group.create_task(_asked(ledger, record))
    return records


async def _asked(ledger: Ledger, record: Record) -> None:
    await ledger.stream(record.request, record)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least this share of them does not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def bound(num_wrong: int, num_tried: int) -> str:
    """Say what so many faults in so many trials prove: 0 of n bounds the rate below 3/n (95 %)."""
    limit = f" (below {3 / num_tried:.2%}, 95 %)" if num_tried and not num_wrong else ""
    return f"{num_wrong} of {num_tried}{limit}"
