"""Which pair of workers takes a request. Pure and deterministic: the simulation runs the same code.

1. `PrefixMemory` remembers which blocks were sent to a worker, so that a request goes where its prefix lies.
2. `BlockLedger` adds up the blocks that live placements need on a decode worker; a shared prefix counts once.
3. `choose` takes the prefill worker with the least to compute first, then the decode worker, linked with it, that is
   emptiest. A decode worker without room is no candidate: a decline costs a round trip and a wasted prefill.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from protocol.block_hash import BlockHash


@dataclass(frozen=True, slots=True)
class PrefillCandidate:
    """A prefill worker as placement sees it.

    Attributes:
        queued_tokens: prompt tokens that will be computed before this request's.
        num_cached_tokens: leading tokens of this prompt that it is expected to hold.
    """

    worker_id: str
    queued_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class DecodeCandidate:
    """A decode worker as placement sees it.

    Attributes:
        used_blocks: blocks that live placements need.
        needed_blocks: blocks that this request would add.
        num_placements: live placements.
        linked: ids of the prefill workers it can receive from.
    """

    worker_id: str
    total_blocks: int
    used_blocks: int
    needed_blocks: int
    num_placements: int
    max_num_seqs: int
    linked: frozenset[str]

    @property
    def has_room(self) -> bool:
        """Whether the request fits now, each sequence with room for a block more; an empty worker may always try."""
        if self.num_placements >= self.max_num_seqs:
            return False
        growth_blocks = self.num_placements
        return self.used_blocks + self.needed_blocks + growth_blocks <= self.total_blocks or self.num_placements == 0

    @property
    def load(self) -> float:
        """How full it would be: the tighter of blocks and sequences, 0 to 1."""
        blocks = (self.used_blocks + self.needed_blocks) / max(1, self.total_blocks)
        return max(blocks, (self.num_placements + 1) / max(1, self.max_num_seqs))


@dataclass(frozen=True, slots=True)
class Pair:
    """The chosen workers; no decode worker if the request ends with its first token."""

    prefill_id: str
    decode_id: str | None


def choose(
    num_prompt_tokens: int, prefills: Sequence[PrefillCandidate], decodes: Sequence[DecodeCandidate] | None
) -> Pair | None:
    """Return the best pair, or None if there is none now.

    Args:
        num_prompt_tokens: length of the prompt.
        prefills: prefill workers that take requests.
        decodes: decode workers that take requests, or None if the request needs none.
    """
    ranked = sorted(prefills, key=lambda p: (p.queued_tokens + num_prompt_tokens - p.num_cached_tokens, p.worker_id))
    if decodes is None:
        return Pair(ranked[0].worker_id, None) if ranked else None
    roomy = [d for d in decodes if d.has_room]
    for prefill in ranked:
        linked = [d for d in roomy if prefill.worker_id in d.linked]
        if linked:
            best = min(linked, key=lambda d: (d.load, d.num_placements, d.worker_id))
            return Pair(prefill.worker_id, best.worker_id)
    return None


class PrefixMemory:
    """What one worker instance probably holds: the names of blocks sent there, least recently used forgotten.

    Args:
        max_blocks: how many names to remember; the blocks of the worker's pool.
    """

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max(1, max_blocks)
        self._names: OrderedDict[BlockHash, None] = OrderedDict()

    def num_held(self, names: Sequence[BlockHash]) -> int:
        """Return how many leading blocks of a prompt are expected there."""
        held = self._names
        for count, name in enumerate(names):
            if name not in held:
                return count
        return len(names)

    def note(self, names: Sequence[BlockHash]) -> None:
        """Remember a prompt's blocks; the first ones are forgotten last, since others share them."""
        held = self._names
        for name in reversed(names):
            held[name] = None
            held.move_to_end(name)
        while len(held) > self._max_blocks:
            held.popitem(last=False)


class BlockLedger:
    """Blocks that live placements need on one decode worker, by our own count."""

    def __init__(self) -> None:
        self._holders: dict[BlockHash, int] = {}
        self._entries: dict[int, tuple[tuple[BlockHash, ...], int]] = {}
        self._num_own_blocks = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_blocks(self) -> int:
        """Blocks needed by all of them; shared ones count once."""
        return len(self._holders) + self._num_own_blocks

    def needed(self, names: Sequence[BlockHash], num_blocks: int) -> int:
        """Return how many blocks a sequence would add."""
        return num_blocks - sum(name in self._holders for name in names)

    def add(self, transfer_id: int, names: Sequence[BlockHash], num_blocks: int) -> None:
        """Count a placement of `num_blocks` blocks, the first of them named."""
        self._entries[transfer_id] = (tuple(names), num_blocks)
        self._num_own_blocks += num_blocks - len(names)
        for name in names:
            self._holders[name] = self._holders.get(name, 0) + 1

    def grow(self, transfer_id: int, num_blocks: int) -> None:
        """Note that a placement has reached this many blocks; unknown ones have ended."""
        entry = self._entries.get(transfer_id)
        if entry is not None and num_blocks > entry[1]:
            self._entries[transfer_id] = (entry[0], num_blocks)
            self._num_own_blocks += num_blocks - entry[1]

    def remove(self, transfer_id: int) -> bool:
        """End a placement; idempotent. Returns whether it was there."""
        entry = self._entries.pop(transfer_id, None)
        if entry is None:
            return False
        names, num_blocks = entry
        self._num_own_blocks -= num_blocks - len(names)
        for name in names:
            self._holders[name] -= 1
            if not self._holders[name]:
                del self._holders[name]
        return True
