"""Ended transfers, remembered for a while so that late words about them are refused."""

from __future__ import annotations

import asyncio

MAX_TOMBSTONES = 1 << 16


class Tombstones:
    """Ids of ended transfers with the reason, forgotten after `keep_s` or when there are too many, oldest first."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._ended: dict[int, tuple[str, float]] = {}

    def __contains__(self, transfer_id: int) -> bool:
        return transfer_id in self._ended

    def __len__(self) -> int:
        return len(self._ended)

    def add(self, transfer_id: int, reason: str) -> None:
        """Remember one; the first reason stays."""
        self._ended.setdefault(transfer_id, (reason, asyncio.get_running_loop().time()))
        while len(self._ended) > MAX_TOMBSTONES:
            del self._ended[next(iter(self._ended))]

    def reason(self, transfer_id: int) -> str | None:
        """Return why it ended, or None if unknown."""
        entry = self._ended.get(transfer_id)
        return None if entry is None else entry[0]

    def expire(self) -> None:
        """Forget the old ones."""
        too_old_s = asyncio.get_running_loop().time() - self._keep_s
        while self._ended and next(iter(self._ended.values()))[1] < too_old_s:
            del self._ended[next(iter(self._ended))]
