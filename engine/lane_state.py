"""The device tensors of a decode batch, and how the host writes into them when membership changes.

Vectors of one dtype stand as rows of one matrix, so that a sequence that joins is a few small copies, not thirty.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from engine.batch import BatchItem
from engine.device_queue import DeviceQueue
from engine.device_sampler import FLOAT_FIELDS, MAX_ENDINGS, grammar_words, is_adjusted, padded, token_counts
from engine.grammar import GrammarState
from engine.lane_table import Move
from engine.sequence import Sequence
from kernels.lanes import LaneTensors
from kernels.sampling import SamplingTensors
from protocol.request import MAX_LOGIT_BIAS

RING = 4  # rows of tokens on the device: more than the steps in flight, so that none is overwritten before it is read
_FEW_ENDINGS = 16

_LONGS = ("token_ids", "positions", "num_known", "num_prompt_tokens", "max_output_tokens", "seed")
_INTS = ("is_alive", "top_k", "min_tokens")


@dataclass(frozen=True, slots=True)
class LaneSizes:
    """How large the tensors are.

    Attributes:
        max_lanes: sequences that run at once.
        max_blocks: width of a block table.
        max_model_len: tokens of the longest sequence.
        vocab_size: of the logits.
        block_size: tokens per block.
        num_biases, num_endings: most that a request may have of each.
    """

    max_lanes: int
    max_blocks: int
    max_model_len: int
    vocab_size: int
    block_size: int
    num_biases: int = MAX_LOGIT_BIAS
    num_endings: int = MAX_ENDINGS


class LaneState:
    """Owns the tensors of all lanes; used by one thread, enqueues on one queue and never waits.

    Args:
        sizes: of the tensors; all memory is taken here.
        queue: where writes are enqueued, in order with the steps.
    """

    def __init__(self, sizes: LaneSizes, queue: DeviceQueue) -> None:
        self._queue = queue
        self._sizes = sizes
        self._has_grammars = False
        with queue.active():
            self._longs = _filled(queue.device, torch.int64, 0, len(_LONGS), sizes.max_lanes)
            self._ints = _filled(queue.device, torch.int32, 0, len(_INTS), sizes.max_lanes)
            self._floats = _filled(queue.device, torch.float32, 0, len(FLOAT_FIELDS), sizes.max_lanes)
            named = dict(zip((*_LONGS, *_INTS, *FLOAT_FIELDS), self._vectors(), strict=True))
            for name in ("top_p", "repetition"):
                named[name].fill_(1.0)
            chosen = {name: named.pop(name) for name in (*FLOAT_FIELDS, "seed", "top_k", "min_tokens")}
            self.all = _lane_tensors(sizes, queue.device, named, _sampling_tensors(sizes, queue.device, chosen))

    def _vectors(self) -> list[Tensor]:
        return [*self._longs, *self._ints, *self._floats]

    def first(self, num_lanes: int) -> LaneTensors:
        """Give views of the first lanes."""
        sampling = replace(self.all.sampling, **_narrowed(self.all.sampling, num_lanes))
        views = _narrowed(self.all, num_lanes) | {"emitted": self.all.emitted[:, :num_lanes], "step": self.all.step}
        return replace(self.all, **views, sampling=sampling)

    def restart(self) -> None:
        """Begin to count steps from 0, as after a rehearsal of steps with every lane dead."""
        with self._queue.active():
            self.all.step.zero_()

    def move(self, moves: Seq[Move]) -> None:
        """Copy the state of lanes into others; no lane is both source and target."""
        if not moves:
            return
        sources = self._queue.upload(np.array([m.source for m in moves], np.int64))
        targets = self._queue.upload(np.array([m.target for m in moves], np.int64))
        with self._queue.active():
            for matrix in (self._longs, self._ints, self._floats):
                matrix.index_copy_(1, targets, matrix.index_select(1, sources))
            for rows in self._row_tensors():
                rows.index_copy_(0, targets, rows.index_select(0, sources))

    def clear(self, lanes: Seq[int]) -> None:
        """End these lanes."""
        if lanes:
            ids = self._queue.upload(np.array(lanes, np.int64))
            with self._queue.active():
                self.all.is_alive.index_fill_(0, ids, 0)
                self.all.sampling.temperature.index_fill_(0, ids, 0.0)  # or the sampler would go on drawing for them

    def write(self, lanes: Seq[int], items: Seq[BatchItem]) -> None:
        """Let sequences begin at `item.start`: their tokens up to there, at least, are known to the host."""
        if not lanes:
            return
        sequences = [item.sequence for item in items]
        ids = self._queue.upload(np.array(lanes, np.int64))
        longs = self._queue.upload(np.array([self._longs_of(i) for i in items], np.int64).T.copy())
        ints = self._queue.upload(np.array([_ints_of(s) for s in sequences], np.int32).T.copy())
        floats = self._queue.upload(np.array([_floats_of(s) for s in sequences], np.float32).T.copy())
        num_endings = self._sizes.num_endings
        endings = self._queue.upload(padded([s.sampling.ending_token_ids for s in sequences], num_endings))
        barred = self._queue.upload(padded([s.sampling.barred_token_ids for s in sequences], num_endings))
        with self._queue.active():
            self._longs.index_copy_(1, ids, longs)
            self._ints.index_copy_(1, ids, ints)
            self._floats.index_copy_(1, ids, floats)
            self.all.sampling.ending_ids.index_copy_(0, ids, barred)
            self.all.ending_ids.index_copy_(0, ids, endings[:, : self.all.ending_ids.shape[1]])
        self.write_tables(lanes, sequences)
        for lane, item in zip(lanes, items, strict=True):
            self._write_rare(lane, item)

    def write_grammars(self, lanes: Seq[int], grammars: Seq[GrammarState]) -> None:
        """Let the next step choose what these allow in their lanes, and anything in all others."""
        if not lanes and not self._has_grammars:
            return
        self._has_grammars = bool(lanes)
        sampling = self.all.sampling
        with self._queue.active():
            sampling.has_grammar.zero_()
            if lanes and sampling.grammar_bits is not None:
                ids = self._queue.upload(np.array(lanes, np.int64))
                words = self._queue.upload(grammar_words(grammars, self._sizes.vocab_size))
                sampling.has_grammar.index_fill_(0, ids, True)
                sampling.grammar_bits.index_copy_(0, ids, words)

    def write_tables(self, lanes: Seq[int], sequences: Seq[Sequence]) -> None:
        """Bring the block tables of these lanes up to date."""
        if not lanes:
            return
        width = max(len(s.block_ids) for s in sequences)
        rows = np.zeros((len(lanes), width), np.int32)
        for row, sequence in zip(rows, sequences, strict=True):
            row[: len(sequence.block_ids)] = sequence.block_table[: len(sequence.block_ids)]
        ids, tables = self._queue.upload(np.array(lanes, np.int64)), self._queue.upload(rows)
        with self._queue.active():
            self.all.block_tables[:, :width].index_copy_(0, ids, tables)

    def _write_rare(self, lane: int, item: BatchItem) -> None:
        """Write what most sequences lack: tokens to replay, a bias, counts for penalties."""
        sequence, p = item.sequence, item.sequence.sampling
        known = sequence.tokens[item.start + 1 :]
        with self._queue.active():
            sampling = self.all.sampling
            if known:
                tokens = self._queue.upload(np.array(known, np.int32))
                self.all.history[lane, item.start + 1 : item.start + 1 + len(known)].copy_(tokens)
            sampling.bias_ids[lane].fill_(-1)
            if p.logit_bias:
                pairs = np.array(p.logit_bias, np.float64)
                ids = self._queue.upload(pairs[:, 0].astype(np.int32))
                sampling.bias_ids[lane, : len(pairs)].copy_(ids)
                sampling.bias_values[lane, : len(pairs)].copy_(self._queue.upload(pairs[:, 1].astype(np.float32)))
            if is_adjusted(p) and sampling.counts is not None:
                first, end = sequence.num_prompt_tokens, item.start + 1
                counts = token_counts(sequence.tokens[:first], sequence.tokens[first:end], self._sizes.vocab_size)
                sampling.counts[lane].copy_(self._queue.upload(counts))

    def _longs_of(self, item: BatchItem) -> list[int]:
        s = item.sequence
        room = self._sizes.max_model_len - s.num_prompt_tokens
        most = min(s.sampling.max_tokens, room)
        return [s.tokens[item.start], item.start, len(s.tokens), s.num_prompt_tokens, most, s.sampling.seed]

    def _row_tensors(self) -> list[Tensor]:
        lanes, sampling = self.all, self.all.sampling
        rows = [lanes.block_tables, lanes.history, lanes.ending_ids, sampling.ending_ids, sampling.bias_ids]
        rows.append(sampling.bias_values)
        return rows if sampling.counts is None else [*rows, sampling.counts]


def _ints_of(sequence: Sequence) -> list[int]:
    p = sequence.sampling
    return [1, p.top_k, p.min_tokens]


def _floats_of(sequence: Sequence) -> list[float]:
    return [getattr(sequence.sampling, name) for name in FLOAT_FIELDS.values()]


def _narrowed(tensors: LaneTensors | SamplingTensors, num_lanes: int) -> dict[str, Tensor]:
    values = {field.name: getattr(tensors, field.name) for field in fields(tensors)}
    return {name: value[:num_lanes] for name, value in values.items() if isinstance(value, Tensor)}


def _lane_tensors(
    sizes: LaneSizes, device: torch.device, vectors: dict[str, Tensor], sampling: SamplingTensors
) -> LaneTensors:
    n = sizes.max_lanes
    return LaneTensors(
        block_tables=_filled(device, torch.int32, 0, n, sizes.max_blocks),
        history=_filled(device, torch.int32, 0, n, sizes.max_model_len),
        slot_mapping=_filled(device, torch.int64, -1, n),
        seq_lens=_filled(device, torch.int32, 0, n),
        emitted=_filled(device, torch.int64, -1, RING, n),
        step=_filled(device, torch.int64, 0, 1),
        ending_ids=_filled(device, torch.int32, -1, n, min(_FEW_ENDINGS, sizes.num_endings)),
        sampling=sampling,
        **vectors,
    )


def _sampling_tensors(sizes: LaneSizes, device: torch.device, vectors: dict[str, Tensor]) -> SamplingTensors:
    n = sizes.max_lanes
    return SamplingTensors(
        index=_filled(device, torch.int64, 0, n),
        ending_ids=_filled(device, torch.int32, -1, n, sizes.num_endings),
        bias_ids=_filled(device, torch.int32, -1, n, sizes.num_biases),
        bias_values=_filled(device, torch.float32, 0, n, sizes.num_biases),
        counts=_filled(device, torch.int32, 0, n, sizes.vocab_size),
        has_grammar=_filled(device, torch.bool, 0, n),
        grammar_bits=_filled(device, torch.int32, 0, n, -(-sizes.vocab_size // 32)),
        **vectors,
    )


def _filled(device: torch.device, dtype: torch.dtype, value: int, *shape: int) -> Tensor:
    return torch.full(shape, value, dtype=dtype, device=device)
