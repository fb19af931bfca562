"""Which sequences take part in the next decode step. Pure: no clock, no thread, no tensor.

    reserve() ─► RESERVED ──commit()──► RUNNING ──finished──────────────► gone (blocks become cached prefix)
        │            │                    │ └── no block left: the youngest ─► preempted, gone; placed again
        └─ no room   └────── drop() ──────┴─────────────────────────────► gone

Sequences join and leave between two steps. A running sequence takes a new block whenever it enters one. When the pool
is dry the youngest running sequence gives way; it is reported, and the router places it again with the tokens that the
client has. Those are replayed: computed one per step like any other, their samples discarded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from engine.batch import BatchItem
from engine.block_pool import BlockPool
from engine.sampler import Sampled
from engine.sequence import Sequence, num_blocks_for
from protocol.block_hash import BlockHash, next_block_hash
from protocol.errors import OutOfBlocks
from protocol.request import FinishReason, TokenRow


class SlotState(Enum):
    """Where a sequence stands."""

    RESERVED = auto()
    RUNNING = auto()


@dataclass(slots=True, eq=False)
class _Slot:
    sequence: Sequence
    num_prompt_blocks: int
    num_emitted: int
    state: SlotState = SlotState.RESERVED


@dataclass(frozen=True, slots=True)
class Reserved:
    """What a reservation got: the prompt's blocks, and how many leading ones hold their KV already."""

    block_ids: tuple[int, ...]
    num_cached_blocks: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: what to compute, and who had to give way for it."""

    items: list[BatchItem] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)


class DecodeScheduler:
    """Running batch and blocks of one decode worker.

    Args:
        pool: the worker's blocks.
        block_size: tokens per block.
        max_num_seqs: sequences held at once.
        watermark_blocks: blocks kept back from new sequences while others are held.
    """

    def __init__(self, pool: BlockPool, block_size: int, max_num_seqs: int, watermark_blocks: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs
        self._watermark_blocks = watermark_blocks
        self._slots: dict[int, _Slot] = {}
        self._running: list[_Slot] = []
        self.num_preemptions = 0
        self.num_replayed_tokens = 0

    @property
    def num_held(self) -> int:
        """Sequences that hold blocks."""
        return len(self._slots)

    @property
    def num_running(self) -> int:
        """Sequences that take part in the next step."""
        return len(self._running)

    def reserve(self, sequence: Sequence) -> Reserved:
        """Hold blocks for a prompt (and what was emitted before), reusing a cached prefix.

        Args:
            sequence: its tokens are the prompt and what the client has already; its names cover their full blocks.

        Raises:
            OutOfBlocks: no room now; nothing changed.
        """
        if len(self._slots) >= self._max_num_seqs:
            raise OutOfBlocks(f"all {self._max_num_seqs} sequence slots are taken")
        num_tokens = max(len(sequence.tokens), sequence.num_prompt_tokens + 1)
        # The last token is always computed here: its logits give the next one.
        cached = self._pool.match(sequence.names[: (num_tokens - 1) // self._block_size])
        num_prompt_blocks = num_blocks_for(sequence.num_prompt_tokens, self._block_size)
        num_fresh = max(0, num_prompt_blocks - len(cached))
        self._pool.acquire(cached)
        try:
            self._require_room(num_fresh, num_blocks_for(num_tokens, self._block_size) - len(cached))
            fresh = self._pool.allocate(num_fresh)
        except OutOfBlocks:
            self._pool.release(cached)
            raise
        sequence.add_blocks(cached + fresh)
        num_cached_tokens = len(cached) * self._block_size
        sequence.num_computed_tokens = max(sequence.num_prompt_tokens, num_cached_tokens)
        num_emitted = len(sequence.tokens) - sequence.num_prompt_tokens
        self._slots[sequence.transfer_id] = _Slot(sequence, num_prompt_blocks, num_emitted)
        return Reserved(tuple(sequence.block_ids[:num_prompt_blocks]), min(len(cached), num_prompt_blocks))

    def commit(self, transfer_id: int, first_token_id: int) -> None:
        """Let a sequence whose prompt has landed join the batch; unknown ones were aborted meanwhile."""
        slot = self._slots.get(transfer_id)
        if slot is None or slot.state is SlotState.RUNNING:
            return
        seq = slot.sequence
        if slot.num_emitted == 0:
            seq.tokens.append(first_token_id)
        num_full = seq.num_prompt_tokens // self._block_size
        for block_id, name in zip(seq.block_ids[:num_full], seq.names, strict=False):
            self._pool.name(block_id, name)
        slot.state = SlotState.RUNNING
        self._running.append(slot)

    def schedule(self) -> StepPlan:
        """Return the next step. Preempted sequences are gone already."""
        plan = StepPlan()
        for slot in list(self._running):
            if slot in self._running and not self._has_block(slot, plan):
                self._preempt(slot, plan)
        plan.items.extend(
            BatchItem(slot.sequence, slot.sequence.num_computed_tokens, 1, wants_logits=True) for slot in self._running
        )
        return plan

    def apply(self, plan: StepPlan, results: list[Sampled], max_model_len: int) -> list[TokenRow]:
        """Take the step's samples; return a row for each new token. Finished sequences are gone afterwards."""
        rows = []
        for item, result in zip(plan.items, results, strict=True):
            slot = self._slots[item.sequence.transfer_id]
            seq = slot.sequence
            seq.num_computed_tokens += 1
            self._name_full_block(seq)
            if seq.num_computed_tokens < len(seq.tokens):
                self.num_replayed_tokens += 1
                continue
            seq.tokens.append(result.token_id)
            rows.append(self._row(slot, result, max_model_len))
            if rows[-1].finish_reason is not None:
                self.drop(seq.transfer_id)
        return rows

    def drop(self, transfer_id: int) -> None:
        """Forget a sequence and release its blocks; idempotent. Nothing may write into them any more."""
        slot = self._slots.pop(transfer_id, None)
        if slot is not None:
            if slot.state is SlotState.RUNNING:
                self._running.remove(slot)
            self._pool.release(slot.sequence.take_blocks())

    def _require_room(self, num_fresh: int, num_wanted: int) -> None:
        """Refuse what fits only by leaving running sequences nothing to grow into."""
        reserve = self._watermark_blocks if self._slots else 0
        if max(num_fresh, num_wanted) + reserve > self._pool.num_available:
            raise OutOfBlocks(
                f"{num_wanted} blocks wanted and {reserve} kept back, {self._pool.num_available} available"
            )

    def _has_block(self, slot: _Slot, plan: StepPlan) -> bool:
        """Give a sequence the block of its next position, preempting younger ones; False if it is the youngest."""
        seq = slot.sequence
        while seq.num_computed_tokens // self._block_size >= len(seq.block_ids):
            try:
                seq.add_blocks(self._pool.allocate(1))
            except OutOfBlocks:
                youngest = self._running[-1]
                if youngest is slot:
                    return False
                self._preempt(youngest, plan)
        return True

    def _preempt(self, slot: _Slot, plan: StepPlan) -> None:
        self.num_preemptions += 1
        plan.preempted.append(slot.sequence.transfer_id)
        self.drop(slot.sequence.transfer_id)

    def _name_full_block(self, seq: Sequence) -> None:
        if seq.num_computed_tokens % self._block_size:
            return
        index = seq.num_computed_tokens // self._block_size - 1
        if index >= len(seq.names):
            parent: BlockHash = seq.names[-1] if seq.names else seq.root
            first = index * self._block_size
            seq.names.append(next_block_hash(parent, seq.tokens[first : first + self._block_size]))
        self._pool.name(seq.block_ids[index], seq.names[index])

    def _row(self, slot: _Slot, result: Sampled, max_model_len: int) -> TokenRow:
        seq = slot.sequence
        reason: FinishReason | None = seq.sampling.finish_reason(
            result.token_id, seq.num_output_tokens, max_model_len - len(seq.tokens)
        )
        return TokenRow(seq.request_id, seq.epoch, seq.num_output_tokens - 1, result.token_id, reason, result.logprobs)
