"""The hand-off inside one process: both roles over one pool of blocks, so that nothing is copied.

    decode                                  prefill                      all on the compute thread
    1. expect: a slot, no blocks       2. begin: the prompt gets its blocks from the common pool
                                       3. chunks are computed, the last one lands
    4. take: hold the same blocks      5. let go of them: only decode holds them now
    6. steps, growth, end

1. `Reserve` and `Prefill` come over two connections, in either order. A prompt begins only once decode has a slot for
   its sequence: what decode refuses is never computed, and what is computed is taken at once.
2. Decode promises blocks to what has a slot and has not begun (`decode/promises.py`), and says how many must be left
   to running sequences. So a prompt that lacks blocks waits, holding nothing.
3. A prompt that has begun has all its blocks and needs nobody: it ends by itself. Therefore the oldest running sequence
   may wait for it where the pool is dry, and everything else gives way to the oldest: no two wait for each other.
4. Taking comes after the host has seen the last chunk done, so decode's queue reads only what prefill's has written. A
   block goes back to the pool when no step in flight has it, on whichever queue, so neither writes into the other's.
5. An abort of either side ends its own part: a slot that is gone takes nothing, a prompt that is aborted gives none.

Decode reports the pool, free + cached + leased = total. Prefill has no blocks of its own and reports none, so that
whoever adds workers up counts each block once. Its registration still says how many blocks it computes into, since a
router remembers as many of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from engine.block_pool import BlockPool, PoolWatch
from engine.loading import LoadedModel
from engine.placement import Failure
from engine.stream_partition import RoleQueues
from protocol.wire import PeerAddress

TRANSPORT = "local"


class PromptTaker(Protocol):
    """Decode's end of the hand-off, called on the compute thread."""

    @property
    def num_kept_back(self) -> int:
        """Blocks that a beginning prompt must leave, so that running sequences can grow."""
        ...

    def awaits(self, transfer_id: int) -> bool:
        """Whether a slot is held for this sequence."""
        ...

    def begun(self, transfer_id: int) -> None:
        """Note that a prompt has its blocks: none are promised to it any more."""
        ...

    def take(self, transfer_id: int, block_ids: Sequence[int], first_token_id: int) -> None:
        """Hold a computed prompt's blocks, in order, and let its sequence run; nothing happens if its slot is gone."""
        ...

    def abandon(self, transfer_id: int, failure: Failure | None) -> None:
        """Give up the slot of a sequence whose prompt will not come; `failure` None if its request has ended well."""
        ...


class OnePool:
    """What two workers of one process share. The decode worker is made first, then the prefill worker.

    Args:
        model: loaded; its KV memory is made here.
        queues: one for each role.

    Attributes:
        address: how a router names the prefill worker; set by it.
        taker: set by the decode worker.
    """

    def __init__(self, model: LoadedModel, queues: RoleQueues) -> None:
        self.kv_cache = model.new_kv_cache()
        self.pool = BlockPool(model.num_blocks)
        self.watch = PoolWatch(self.pool)
        self.queues = queues
        self.address: PeerAddress | None = None
        self.taker: PromptTaker | None = None


class LocalLink:
    """The one link of a decode worker that shares its pool: with the prefill worker beside it. On the event loop.

    Args:
        on_links: called when `links` changed.
    """

    def __init__(self, one_pool: OnePool, on_links: Callable[[], None]) -> None:
        self._one_pool = one_pool
        self._on_links = on_links
        self.links: tuple[tuple[str, int], ...] = ()

    def set_peers(self, addresses: Iterable[PeerAddress]) -> None:
        """Note which prefill workers a router knows."""
        own = self._one_pool.address
        links = ((own.worker_id, own.instance),) if own is not None and own in tuple(addresses) else ()
        if links != self.links:
            self.links = links
            self._on_links()
