"""Which sequences take part in the next decode step. Pure: no clock, no thread, no tensor.

    reserve() ─► RESERVED ──commit()──► RUNNING ──finished──────────────► gone (blocks become cached prefix)
        │            │                    │ └── no block left: the youngest ─► preempted, gone; placed again
        └─ no room   └────── drop() ──────┴─────────────────────────────► gone

    expect() ──► RESERVED ──take()───► RUNNING      prompt computed in the same pool: a slot, and blocks with take()

Sequences join and leave between two steps. A running sequence takes a new block whenever it enters one. When the pool
is dry the youngest running sequence gives way; it is reported, and the router places it again with the tokens that the
client has. Those are replayed: computed one per step like any other, their samples discarded.

    schedule() ─► step in flight ─► apply()         on a GPU several steps are in flight at once

A step may be scheduled before the one ahead of it is applied: the device knows the token, this side its position. What
leaves while steps with it are in flight keeps its blocks until the last of them is applied, since they write there.

A sequence whose grammar is slow sits out steps until that has worked off its last token; only then is the token told.

Over a common pool prompts hold blocks that belong to no running sequence yet. The last running sequence never gives way
to them: it waits, since each of them ends or joins, and then gives way first. So the oldest one always gets on.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import Enum, auto

from decode.promises import Promises
from engine.batch import BatchItem
from engine.block_pool import BlockPool
from engine.grammar import ended, follow
from engine.sampler import Sampled
from engine.sequence import Sequence, num_blocks_for
from protocol.block_hash import BlockHash, block_hashes, next_block_hash
from protocol.errors import OutOfBlocks
from protocol.request import FinishReason, TokenRow


class SlotState(Enum):
    """Where a sequence stands."""

    RESERVED = auto()
    RUNNING = auto()
    LEAVING = auto()


@dataclass(frozen=True, slots=True)
class _Untold:
    """A token that waits for its sequence's grammar, and why the sequence ends with it but for that."""

    result: Sampled
    reason: FinishReason | None


