"""Turn sequences into the tensors of one forward."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from engine.sequence import Sequence, num_blocks_for
from model.batch import ForwardBatch


@dataclass(frozen=True, slots=True)
class BatchItem:
    """A run of tokens of one sequence to compute: positions [start, start + num_tokens).

    `wants_logits`: the last of them is sampled from.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    wants_logits: bool


def build_batch(items: Seq[BatchItem], block_size: int, device: torch.device) -> ForwardBatch:
    """Return the batch of these items, rows in their order. Every position must have a block."""
    is_decode = all(item.num_tokens == 1 and item.wants_logits for item in items)
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

    def tensor(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return ForwardBatch(
        token_ids=tensor(token_ids),
        positions=tensor(positions),
        slot_mapping=tensor(slots),
        query_start=tensor(query_start),
        seq_lens=tensor(seq_lens),
        block_tables=tensor(tables),
        logits_indices=tensor(wanted),
        is_decode=is_decode,
    )


def _run(item: BatchItem) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.array(item.sequence.tokens[item.start : item.start + item.num_tokens], dtype=np.int64)


def _tables(
    items: Seq[BatchItem], seq_lens: np.ndarray[tuple[int, ...], np.dtype[np.int32]], block_size: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    widths = [num_blocks_for(int(n), block_size) for n in seq_lens]
    tables = np.zeros((len(items), max(widths)), dtype=np.int32)
    for row, (item, width) in enumerate(zip(items, widths, strict=True)):
        tables[row, :width] = item.sequence.block_table[:width]
    return tables
