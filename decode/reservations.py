"""Placements whose prompts have not begun: they hold no blocks yet. Pure.

    hold() ── RESERVE, its sequence made ──► WAITING ──┐
                                                       ├──► `reserve`, once
    begins() ── BEGIN of its prefill worker ───────────┘         the two come in either order

A prompt may queue for prefill for a minute: blocks reserved for it meanwhile would be taken from running streams and
from prefix cache. The round trip of a late reservation hides under the computation of the prompt's first chunk.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from engine.sequence import Sequence, num_blocks_for
from protocol.wire import Reserve

MAX_BEGUN = 4096


class Reservations:
    """The reservations of one decode worker that wait for their prompts; used on its event loop.

    Args:
        block_size: tokens per block.
        reserve: called once for each placement that is held and has begun.
    """

    def __init__(self, block_size: int, reserve: Callable[[Reserve, Sequence], None]) -> None:
        self._block_size = block_size
        self._reserve = reserve
        self._waiting: dict[int, tuple[Reserve, Sequence]] = {}
        # Who said of which placement that it has begun; also of those that are under way, since it may be said twice.
        self._begun: OrderedDict[int, str] = OrderedDict()
        self.num_blocks = 0

    def hold(self, message: Reserve, sequence: Sequence) -> None:
        """Keep a placement until its prompt begins; reserve at once if it has."""
        if self._begun.get(message.transfer_id) == message.prefill_worker_id:
            self._reserve(message, sequence)
            return
        self._waiting[message.transfer_id] = (message, sequence)
        self.num_blocks += self._num_blocks(sequence)

    def begins(self, sender_id: str, transfer_id: int) -> None:
        """Take a prefill worker's word that a prompt begins; idempotent.

        A word about a placement of another worker's counts for nothing.
        """
        held = self._waiting.get(transfer_id)
        if held is not None and held[0].prefill_worker_id != sender_id:
            return
        self._begun[transfer_id] = sender_id
        if len(self._begun) > MAX_BEGUN:
            self._begun.popitem(last=False)
        if held is not None:
            self._forget(transfer_id)
            self._reserve(*held)

    def drop(self, transfer_id: int) -> None:
        """Forget a placement; idempotent."""
        self._begun.pop(transfer_id, None)
        self._forget(transfer_id)

    def _forget(self, transfer_id: int) -> None:
        held = self._waiting.pop(transfer_id, None)
        if held is not None:
            self.num_blocks -= self._num_blocks(held[1])

    def _num_blocks(self, sequence: Sequence) -> int:
        """Blocks that it will reserve at the most: what is cached here counts, too."""
        return num_blocks_for(sequence.num_prefill_tokens, self._block_size)
