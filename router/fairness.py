"""How clients share a router: whose request is placed next, and who holds how many places. Pure.

1. A client is a tenant, or an address where there are no keys (`router/access.py`).
2. Requests of a lower rank go first, whoever's they are; a rank has to be granted (`Client.rank`). Within a rank goes
   what lost its workers, then the client that has had least placed, in prompt tokens by weight (`protocol/turns.py`).
3. Among the requests of one client the lower `priority` goes first, then the older one.
4. A request is in one lane, of its client, its rank and what it waits for; a heap orders the lanes, and each lane has
   one of its requests. What is called off is dropped when it comes up, or outnumbers the rest: O(log n) a decision.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from protocol.turns import Turns
from router.access import Client
from router.request_state import Need, RequestState

_SLACK = 32

_Entry = tuple[int, int, RequestState]
_LaneKey = tuple[Need, int, bool, str]


@dataclass(slots=True, eq=False)
class _Lane:
    """Requests of one client that are ordered among themselves only."""

    key: _LaneKey
    entries: list[_Entry] = field(default_factory=list)
    num_live: int = 0


class FairQueue:
    """Requests that wait for workers."""

    def __init__(self) -> None:
        self._turns = Turns()
        self._lanes: dict[_LaneKey, _Lane] = {}
        self._heaps: dict[Need, list[tuple[int, bool, float, int, _Lane]]] = {need: [] for need in Need}
        self._in: dict[RequestState, _Lane] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._in)

    def __contains__(self, request: RequestState) -> bool:
        return request in self._in

    def __iter__(self) -> Iterator[RequestState]:
        """Go through all that waits, in no order."""
        return iter(tuple(self._in))

    def add(self, request: RequestState) -> None:
        """Let a request wait."""
        assert request not in self._in
        client = request.submission.client
        self._turns.want(client.name)
        key = (request.need, request.rank, not request.is_resumed, client.name)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = _Lane(key)
            self._list(lane)
        self._in[request] = lane
        lane.num_live += 1
        heapq.heappush(lane.entries, (request.submission.priority, request.order, request))

    def remove(self, request: RequestState) -> None:
        """Forget a request; idempotent."""
        lane = self._in.pop(request, None)
        if lane is None:
            return
        lane.num_live -= 1
        self._turns.rest(request.submission.client.name)
        if len(lane.entries) > 2 * lane.num_live + _SLACK:
            lane.entries = [entry for entry in lane.entries if self._is_live(entry, lane)]
            heapq.heapify(lane.entries)
        heap = self._heaps[lane.key[0]]
        if not lane.num_live and len(heap) > 2 * len(self._in) + _SLACK:
            self._relist(lane.key[0])

    def take(self, request: RequestState) -> None:
        """Remove a request that is placed; its client has had its prompt, unless it had it before."""
        client = request.submission.client
        if not request.is_charged:
            request.is_charged = True
            self._turns.charge(client.name, request.cost, client.weight)
        self.remove(request)

    def first(self, needs: Iterable[Need]) -> RequestState | None:
        """Return whose turn it is among those who wait for one of these; None if nobody does."""
        best: tuple[int, bool, float, int] | None = None
        found = None
        for need in needs:
            lane = self._top(need)
            if lane is None:
                continue
            request = self._head(lane)
            _, rank, is_new, client = lane.key
            place = (rank, is_new, self._turns.had(client), request.order)
            if best is None or place < best:
                best, found = place, request
        return found

    def heads(self, need: Need) -> Iterator[RequestState]:
        """Go through those who wait for this and are first of their client, in no order."""
        for lane in self._lanes.values():
            if lane.num_live and lane.key[0] is need:
                yield self._head(lane)

    def _head(self, lane: _Lane) -> RequestState:
        while not self._is_live(lane.entries[0], lane):
            heapq.heappop(lane.entries)
        return lane.entries[0][2]

    def _top(self, need: Need) -> _Lane | None:
        """Return the lane whose turn it is, its first entry alive."""
        heap = self._heaps[need]
        while heap:
            rank, is_new, had, number, lane = heap[0]
            if not lane.num_live:
                heapq.heappop(heap)
                del self._lanes[lane.key]
                continue
            now_had = self._turns.had(lane.key[3])
            if now_had == had:
                return lane
            # It has had more since it was listed.
            heapq.heapreplace(heap, (rank, is_new, now_had, number, lane))
        return None

    def _list(self, lane: _Lane) -> None:
        need, rank, is_new, client = lane.key
        entry = (rank, is_new, self._turns.had(client), next(self._numbers), lane)
        heapq.heappush(self._heaps[need], entry)

    def _relist(self, need: Need) -> None:
        """Drop the lanes of a heap that are empty."""
        lanes = [entry[4] for entry in self._heaps[need]]
        self._heaps[need] = []
        for lane in lanes:
            if lane.num_live:
                self._list(lane)
            else:
                del self._lanes[lane.key]

    def _is_live(self, entry: _Entry, lane: _Lane) -> bool:
        return self._in.get(entry[2]) is lane


class Shares:
    """How many places each client holds, of something that all of them share."""

    def __init__(self) -> None:
        self._held: dict[str, int] = {}
        self._clients: dict[str, Client] = {}
        self._weights = 0
        self.total = 0

    def held(self, client: Client) -> int:
        """Return how many places a client holds."""
        return self._held.get(client.name, 0)

    def load(self, client: Client, more: int = 0) -> float:
        """Return how many places a client holds by weight, or would hold with some more."""
        return (self.held(client) + more) / client.weight

    def take(self, client: Client, count: int = 1) -> None:
        """Give places to a client."""
        if count and client.name not in self._held:
            self._clients[client.name] = client
            self._held[client.name] = 0
            self._weights += client.weight
        if count:
            self._held[client.name] += count
            self.total += count

    def give(self, client: Client, count: int = 1) -> None:
        """Take places back from a client."""
        if not count:
            return
        self._held[client.name] -= count
        self.total -= count
        if not self._held[client.name]:
            del self._held[client.name]
            self._weights -= self._clients.pop(client.name).weight

    def weights_with(self, client: Client) -> int:
        """Return the weights of all who hold something, and of this client."""
        return self._weights + (0 if client.name in self._held else client.weight)

    def heaviest(self, other_than: Client) -> Client | None:
        """Return who holds most by weight, apart from one; takes time with the number of clients."""
        others = (client for name, client in self._clients.items() if name != other_than.name)
        return max(others, key=self.load, default=None)
