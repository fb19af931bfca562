"""Prefill attention over the paged cache: ragged chunks of queries, causal over what is cached and over themselves.

Life of one launch, grid (KV heads, query tiles), which depends on shapes alone:
1. A query tile holds some neighbouring queries of one sequence, each with all the heads of one KV head as rows. There
   are `T // queries + S` of them: sequence s begins at tile `query_start[s] // queries + s`, so that no two overlap.
   A program finds its sequence by bisection; surplus programs leave. The last tiles, which see most, start first.
2. It walks the sequence's keys from position 0 in tiles of a fixed size, two copies of one loop: tiles that all of its
   queries see whole, then those that the diagonal cuts.
3. Rows are divided by their normalisers and written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.decode_attention import LOWEST, add_product


@dataclass(frozen=True, slots=True)
class TileShape:
    """What one program multiplies at once: rows (queries times the heads of one KV head) by tokens."""

    rows: int
    tokens: int
    num_warps: int
    num_stages: int


def tile_shape(head_dim: int, itemsize: int, group: int) -> TileShape:
    """Give the tiles for a model: the same for every batch, since a row's bits hang on how its keys are tiled.

    Two bytes an element: two warpgroups of tensor core instructions over 64 rows each. Float32, which no model is
    served in, multiplies in three parts and runs out of registers sooner.
    """
    if itemsize > 2:
        return TileShape(max(32 if head_dim <= 64 else 16, triton.next_power_of_2(group)), 32, 4, 2)
    return TileShape(max(128, triton.next_power_of_2(group)), 64 if head_dim <= 128 else 32, 8, 3)


@triton.jit
def _find_sequence(query_start, num_sequences, tile, queries: tl.constexpr):
    """Find the last sequence whose first tile is not behind this one."""
    low, high = tl.full((), 0, tl.int32), num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // queries + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _attend_tiles(
    state,
    query,
    place,
    begin,
    end,
    seq_len,
    keys,
    table,
    kv_block_stride,
    kv_value_stride,
    scale_log2,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    tile_tokens: tl.constexpr,
    is_cut: tl.constexpr,
):
    """Attend to tiles `begin .. end`; is_cut: some query of this program does not see all of their tokens.

    Both copies do the same arithmetic to what is visible (the fused multiply-add is written out, since the compiler
    fuses one copy and not the other), so that it does not matter to a row in which of them a tile falls.
    """
    maximum, normaliser, total = state
    tokens = tl.arange(0, tile_tokens)
    lanes = tl.arange(0, query.shape[1])
    first = begin * tile_tokens + tokens
    # Block ids are loaded one tile ahead: were they loaded beside their keys, the compiler would give half of its
    # stages to them. What stands in the table past the length is anything, and never read.
    block = tl.load(table + first // block_size, mask=first < seq_len, other=0)
    for index in range(begin, end):
        position = index * tile_tokens + tokens
        cell = block.to(tl.int64) * kv_block_stride + (position % block_size) * head_dim
        cells = keys + cell[:, None] + lanes[None, :]
        loaded = lanes[None, :] < head_dim
        if is_cut:
            loaded = loaded & (position[:, None] < seq_len)
        key = tl.load(cells, mask=loaded, other=0.0).to(query.dtype)
        value = tl.load(cells + kv_value_stride, mask=loaded, other=0.0).to(query.dtype)
        following = position + tile_tokens
        block = tl.load(table + following // block_size, mask=following < seq_len, other=0)

        scores = add_product(query, tl.trans(key), tl.zeros([query.shape[0], tile_tokens], tl.float32))
        if is_cut:
            scores = tl.where(position[None, :] <= place[:, None], scores, LOWEST)
        before = maximum
        maximum = tl.maximum(before, tl.max(scores, 1))
        decay = tl.exp2((before - maximum) * scale_log2)
        weights = tl.exp2(tl.fma(scores, scale_log2, -(maximum * scale_log2)[:, None]))
        normaliser = tl.fma(normaliser, decay, tl.sum(weights, 1))
        total = add_product(weights.to(query.dtype), value, total * decay[:, None])
    return maximum, normaliser, total


@triton.jit(do_not_specialize=["num_sequences", "max_context_tokens", "table_stride"])
def _prefill_kernel(
    q,
    kv,
    block_tables,
    query_start,
    seq_lens,
    out,
    scale_log2,
    q_row_stride,
    q_head_stride,
    out_row_stride,
    table_stride,
    kv_block_stride,
    kv_value_stride,
    kv_head_stride,
    num_sequences,
    max_context_tokens,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_tokens: tl.constexpr,
):
    queries: tl.constexpr = tile_rows // group
    head = tl.program_id(0).to(tl.int64)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    sequence = _find_sequence(query_start, num_sequences, tile, queries)
    first_row = tl.load(query_start + sequence)
    num_queries = tl.load(query_start + sequence + 1) - first_row
    first_query = (tile - first_row // queries - sequence) * queries
    if first_query >= num_queries:
        return
    seq_len = tl.load(seq_lens + sequence)

    rows, lanes = tl.arange(0, tile_rows), tl.arange(0, triton.next_power_of_2(head_dim))
    member = first_query + rows // group
    is_row = (rows < queries * group) & (member < num_queries)
    inside = is_row[:, None] & (lanes[None, :] < head_dim)
    row = (first_row + member).to(tl.int64)
    query_head = head * group + rows % group
    query = tl.load(
        q + (row * q_row_stride + query_head * q_head_stride)[:, None] + lanes[None, :], mask=inside, other=0.0
    )
    num_cached = seq_len - num_queries
    num_visible = num_cached + tl.minimum(first_query + queries, num_queries)
    num_whole = (num_cached + first_query + 1) // tile_tokens
    num_tiles = tl.cdiv(num_visible, tile_tokens)

    # A length that the block table cannot hold must not lead behind it.
    readable = tl.minimum(seq_len, max_context_tokens)
    keys = kv + head * kv_head_stride
    table = block_tables + sequence.to(tl.int64) * table_stride
    state = (
        tl.full([tile_rows], LOWEST, tl.float32),
        tl.zeros([tile_rows], tl.float32),
        tl.zeros([tile_rows, lanes.shape[0]], tl.float32),
    )
    # First the tiles that all queries see whole, then those that the diagonal cuts.
    for is_cut in tl.static_range(2):
        state = _attend_tiles(
            state,
            query,
            num_cached + member,
            num_whole * is_cut,
            num_tiles if is_cut else num_whole,
            readable,
            keys,
            table,
            kv_block_stride,
            kv_value_stride,
            scale_log2,
            head_dim,
            block_size,
            tile_tokens,
            is_cut,
        )
    _, normaliser, total = state
    result = total / normaliser[:, None]
    to = out + (row * out_row_stride + query_head * head_dim)[:, None] + lanes[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=inside)


def paged_prefill_attention(
    q: Tensor, kv_layer: Tensor, block_tables: Tensor, query_start: Tensor, seq_lens: Tensor, scale: float
) -> Tensor:
    """Attend ragged query chunks to their cached context; see `kernels.reference.paged_prefill_attention`.

    The bits of a row depend on its own query and on the keys and values up to its position, and on nothing else: not
    on the other sequences, nor on where the prompt was cut into chunks, nor on where the blocks lie. Rows past
    `query_start[S]` are not written. scale must be positive. Enqueued, not synchronised; lengths are read on the
    device only.
    """
    (num_rows, num_heads, head_dim), num_kv_heads, block_size = q.shape, kv_layer.shape[2], kv_layer.shape[3]
    num_sequences, group = seq_lens.shape[0], num_heads // num_kv_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_rows == 0 or num_sequences == 0:
        return out
    assert scale > 0
    assert q.stride(2) == 1 and kv_layer.stride()[3:] == (head_dim, 1) and block_tables.stride(1) == 1
    assert seq_lens.is_contiguous() and query_start.is_contiguous()
    shape = tile_shape(head_dim, max(q.element_size(), kv_layer.element_size()), group)
    num_tiles = num_rows // (shape.rows // group) + num_sequences
    launch: Any = _prefill_kernel[(num_kv_heads, num_tiles)]
    launch(
        q,
        kv_layer,
        block_tables,
        query_start,
        seq_lens,
        out,
        scale * math.log2(math.e),
        q.stride(0),
        q.stride(1),
        out.stride(0),
        block_tables.stride(0),
        *kv_layer.stride()[:3],
        num_sequences,
        block_tables.shape[1] * block_size,
        group=group,
        head_dim=head_dim,
        block_size=block_size,
        tile_rows=shape.rows,
        tile_tokens=shape.tokens,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
    return out
