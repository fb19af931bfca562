"""Staging memory that payload is sent from and received into."""

from __future__ import annotations

import numpy as np

from kvtransfer.transport import Buffer


class Slots:
    """A fixed set of equal buffers, every page touched once.

    A slot is given back by the completion of the transfer that used it, never by a cancelled waiter. Having none free
    is the backpressure: whoever needs one goes on when one returns.
    """

    def __init__(self, slot_bytes: int, num_slots: int = 0) -> None:
        self.slot_bytes = slot_bytes
        self.num_total = 0
        self._free: list[Buffer] = []
        self.resize(num_slots)

    @property
    def num_free(self) -> int:
        """Slots nobody uses."""
        return len(self._free)

    def take(self) -> Buffer | None:
        """Return a free slot, the most recently used first (warm in cache), or None."""
        return self._free.pop() if self._free else None

    def give(self, slot: Buffer) -> None:
        """Take a slot back."""
        assert slot.nbytes == self.slot_bytes and self.num_free < self.num_total
        self._free.append(slot)

    def resize(self, num_slots: int) -> None:
        """Grow to `num_slots`, or shrink towards it by dropping free slots; used ones stay until a later call."""
        while self.num_total < num_slots:
            self._free.append(np.ones(self.slot_bytes, np.uint8))
            self.num_total += 1
        while self.num_total > num_slots and self._free:
            self._free.pop()
            self.num_total -= 1
