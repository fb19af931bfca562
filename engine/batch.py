"""Turn sequences into the tensors of one forward."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from engine.sequence import Sequence, num_blocks_for
from model.batch import ForwardBatch
from protocol.readout import Pooling, ReadEmbedding, ReadPrompt


@dataclass(frozen=True, slots=True)
class BatchItem:
    """A run of tokens of one sequence to compute: positions [start, start + num_tokens).

    `wants_logits`: the last of them is sampled from, or read. A `ReadPrompt` has its logits read in every item, the
    mean of an embedding its states.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    wants_logits: bool

    @property
    def num_logit_rows(self) -> int:
        """How many of its rows get logits, or are read as states."""
        if isinstance(self.sequence.readout, ReadPrompt):
            # Nothing follows the prompt's last token: its row says nothing about the prompt.
            return min(self.num_tokens, self.sequence.num_prefill_tokens - 1 - self.start)
        if _is_mean(self.sequence):
            return self.num_tokens
        return int(self.wants_logits)


def build_batch(
    items: Seq[BatchItem], block_size: int, upload: Callable[[np.ndarray[Any, Any]], Tensor], *, may_decode: bool = True
) -> ForwardBatch:
    """Return the batch of these items, rows in their order. Every position must have a block.

    Args:
        items: at least one.
        block_size: tokens per block.
        upload: turns an array into a tensor of the decoder's device.
        may_decode: whether a batch of single tokens may be marked as a decode step.
    """
    is_decode = may_decode and all(i.num_tokens == 1 and i.wants_logits and i.sequence.readout is None for i in items)
    counts = np.array([item.num_tokens for item in items], dtype=np.int32)
    query_start = np.zeros(len(items) + 1, dtype=np.int32)
    np.cumsum(counts, out=query_start[1:])
    seq_lens = np.array([item.start + item.num_tokens for item in items], dtype=np.int32)
    tables = _tables(items, seq_lens, block_size)
    token_ids = np.concatenate([_run(item) for item in items])
    positions = np.concatenate([np.arange(i.start, i.start + i.num_tokens, dtype=np.int64) for i in items])
    owner = np.repeat(np.arange(len(items)), counts)
    slots = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
    last_rows = query_start[1:].astype(np.int64) - 1
    wanted = last_rows[[item.wants_logits for item in items]]
    if any(isinstance(item.sequence.readout, ReadPrompt) or _is_mean(item.sequence) for item in items):
        wanted = np.concatenate([_logit_rows(item, int(row)) for item, row in zip(items, query_start, strict=False)])

    return ForwardBatch(
        token_ids=upload(token_ids),
        positions=upload(positions),
        slot_mapping=upload(slots),
        query_start=upload(query_start),
        seq_lens=upload(seq_lens),
        block_tables=upload(tables),
        logits_indices=upload(wanted),
        is_decode=is_decode,
    )


def _is_mean(sequence: Sequence) -> bool:
    return isinstance(sequence.readout, ReadEmbedding) and sequence.readout.pooling is Pooling.MEAN


def _run(item: BatchItem) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.array(item.sequence.tokens[item.start : item.start + item.num_tokens], dtype=np.int64)


def _logit_rows(item: BatchItem, first_row: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    if isinstance(item.sequence.readout, ReadPrompt) or _is_mean(item.sequence):
        return np.arange(first_row, first_row + item.num_logit_rows, dtype=np.int64)
    last_row = first_row + item.num_tokens - 1
    return np.array([last_row] if item.wants_logits else [], dtype=np.int64)


def _tables(
    items: Seq[BatchItem], seq_lens: np.ndarray[tuple[int, ...], np.dtype[np.int32]], block_size: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    widths = [num_blocks_for(int(n), block_size) for n in seq_lens]
    tables = np.zeros((len(items), max(widths)), dtype=np.int32)
    for row, (item, width) in enumerate(zip(items, widths, strict=True)):
        tables[row, :width] = item.sequence.block_table[:width]
    return tables
