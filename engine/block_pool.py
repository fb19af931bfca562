"""Bookkeeping of KV blocks: who holds them, and which prefix they hold. No tensors here.

Every block is in exactly one state:

    free ──allocate()──► leased ──release(), unnamed──► free
                          │  ▲
          release(), named│  │acquire()
                          ▼  │
                        cached ──evicted by allocate(), least recently used first──► leased

A leased block may be held by several sequences (a shared prefix); it leaves the state with its last holder. A block
gets its name (`protocol.block_hash`) only when all its tokens are computed, so what is found by name may be read.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import NamedTuple

from protocol.block_hash import BlockHash
from protocol.errors import OutOfBlocks


class PoolCounts(NamedTuple):
    """Blocks by state; free + cached + leased = total."""

    free: int
    cached: int
    leased: int
    total: int


class BlockPool:
    """Blocks 0 .. num_blocks-1 of one KV cache. Used by one thread."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free: deque[int] = deque(range(num_blocks))
        self._num_holders = [0] * num_blocks
        self._name_of: dict[int, BlockHash] = {}
        self._block_of: dict[BlockHash, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give now: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_leased_blocks(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.num_available

    def counts(self) -> PoolCounts:
        """Return the number of blocks in each state."""
        available = self.num_available
        return PoolCounts(len(self._free), len(self._cached), self.num_blocks - available, self.num_blocks)

    def match(self, names: Sequence[BlockHash]) -> list[int]:
        """Return the blocks that hold the longest known prefix of `names`. Takes no hold: acquire them at once."""
        blocks = []
        for name in names:
            block_id = self._block_of.get(name)
            if block_id is None:
                break
            blocks.append(block_id)
        return blocks

    def acquire(self, block_ids: Sequence[int]) -> None:
        """Hold blocks found by `match`; each call needs its own `release`."""
        for block_id in block_ids:
            if self._num_holders[block_id] == 0:
                del self._cached[block_id]
            self._num_holders[block_id] += 1

    def allocate(self, num_blocks: int) -> list[int]:
        """Lease unnamed blocks, evicting cached prefixes if need be; all or nothing.

        Raises:
            OutOfBlocks: fewer are available; nothing changed.
        """
        if num_blocks > self.num_available:
            raise OutOfBlocks(f"{num_blocks} blocks wanted, {self.num_available} of {self.num_blocks} available")
        blocks = [self._free.popleft() if self._free else self._evict() for _ in range(num_blocks)]
        for block_id in blocks:
            self._num_holders[block_id] = 1
        return blocks

    def name(self, block_id: int, name: BlockHash) -> None:
        """Make a leased, fully computed block findable; a no-op if another block bears the name already."""
        assert self._num_holders[block_id] > 0, f"block {block_id} is not leased"
        if block_id not in self._name_of and name not in self._block_of:
            self._name_of[block_id] = name
            self._block_of[name] = block_id

    def release(self, block_ids: Sequence[int]) -> None:
        """Give up one hold on each block of a sequence, in its order.

        The tail is released first, so that of one prefix the far end is evicted before the start.
        """
        for block_id in reversed(block_ids):
            assert self._num_holders[block_id] > 0, f"block {block_id} released twice"
            self._num_holders[block_id] -= 1
            if self._num_holders[block_id] == 0:
                if block_id in self._name_of:
                    self._cached[block_id] = None
                else:
                    self._free.append(block_id)

    def num_leased(self, names: Sequence[BlockHash]) -> int:
        """Return how many of these are leased: holding them too takes nothing from what is available."""
        found = (self._block_of.get(name) for name in names)
        return sum(block_id is not None and self._num_holders[block_id] > 0 for block_id in found)

    def check(self, num_expected_leased: int | None = None) -> None:
        """Assert the invariants; with a number, also that exactly so many blocks are leased."""
        leased = [b for b, holders in enumerate(self._num_holders) if holders > 0]
        assert len(self._free) + len(self._cached) + len(leased) == self.num_blocks, self.counts()
        assert not set(self._free) & set(self._cached) and len(set(self._free)) == len(self._free)
        assert all(self._block_of[n] == b for b, n in self._name_of.items())
        assert len(self._block_of) == len(self._name_of)
        assert all(b in self._name_of for b in self._cached)
        assert num_expected_leased is None or len(leased) == num_expected_leased, (len(leased), num_expected_leased)

    def _evict(self) -> int:
        block_id, _ = self._cached.popitem(last=False)
        del self._block_of[self._name_of.pop(block_id)]
        return block_id


class PoolWatch:
    """Checks a pool whenever the last of its users has become idle: nothing may be leased then. Used by one thread."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._busy: set[object] = set()

    def tell(self, user: object, is_busy: bool) -> None:
        """Note whether a user holds anything."""
        if is_busy:
            self._busy.add(user)
        elif user in self._busy:
            self._busy.remove(user)
            if not self._busy:
                self._pool.check(num_expected_leased=0)
