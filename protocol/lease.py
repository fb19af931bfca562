"""Leases: who may hold memory here, and until when. Pure: the clock is an argument.

    grant() ──► HELD ──renew()──► HELD
                 │  └─release()─► gone
                 └──expire(now)─► gone, and its keys are returned to be reclaimed

A worker grants one lease per transfer to the router that placed it. The router's pulse renews all of them at once; when
the router dies its leases run out, and a timer (never new work) reclaims what they held. Durations travel, times do
not: every table lives on its own monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class _Holder:
    renewed_s: float
    keys: set[int] = field(default_factory=set)


class LeaseTable:
    """Leases of one worker, keyed by transfer id and grouped by holder.

    Args:
        ttl_s: a holder that does not renew for this long loses everything it holds.
    """

    def __init__(self, ttl_s: float) -> None:
        if ttl_s <= 0:
            raise ValueError(f"ttl_s must be positive, got {ttl_s}")
        self.ttl_s = ttl_s
        self._holders: dict[str, _Holder] = {}
        self._holder_of: dict[int, str] = {}

    def grant(self, key: int, holder: str, now_s: float) -> None:
        """Record that `holder` holds `key`; also counts as a sign of life. Granting again moves the key."""
        self.release(key)
        self._holder_of[key] = holder
        entry = self._holders.setdefault(holder, _Holder(now_s))
        entry.renewed_s = now_s
        entry.keys.add(key)

    def renew(self, holder: str, now_s: float) -> None:
        """Extend everything `holder` holds by the TTL from now; unknown holders hold nothing."""
        if holder in self._holders:
            self._holders[holder].renewed_s = now_s

    def release(self, key: int) -> None:
        """End one lease; idempotent."""
        holder = self._holder_of.pop(key, None)
        if holder is not None:
            entry = self._holders[holder]
            entry.keys.discard(key)
            if not entry.keys:
                del self._holders[holder]

    def expire(self, now_s: float) -> list[int]:
        """Drop every lease whose holder is overdue and return their keys, oldest grant order not kept."""
        overdue = [h for h, entry in self._holders.items() if now_s - entry.renewed_s > self.ttl_s]
        keys = [key for h in overdue for key in self._holders[h].keys]
        for key in keys:
            self.release(key)
        return sorted(keys)

    def __len__(self) -> int:
        return len(self._holder_of)

    def __contains__(self, key: int) -> bool:
        return key in self._holder_of
