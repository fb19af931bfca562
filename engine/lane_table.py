"""Which running sequence has which lane of the device's decode batch. Pure bookkeeping.

Lanes are taken from the lowest free one, so that the batch stays dense and its bucket (the batch size of the graph that
is replayed) small. When holes make the bucket larger than need be, the highest lanes move into them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

SMALL_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
_LARGE_STEP = 32


def bucket_sizes(max_lanes: int) -> tuple[int, ...]:
    """Give the batch sizes to have graphs for, ascending; the last is `max_lanes` itself."""
    sizes = {size for size in SMALL_BUCKETS if size < max_lanes}
    sizes.update(range(SMALL_BUCKETS[-1] + _LARGE_STEP, max_lanes, _LARGE_STEP))
    return tuple(sorted(sizes | {max_lanes}))


@dataclass(frozen=True, slots=True)
class Move:
    """The state of lane `source` belongs into lane `target` now."""

    source: int
    target: int


class LaneTable:
    """Lanes 0 .. max_lanes-1 by the placement that holds them. Used by one thread."""

    def __init__(self, max_lanes: int) -> None:
        self.max_lanes = max_lanes
        self._buckets = bucket_sizes(max_lanes)
        self._free = list(range(max_lanes))
        self._lane_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._lane_of)

    def __contains__(self, transfer_id: int) -> bool:
        return transfer_id in self._lane_of

    def lane(self, transfer_id: int) -> int:
        """Return the lane of a placement that has one."""
        return self._lane_of[transfer_id]

    def others(self, transfer_ids: Iterable[int]) -> list[int]:
        """Return the placements that have a lane and are not among these."""
        kept = set(transfer_ids)
        return [transfer_id for transfer_id in self._lane_of if transfer_id not in kept]

    def assign(self, transfer_id: int) -> int:
        """Give the lowest free lane to a placement."""
        assert transfer_id not in self._lane_of, f"placement {transfer_id} has a lane"
        assert self._free, "more sequences than lanes"
        lane = self._lane_of[transfer_id] = heapq.heappop(self._free)
        return lane

    def release(self, transfer_id: int) -> int:
        """Take the lane of a placement back and return it."""
        lane = self._lane_of.pop(transfer_id)
        heapq.heappush(self._free, lane)
        return lane

    def bucket(self) -> int:
        """Return the smallest batch size that covers every lane in use."""
        return self._bucket_for(1 + max(self._lane_of.values(), default=0))

    def compact(self) -> list[Move]:
        """Move the highest lanes into holes if that makes the bucket smaller; return the moves, disjoint lanes all."""
        if self._bucket_for(len(self)) >= self.bucket():
            return []
        moves = []
        for transfer_id, lane in sorted(self._lane_of.items(), key=lambda item: -item[1]):
            if lane < len(self._lane_of):
                break
            target = heapq.heappop(self._free)
            self._lane_of[transfer_id] = target
            heapq.heappush(self._free, lane)
            moves.append(Move(lane, target))
        return moves

    def _bucket_for(self, num_lanes: int) -> int:
        return next(size for size in self._buckets if size >= num_lanes)
