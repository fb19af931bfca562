"""Decode steps as the scheduler asks for them, whether the tokens go through the host or stay on the device.

    launch(items) ─► InFlight ── is_done() ──► results(), in the order of the items

`HostDecodeRunner` computes in `launch`; one step at a time. `LaneDecodeRunner` keeps tokens, positions and sampling
state on the device, so that several steps may be in flight: a sequence whose last token is not yet known to the host
takes part in the next step all the same. The host touches the device only when membership changes:

1. Sequences that are not asked for any more lose their lane; those that are new get one and their row is written.
2. Where lanes in the middle are free and a smaller batch would do, the last lanes move into them.
3. Sequences that got blocks have their table written.
4. Of sequences with a grammar what it allows next is written, in every step: the caller has let it follow.
5. One step of the bucket is run; the row of new tokens is fetched on a second stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.batch import BatchItem
from engine.device_queue import DeviceQueue, Mark
from engine.device_sampler import FetchedLogprobs, fetch_logprobs, is_adjusted
from engine.kv_cache import KVCache
from engine.lane_state import RING, LaneSizes, LaneState
from engine.lane_table import LaneTable
from engine.runner import Runner
from engine.sampler import Sampled
from model.batch import ForwardBatch
from model.torch_decoder import TorchDecoder

NO_TOKEN = -1
_GROWTH_TOKENS = 128


class InFlight(Protocol):
    """One launched step."""

    def is_done(self) -> bool:
        """Whether `results` would return at once."""
        ...

    def results(self) -> list[Sampled]:
        """Wait for the step and return its samples, one per item; NO_TOKEN for one whose lane had ended."""
        ...


class DecodeRunner(Protocol):
    """Runs decode steps; used by the compute thread alone.

    Attributes:
        depth: steps that may be in flight at once.
        growth_blocks: blocks that a sequence had best take at once, since writing its table costs something.
    """

    depth: int
    growth_blocks: int

    def launch(self, items: Sequence[BatchItem]) -> InFlight:
        """Begin a step: one token of each item, at position `item.start`, whose block the item's sequence has.

        A sequence with a grammar is asked for only once its last token is on the host.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Done:
    samples: list[Sampled]

    def is_done(self) -> bool:
        return True

    def results(self) -> list[Sampled]:
        return self.samples


class HostDecodeRunner:
    """Steps whose tokens come back to the host before the next one begins."""

    depth = growth_blocks = 1

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def launch(self, items: Sequence[BatchItem]) -> InFlight:
        """Compute the step."""
        return _Done([result for result in self._runner.step(items) if result is not None])


Compute = Callable[[int, bool], Tensor]
"""Enqueue one step of the first n lanes, adjusting logits or not; returns the model's logits `[n, vocab]`."""


class LaneStep:
    """One step over the lanes of a `LaneState`: everything that a CUDA graph records.

    Args:
        decoder: its kernels must not be in use elsewhere at the same time.
    """

    def __init__(self, decoder: TorchDecoder, kv_cache: KVCache, state: LaneState, sizes: LaneSizes) -> None:
        self._decoder = decoder
        self._kv = kv_cache.tensor
        self._state = state
        self._block_size = sizes.block_size

    def __call__(self, num_lanes: int, adjusts: bool) -> Tensor:
        """Run on the current stream; see `Compute`."""
        kernels, lanes = self._decoder.kernels, self._state.first(num_lanes)
        with torch.inference_mode():
            kernels.begin_step(lanes, self._block_size)
            batch = ForwardBatch(
                token_ids=lanes.token_ids,
                positions=lanes.positions,
                slot_mapping=lanes.slot_mapping,
                query_start=lanes.seq_lens,  # unused while decoding, as are the indices: every row is wanted
                seq_lens=lanes.seq_lens,
                block_tables=lanes.block_tables,
                logits_indices=lanes.slot_mapping,
                is_decode=True,
            )
            logits = self._decoder.forward(batch, self._kv)
            kernels.end_step(
                lanes, (kernels.sample_tokens if adjusts else kernels.choose_tokens)(logits, lanes.sampling)
            )
            if adjusts and lanes.sampling.counts is not None:
                kernels.count_tokens(lanes.sampling.counts, lanes.token_ids, lanes.is_alive)
        return logits


