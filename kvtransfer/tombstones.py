"""Ended transfers, remembered for a while so that late words about them are refused."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

MAX_TOMBSTONES = 1 << 16


@dataclass(frozen=True, slots=True)
class Ending:
    """How a transfer ended that did not land.

    Attributes:
        is_failure: whether something broke; else it was called off by somebody who wants it no more: its client left,
            its first token was its last, it is placed elsewhere. Whoever called it off has told its router.
    """

    reason: str
    is_failure: bool = True


class Tombstones:
    """Ids of ended transfers and how they ended, forgotten after `keep_s` or when there are too many, oldest first."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._ended: dict[int, tuple[Ending, float]] = {}

    def __contains__(self, transfer_id: int) -> bool:
        return transfer_id in self._ended

    def __len__(self) -> int:
        return len(self._ended)

    def add(self, transfer_id: int, ending: Ending) -> None:
        """Remember one; the first ending stays."""
        self._ended.setdefault(transfer_id, (ending, asyncio.get_running_loop().time()))
        while len(self._ended) > MAX_TOMBSTONES:
            del self._ended[next(iter(self._ended))]

    def ending(self, transfer_id: int) -> Ending | None:
        """Return how it ended, or None if unknown."""
        entry = self._ended.get(transfer_id)
        return None if entry is None else entry[0]

    def expire(self) -> None:
        """Forget the old ones."""
        too_old_s = asyncio.get_running_loop().time() - self._keep_s
        while self._ended and next(iter(self._ended.values()))[1] < too_old_s:
            del self._ended[next(iter(self._ended))]