@dataclass(slots=True, eq=False)
class _Slot:
    sequence: Sequence
    num_prompt_blocks: int
    state: SlotState = SlotState.RESERVED
    num_in_flight: int = 0
    is_paused: bool = False
    untold: _Untold | None = None

    @property
    def position(self) -> int:
        """Place of the token that the next scheduled step computes."""
        return self.sequence.num_computed_tokens + self.num_in_flight


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
        max_model_len: bound of prompt plus output tokens.
        growth_blocks: most blocks that a running sequence takes at once when it enters a new one.
        has_own_pool: whether prompts are computed elsewhere and sent here, into blocks of `reserve`; else `expect`.
        hides_generated: name blocks with output tokens so that no prompt finds them, only the same sequence resumed:
            where the phases' arithmetic differs, a prompt's result must not depend on who computed its prefix.
    """

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        max_num_seqs: int,
        watermark_blocks: int,
        max_model_len: int,
        growth_blocks: int = 1,
        *,
        has_own_pool: bool = True,
        hides_generated: bool = False,
    ) -> None:
        self._pool = pool
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs
        self._watermark_blocks = watermark_blocks
        self._max_model_len = max_model_len
        self._growth_blocks = growth_blocks
        self._has_own_pool = has_own_pool
        self._hides_generated = hides_generated
        self._promises = Promises()
        self._slots: dict[int, _Slot] = {}
        self._running: list[_Slot] = []
        self._leaving: dict[int, _Slot] = {}
        self._num_bound = 0
        self._failed: list[tuple[int, str]] = []
        self._behind: list[_Slot] = []
        self.num_preemptions = 0
        self.num_replayed_tokens = 0

    @property
    def num_held(self) -> int:
        """Sequences that hold blocks."""
        return len(self._slots) + len(self._leaving)

    @property
    def num_running(self) -> int:
        """Sequences that take part in the next step."""
        return len(self._running)

    @property
    def num_behind(self) -> int:
        """Running sequences that sit out steps, since their grammars are slow."""
        return len(self._behind)

    @property
    def needs_last_tokens(self) -> bool:
        """Whether a running sequence has a grammar: what it allows depends on the token before, so on the host."""
        return self._num_bound > 0

    @property
    def num_kept_back(self) -> int:
        """Blocks of a common pool that a beginning prompt must leave to running sequences."""
        return self._watermark_blocks if self._running else 0

    def reserve(self, sequence: Sequence) -> Reserved:
        """Hold blocks for a prompt (and what was emitted before), reusing a cached prefix.

        Args:
            sequence: its tokens are the prompt and what the client has already; its names cover their full blocks.

        Raises:
            OutOfBlocks: no room now; nothing changed.
        """
        self._require_slot()
        self._hide_generated(sequence)
        num_tokens = max(len(sequence.tokens), sequence.num_prefill_tokens + 1)
        # The last token is always computed here: its logits give the next one.
        cached = self._pool.match(sequence.names[: (num_tokens - 1) // self._block_size])
        num_prompt_blocks = num_blocks_for(sequence.num_prefill_tokens, self._block_size)
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
        sequence.num_computed_tokens = max(sequence.num_prefill_tokens, num_cached_tokens)
        self._slots[sequence.transfer_id] = _Slot(sequence, num_prompt_blocks)
        return Reserved(tuple(sequence.block_ids[:num_prompt_blocks]), min(len(cached), num_prompt_blocks))

    def expect(self, sequence: Sequence) -> None:
        """Hold a slot for a sequence whose prompt is computed in this pool; its blocks come with `take`.

        Raises:
            OutOfBlocks: no slot, or no room for prompt, emitted tokens and what is promised already; nothing changed.
        """
        self._require_slot()
        self._hide_generated(sequence)
        names, promises = sequence.names, self._promises
        num_blocks = num_blocks_for(max(len(sequence.tokens), sequence.num_prefill_tokens + 1), self._block_size)
        num_unnamed = num_blocks - len(names)
        unheld = [name for name in names if not self._pool.num_leased((name,))]
        num_wanted = promises.num_blocks + promises.num_new(unheld) + num_unnamed
        self._require_room(0, num_wanted)
        promises.add(sequence.transfer_id, unheld, num_unnamed)
        num_prompt_blocks = num_blocks_for(sequence.num_prefill_tokens, self._block_size)
        self._slots[sequence.transfer_id] = _Slot(sequence, num_prompt_blocks)

    def awaits(self, transfer_id: int) -> bool:
        """Whether a sequence has a slot and no prompt yet."""
        slot = self._slots.get(transfer_id)
        return slot is not None and slot.state is SlotState.RESERVED

    def begun(self, transfer_id: int) -> None:
        """Note that a prompt holds its blocks, which were promised."""
        self._promises.remove(transfer_id)

    def take(self, transfer_id: int, block_ids: Seq[int], first_token_id: int) -> bool:
        """Hold the blocks of a prompt computed in this pool and let its sequence run; False if it has no slot any more.

        Args:
            transfer_id: of the placement.
            block_ids: of the whole prompt, in order, held by the caller until this returns.
            first_token_id: the token after those that prefill has computed.
        """
        if not self.awaits(transfer_id):
            return False
        seq = self._slots[transfer_id].sequence
        # What was emitted before may still be cached. The last token is always computed: its logits give the next one.
        num_full = seq.num_prefill_tokens // self._block_size
        generated = self._pool.match(seq.names[num_full : (len(seq.tokens) - 1) // self._block_size])
        blocks = [*block_ids[:num_full], *generated] if generated else list(block_ids)
        self._pool.acquire(blocks)
        seq.add_blocks(blocks)
        seq.num_computed_tokens = max(seq.num_prefill_tokens, (num_full + len(generated)) * self._block_size)
        self.commit(transfer_id, first_token_id)
        return True

    def commit(self, transfer_id: int, first_token_id: int) -> None:
        """Let a sequence whose prompt has landed join the batch; unknown ones were aborted meanwhile."""
        slot = self._slots.get(transfer_id)
        if slot is None or slot.state is SlotState.RUNNING:
            return
        seq = slot.sequence
        if len(seq.tokens) == seq.num_prefill_tokens:
            seq.tokens.append(first_token_id)
            if seq.grammar is not None:
                seq.grammar.accept(first_token_id)
                if self._has_failed(slot):
                    return
        num_full = seq.num_prefill_tokens // self._block_size
        for block_id, name in zip(seq.block_ids[:num_full], seq.names, strict=False):
            self._pool.name(block_id, name)
        slot.state = SlotState.RUNNING
        self._running.append(slot)
        if seq.grammar is not None:
            self._num_bound += 1
            if not seq.grammar.is_settled:
                self._behind.append(slot)

    def schedule(self) -> StepPlan:
        """Return the next step; empty where nobody can go on. Preempted sequences are gone already."""
        plan = StepPlan()
        for slot in list(self._running):
            if slot.num_in_flight == 0:
                slot.is_paused = False
            if slot.state is not SlotState.RUNNING or slot.is_paused or self._has_last_token(slot):
                continue
            if self._behind and slot in self._behind:
                continue
            if self._has_block(slot, plan):
                plan.items.append(BatchItem(slot.sequence, slot.position, 1, wants_logits=True))
            else:
                # Its lane is given up with this step, and the host knows its tokens only once nothing is in flight.
                slot.is_paused = True
        for item in plan.items:
            self._slots[item.sequence.transfer_id].num_in_flight += 1
        return plan

    def apply(self, plan: StepPlan, results: list[Sampled]) -> list[TokenRow]:
        """Take a step's samples, in the order of scheduling; return a row for each new token.

        Finished sequences are gone afterwards. Samples of sequences that left meanwhile are thrown away.
        """
        rows = []
        for item, result in zip(plan.items, results, strict=True):
            transfer_id = item.sequence.transfer_id
            slot = self._slots.get(transfer_id) or self._leaving[transfer_id]
            slot.num_in_flight -= 1
            if slot.state is SlotState.LEAVING:
                self._release_if_idle(slot)
                continue
            seq = slot.sequence
            seq.num_computed_tokens += 1
            self._name_full_block(seq)
            if seq.num_computed_tokens < len(seq.tokens):
                self.num_replayed_tokens += 1
                continue
            assert result.token_id >= 0, "the device ended a sequence that has not ended"
            seq.tokens.append(result.token_id)
            reason = follow(seq.sampling, seq.grammar, result.token_id, seq.num_output_tokens, self._room_tokens(seq))
            if seq.grammar is not None and not seq.grammar.is_settled:
                slot.untold = _Untold(result, reason)
                self._behind.append(slot)
            elif (row := self._told(slot, result, reason)) is not None:
                rows.append(row)
        return rows

    def catch_up(self) -> list[tuple[int, TokenRow]]:
        """Return the tokens that slow grammars have worked off meanwhile, as (transfer_id, row).

        Their sequences take part in the next step again.
        """
        rows: list[tuple[int, TokenRow]] = []
        for slot in list(self._behind):
            grammar = slot.sequence.grammar
            assert grammar is not None
            if not grammar.is_settled:
                continue
            self._behind.remove(slot)
            untold, slot.untold = slot.untold, None
            row = None if untold is None else self._told(slot, untold.result, untold.reason)
            if row is not None:
                rows.append((slot.sequence.transfer_id, row))
            elif untold is None:
                self._has_failed(slot)
        return rows

    def take_failed(self) -> list[tuple[int, str]]:
        """Return the sequences that were dropped since the last call because their grammar failed, and why."""
        failed, self._failed = self._failed, []
        return failed

    def _told(self, slot: _Slot, result: Sampled, reason: FinishReason | None) -> TokenRow | None:
        """Return the row of a token that its grammar has followed, or None where that failed; drop who is done."""
        if self._has_failed(slot):
            return None
        seq, reason = slot.sequence, ended(slot.sequence.grammar, reason)
        if reason is not None:
            self.drop(seq.transfer_id)
        return TokenRow(seq.request_id, seq.epoch, seq.num_output_tokens - 1, result.token_id, reason, result.logprobs)

    def _has_failed(self, slot: _Slot) -> bool:
        seq = slot.sequence
        if seq.grammar is None or not seq.grammar.is_settled or seq.grammar.failure is None:
            return False
        self._failed.append((seq.transfer_id, seq.grammar.failure))
        self.drop(seq.transfer_id)
        return True

    def drop(self, transfer_id: int) -> None:
        """Forget a sequence and release its blocks as soon as no step in flight has it; idempotent.

        No transfer may write into its blocks any more.
        """
        slot = self._slots.pop(transfer_id, None)
        self._promises.remove(transfer_id)
        if slot is not None:
            if slot.state is SlotState.RUNNING:
                self._running.remove(slot)
                self._num_bound -= slot.sequence.grammar is not None
                if slot in self._behind:
                    self._behind.remove(slot)
            slot.state = SlotState.LEAVING
            self._leaving[transfer_id] = slot
            self._release_if_idle(slot)

    def _release_if_idle(self, slot: _Slot) -> None:
        if slot.num_in_flight == 0:
            del self._leaving[slot.sequence.transfer_id]
            self._pool.release(slot.sequence.take_blocks())

    def _has_last_token(self, slot: _Slot) -> bool:
        """Tell whether the steps in flight bring the last token that the request or the context has room for."""
        seq = slot.sequence
        limit = min(seq.sampling.max_tokens, self._max_model_len - seq.num_prompt_tokens)
        return slot.position - seq.num_prompt_tokens + 2 > limit

    def _require_slot(self) -> None:
        if len(self._slots) >= self._max_num_seqs:
            raise OutOfBlocks(f"all {self._max_num_seqs} sequence slots are taken")

    def _require_room(self, num_fresh: int, num_wanted: int) -> None:
        """Refuse what fits only by leaving running sequences nothing to grow into."""
        reserve = self._watermark_blocks if self._slots else 0
        if max(num_fresh, num_wanted) + reserve > self._pool.num_available:
            raise OutOfBlocks(
                f"{num_wanted} blocks wanted and {reserve} kept back, {self._pool.num_available} available"
            )

    def _has_block(self, slot: _Slot, plan: StepPlan) -> bool:
        """Give a sequence the block of its next position, at the cost of younger ones; False if it must wait or go."""
        seq = slot.sequence
        while slot.position // self._block_size >= len(seq.block_ids):
            spare = self._pool.num_available - self._watermark_blocks
            try:
                seq.add_blocks(self._pool.allocate(max(1, min(self._blocks_to_grow(slot), spare))))
            except OutOfBlocks:
                if self._leaving:
                    return False  # blocks come free with the steps in flight
                youngest = self._running[-1]
                if len(self._running) == 1 and self._is_prompt_underway(seq):
                    return False
                self._preempt(youngest, plan)
                if youngest is slot:
                    return False
        return True

    def _is_prompt_underway(self, seq: Sequence) -> bool:
        """Tell whether a prompt in the common pool holds blocks beside this sequence: it will end or join by itself."""
        return not self._has_own_pool and self._pool.num_leased_blocks > len(seq.block_ids)

    def _blocks_to_grow(self, slot: _Slot) -> int:
        seq = slot.sequence
        last = min(self._max_model_len, seq.num_prompt_tokens + seq.sampling.max_tokens)
        return min(self._growth_blocks, num_blocks_for(last, self._block_size) - len(seq.block_ids))

    def _preempt(self, slot: _Slot, plan: StepPlan) -> None:
        self.num_preemptions += 1
        plan.preempted.append(slot.sequence.transfer_id)
        self.drop(slot.sequence.transfer_id)

    def _name_full_block(self, seq: Sequence) -> None:
        if seq.num_computed_tokens % self._block_size:
            return
        index = seq.num_computed_tokens // self._block_size - 1
        if index >= len(seq.names):
            first = index * self._block_size
            tokens = seq.tokens[first : first + self._block_size]
            seq.names.append(next_block_hash(self._parent(seq, index), tokens))
        self._pool.name(seq.block_ids[index], seq.names[index])

    def _parent(self, seq: Sequence, index: int) -> BlockHash:
        """Give what the name of a block is derived from: its predecessor's, marked where generated blocks begin."""
        parent = seq.names[index - 1] if index else seq.root
        if self._hides_generated and index == seq.num_prompt_tokens // self._block_size:
            return next_block_hash(parent, ())  # the name of no block, since none is empty
        return parent

    def _hide_generated(self, seq: Sequence) -> None:
        num_full = seq.num_prompt_tokens // self._block_size
        if self._hides_generated and len(seq.names) > num_full:
            tokens = seq.tokens[num_full * self._block_size :]
            seq.names[num_full:] = block_hashes(tokens, self._block_size, self._parent(seq, num_full))

    def _room_tokens(self, seq: Sequence) -> int:
        return self._max_model_len - len(seq.tokens)
