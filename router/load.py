"""What each worker is expected to be busy with: our own placements at once, everybody else's by heartbeat. Pure.

1. A placement counts from the moment it is sent. 2. Its prompt leaves the prefill queue with the first token. 3. Its
blocks on the decode worker grow with its tokens. 4. It ends once, on each side. 5. Readouts take at most half of the
places of a prefill worker: what owes a first token always finds one of the others, or waits for its own kind.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from protocol.block_hash import BlockHash
from protocol.wire import Role
from router.members import Registry, Worker, WorkerKey
from router.placement import BlockLedger, DecodeCandidate, Pair, PrefillCandidate, PrefixMemory, choose


@dataclass(frozen=True, slots=True)
class Demand:
    """What a placement asks of its workers.

    Attributes:
        names: names of the full blocks of the prompt.
        num_blocks: blocks that it will need on the decode worker before it has grown.
        needs_decode: False if it ends with its first token.
        is_readout: nobody waits for a first token of it.
        reads_cache: False if no block of its prompt can be taken from the prefix cache.
    """

    num_prompt_tokens: int
    names: tuple[BlockHash, ...]
    num_blocks: int
    needs_decode: bool
    is_readout: bool = False
    reads_cache: bool = True


@dataclass(slots=True)
class _Load:
    memory: PrefixMemory
    ledger: BlockLedger = field(default_factory=BlockLedger)
    queued: dict[int, int] = field(default_factory=dict)
    queued_tokens: int = 0
    held: set[int] = field(default_factory=set)
    readouts: set[int] = field(default_factory=set)
    foreign_tokens: int = 0
    foreign_blocks: int = 0


class Loads:
    """Expected load of every worker in a registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._loads: dict[WorkerKey, _Load] = {}

    def choose(self, demand: Demand, excluded: Collection[str]) -> Pair | None:
        """Return the best pair for a demand outside the excluded workers, or None if there is none now."""
        prefills = [
            self._prefill(w, demand)
            for w in self._registry.prefills
            if self._takes(w, excluded) and not (demand.is_readout and self._has_its_readouts(w))
        ]
        if not demand.needs_decode:
            return choose(demand.num_prompt_tokens, prefills, None)
        decodes = [self._decode(w, demand) for w in self._registry.decodes if self._takes(w, excluded)]
        return choose(demand.num_prompt_tokens, prefills, decodes)

    def lacks_room(self, demand: Demand) -> bool:
        """Whether there are decode workers for a demand, and all of them are full."""
        decodes = [self._decode(w, demand) for w in self._registry.decodes if self._takes(w, ())]
        return bool(decodes) and not any(decode.has_room for decode in decodes)

    def placed(self, transfer_id: int, demand: Demand, prefill: WorkerKey, decode: WorkerKey | None) -> None:
        """Count a placement."""
        load = self._of(prefill)
        num_tokens = demand.num_prompt_tokens - self._cached_tokens(load, demand)
        load.queued[transfer_id] = num_tokens
        load.queued_tokens += num_tokens
        load.held.add(transfer_id)
        if demand.is_readout:
            load.readouts.add(transfer_id)
        load.memory.note(demand.names)
        if decode is not None:
            load = self._of(decode)
            load.ledger.add(transfer_id, demand.names, demand.num_blocks)
            load.memory.note(demand.names)

    def computed(self, transfer_id: int, prefill: WorkerKey) -> None:
        """Note that a prompt has left the prefill queue; idempotent."""
        load = self._loads.get(prefill)
        if load is not None:
            load.queued_tokens -= load.queued.pop(transfer_id, 0)

    def grown(self, transfer_id: int, decode: WorkerKey, num_blocks: int) -> None:
        """Note how many blocks a placement has reached."""
        load = self._loads.get(decode)
        if load is not None:
            load.ledger.grow(transfer_id, num_blocks)

    def ended(self, transfer_id: int, key: WorkerKey) -> None:
        """Note that a placement holds nothing on this worker any more; idempotent."""
        load = self._loads.get(key)
        if load is not None:
            load.queued_tokens -= load.queued.pop(transfer_id, 0)
            load.held.discard(transfer_id)
            load.readouts.discard(transfer_id)
            load.ledger.remove(transfer_id)

    def heartbeat(self, worker: Worker) -> None:
        """Compare what a worker reports with our own count: the rest belongs to other routers, or was not shared."""
        load = self._of(worker.key)
        load.foreign_tokens = max(0, worker.stats.queued_tokens - load.queued_tokens)
        wanted = worker.stats.blocks_leased + worker.stats.blocks_promised
        load.foreign_blocks = max(0, wanted - load.ledger.num_blocks)

    def forget(self, key: WorkerKey) -> None:
        """Drop everything about a lost instance."""
        self._loads.pop(key, None)

    def _takes(self, worker: Worker, excluded: Collection[str]) -> bool:
        if worker.is_draining or worker.registration.worker_id in excluded:
            return False
        is_full = len(self._of(worker.key).held) >= max(1, worker.registration.max_num_seqs)
        return worker.role is not Role.PREFILL or not is_full

    def _has_its_readouts(self, worker: Worker) -> bool:
        return len(self._of(worker.key).readouts) >= max(1, worker.registration.max_num_seqs // 2)

    def _of(self, key: WorkerKey) -> _Load:
        load = self._loads.get(key)
        if load is None:
            worker = self._registry.find(key)
            num_blocks = worker.registration.num_blocks if worker is not None else 1
            load = self._loads[key] = _Load(PrefixMemory(num_blocks))
        return load

    def _cached_tokens(self, load: _Load, demand: Demand) -> int:
        block_size = self._registry.fingerprint.block_size if self._registry.fingerprint is not None else 1
        if not demand.reads_cache:
            return 0
        # The last token is always computed.
        return min(load.memory.num_held(demand.names) * block_size, demand.num_prompt_tokens - 1)

    def _prefill(self, worker: Worker, demand: Demand) -> PrefillCandidate:
        load = self._of(worker.key)
        return PrefillCandidate(
            worker_id=worker.registration.worker_id,
            queued_tokens=load.queued_tokens + load.foreign_tokens,
            num_cached_tokens=self._cached_tokens(load, demand),
        )

    def _decode(self, worker: Worker, demand: Demand) -> DecodeCandidate:
        load = self._of(worker.key)
        return DecodeCandidate(
            worker_id=worker.registration.worker_id,
            total_blocks=worker.registration.num_blocks,
            used_blocks=load.ledger.num_blocks + load.foreign_blocks,
            needed_blocks=load.ledger.needed(demand.names, demand.num_blocks),
            num_placements=len(load.ledger),
            max_num_seqs=worker.registration.max_num_seqs,
            linked=self._linked(worker),
        )

    def _linked(self, worker: Worker) -> frozenset[str]:
        return frozenset(key.worker_id for key in worker.links if self._registry.find(key) is not None)


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Return how many blocks hold this many tokens."""
    return -(-num_tokens // block_size)