class LaneDecodeRunner:
    """Runs decode steps with the tokens on the device.

    Args:
        compute: runs a step; a `LaneStep`, or graphs recorded of it.
        depth: steps in flight.
    """

    def __init__(
        self, compute: Compute, state: LaneState, sizes: LaneSizes, queue: DeviceQueue, depth: int = 2
    ) -> None:
        assert 0 < depth < RING, depth
        self.depth = depth
        self.growth_blocks = max(1, _GROWTH_TOKENS // sizes.block_size)
        self._compute = compute
        self._state = state
        self._queue = queue
        self._lanes = LaneTable(sizes.max_lanes)
        self._num_blocks: dict[int, int] = {}
        self._num_steps = 0
        self._rows = queue.host_tensor((RING, sizes.max_lanes), torch.int64)
        state.restart()

    def launch(self, items: Sequence[BatchItem]) -> InFlight:
        """Enqueue a step; see `DecodeRunner`. Does not wait for the device."""
        self._enter_and_leave(items)
        bucket = self._lanes.bucket()
        adjusts = any(is_adjusted(item.sequence.sampling) for item in items)
        lanes = [self._lanes.lane(item.sequence.transfer_id) for item in items]
        self._write_grammars(items, lanes)
        with self._queue.active():
            logits = self._compute(bucket, adjusts)
        ring = self._num_steps % RING
        self._num_steps += 1
        row, mark = self._queue.fetch(self._state.all.emitted[ring, :bucket], self._rows[ring, :bucket])
        num_logprobs = [item.sequence.sampling.num_logprobs for item in items]
        wanted = any(num is not None for num in num_logprobs)
        logprobs = fetch_logprobs(logits, self._state.all.token_ids[:bucket], self._queue) if wanted else None
        return LaneInFlight(row, mark, lanes, num_logprobs, logprobs)

    def _write_grammars(self, items: Sequence[BatchItem], lanes: Sequence[int]) -> None:
        found = [
            (lane, item.sequence.grammar)
            for lane, item in zip(lanes, items, strict=True)
            # Of a token that is replayed the next one is known.
            if item.sequence.grammar is not None and item.start + 1 == len(item.sequence.tokens)
        ]
        self._state.write_grammars([lane for lane, _ in found], [grammar for _, grammar in found])

    def _enter_and_leave(self, items: Sequence[BatchItem]) -> None:
        asked = [item.sequence.transfer_id for item in items]
        if len(asked) == len(self._lanes) and all(transfer_id in self._lanes for transfer_id in asked):
            self._write_grown(items)
            return
        left = [self._lanes.release(transfer_id) for transfer_id in self._lanes.others(asked)]
        for transfer_id in [t for t in self._num_blocks if t not in self._lanes]:
            del self._num_blocks[transfer_id]
        self._state.move(self._lanes.compact())
        new = [item for item in items if item.sequence.transfer_id not in self._lanes]
        lanes = [self._lanes.assign(item.sequence.transfer_id) for item in new]
        self._write_grown([item for item in items if item.sequence.transfer_id in self._num_blocks])
        used = {self._lanes.lane(transfer_id) for transfer_id in asked}
        if left:
            self._state.clear([lane for lane in range(self._lanes.max_lanes) if lane not in used])
        self._state.write(lanes, new)
        self._num_blocks |= {item.sequence.transfer_id: len(item.sequence.block_ids) for item in new}

    def _write_grown(self, items: Sequence[BatchItem]) -> None:
        known = self._num_blocks
        grown = [i.sequence for i in items if len(i.sequence.block_ids) != known[i.sequence.transfer_id]]
        self._state.write_tables([self._lanes.lane(s.transfer_id) for s in grown], grown)
        for sequence in grown:
            known[sequence.transfer_id] = len(sequence.block_ids)


@dataclass(frozen=True, slots=True)
class LaneInFlight:
    """A step on its way: the row of tokens by lane, valid once its mark is passed."""

    row: Tensor
    mark: Mark
    lanes: list[int]
    num_logprobs: list[int | None]
    logprobs: FetchedLogprobs | None

    def is_done(self) -> bool:
        """Whether tokens and log probabilities have arrived."""
        return self.mark.is_passed() and (self.logprobs is None or self.logprobs.is_done())

    def results(self) -> list[Sampled]:
        """Wait, then return what was drawn."""
        self.mark.wait()
        if self.logprobs is not None:
            self.logprobs.wait()
        tokens = self.row.tolist()
        samples = []
        for lane, num_top in zip(self.lanes, self.num_logprobs, strict=True):
            wanted = num_top is not None and self.logprobs is not None and tokens[lane] != NO_TOKEN
            logprobs = self.logprobs.row(lane, num_top or 0) if wanted and self.logprobs is not None else None
            samples.append(Sampled(tokens[lane], logprobs))
        return samples
