"""Whose turn it is among clients that want the same thing: whoever has had least of it, by weight. Pure.

    idle ── want ──► WANTS ── charge: it has had more ──► WANTS ── rest ──► idle

1. Each client has a counter of what it was given, divided by its weight; the least counter goes first, and so a client
   that asks for much waits for itself only.
2. Who begins to want something starts no lower than the turn has come: idle time earns no credit, and what was had just
   before is remembered. When nobody wants anything, all is forgotten.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, Protocol, TypeVar

_KEPT: Final = 64


class Job(Protocol):
    """Something that is done for a client, due at a time; of lower rank goes first, whoever's it is."""

    @property
    def client(self) -> str: ...

    @property
    def weight(self) -> int: ...

    @property
    def rank(self) -> int: ...

    @property
    def deadline_s(self) -> float: ...


AnyJob = TypeVar("AnyJob", bound=Job)


class Turns:
    """Counters of the clients of one queue. Every method takes constant time, seen over many calls."""

    def __init__(self) -> None:
        self._had: dict[str, float] = {}
        self._wants: dict[str, int] = {}
        self._turn = 0.0
        self._prune_at = _KEPT

    def want(self, client: str) -> None:
        """Note that a client wants one thing more."""
        if client not in self._wants:
            self._wants[client] = 0
            self._had[client] = max(self._had.get(client, 0.0), self._turn)
            if len(self._had) > self._prune_at:
                self._prune()
        self._wants[client] += 1

    def rest(self, client: str) -> None:
        """Note that a client wants one thing less."""
        self._wants[client] -= 1
        if not self._wants[client]:
            del self._wants[client]
        if not self._wants:
            self._had.clear()
            self._turn = 0.0

    def had(self, client: str) -> float:
        """Return the counter of a client that wants something."""
        return self._had[client]

    def charge(self, client: str, amount: float, weight: int) -> None:
        """Note what a client that wants something is given: its turn has come."""
        had = self._had[client]
        self._turn = max(self._turn, had)
        self._had[client] = had + amount / weight

    def order(self, jobs: Iterable[AnyJob], size_of: Callable[[AnyJob], float]) -> list[AnyJob]:
        """Return jobs in the order of their turns, those of one client by deadline, as if each had its size then.

        Args:
            jobs: of clients that want something.
            size_of: how much of the next step a job would take.
        """
        found = sorted(jobs, key=lambda job: (job.rank, job.deadline_s))
        lanes: dict[tuple[int, str], deque[AnyJob]] = {}
        for job in found:
            lanes.setdefault((job.rank, job.client), deque()).append(job)
        if len(lanes) < 2:
            return found
        heap = [(rank, self._had[client], number, lane) for number, ((rank, client), lane) in enumerate(lanes.items())]
        heapq.heapify(heap)
        found = []
        while heap:
            rank, had, number, lane = heap[0]
            job = lane.popleft()
            found.append(job)
            if lane:
                heapq.heapreplace(heap, (rank, had + size_of(job) / job.weight, number, lane))
            else:
                heapq.heappop(heap)
        return found

    def _prune(self) -> None:
        """Forget who is idle and would start no higher than anybody."""
        self._had = {c: had for c, had in self._had.items() if c in self._wants or had > self._turn}
        self._prune_at = 2 * len(self._had) + _KEPT
