"""Blocks promised to sequences that have a slot while their prompt has not begun. Pure.

Used only where prefill and decode share a pool: a slot is given without blocks, so two sequences must not be let in on
the same free ones. Candidates for one job share most of their prompt: a block counts once, however many will name it.
"""

from __future__ import annotations

from collections.abc import Sequence

from protocol.block_hash import BlockHash


class Promises:
    """The promises of one pool; used by one thread."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[tuple[BlockHash, ...], int]] = {}
        self._num_sharers: dict[BlockHash, int] = {}
        self._num_unnamed = 0

    @property
    def num_blocks(self) -> int:
        """Blocks promised in all."""
        return len(self._num_sharers) + self._num_unnamed

    def num_new(self, names: Sequence[BlockHash]) -> int:
        """Return how many of these are promised to nobody yet."""
        return sum(name not in self._num_sharers for name in names)

    def add(self, transfer_id: int, names: Sequence[BlockHash], num_unnamed: int) -> None:
        """Promise blocks of these names, and others that will have none or that nobody shares."""
        assert transfer_id not in self._entries
        self._entries[transfer_id] = (tuple(names), num_unnamed)
        self._num_unnamed += num_unnamed
        for name in names:
            self._num_sharers[name] = self._num_sharers.get(name, 0) + 1

    def remove(self, transfer_id: int) -> None:
        """End a promise; idempotent."""
        names, num_unnamed = self._entries.pop(transfer_id, ((), 0))
        self._num_unnamed -= num_unnamed
        for name in names:
            self._num_sharers[name] -= 1
            if not self._num_sharers[name]:
                del self._num_sharers[name]
