"""Decode attention over the paged cache: one query per sequence, split over its context, combined in the same kernel.

Life of one launch, grid (rows x KV heads, programs):
1. A row's context is cut into splits of equal size, at most `MAX_SPLITS`. The size follows from the row's own length
   alone, so that the row's bits depend neither on its batch nor on the number of programs.
2. The row's programs share its splits evenly, each a run of neighbours; programs without a split leave at once. All
   query heads of one KV head stand as rows of one matrix. A program walks its tiles of tokens in one pipelined loop;
   at the end of each split it writes the split's sums, maxima and normalisers, and begins anew.
3. Whoever comes last at the row's counter adds up the splits in index order, writes the row, and sets the counter back
   to 0 for the next launch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.interpreted import INTERPRETED

# Short splits let one short row use many multiprocessors; few splits keep what is written and read again small.
MIN_SPLIT_TOKENS = tl.constexpr(128)
MAX_SPLITS = tl.constexpr(32)
# About this many programs in a launch: several for each of an H200's 132 multiprocessors, since one alone cannot cover
# the memory's latency. However many rows there are, a long one is shared by a few, or all would wait for its end.
TARGET_PROGRAMS = 6 * 132
MIN_PROGRAMS_PER_ROW = 4
NUM_WARPS = 4
NUM_STAGES = 3
# A thread that adds up four neighbouring cells of a head loads their maximum in the same way, as four neighbours. One
# value handed to all threads would take a barrier a split, and the next split's loads would wait behind it.
NUM_COPIES = tl.constexpr(4)
# Stands for minus infinity: the difference of two of them is 0, not NaN.
LOWEST = tl.constexpr(-1e30)


@dataclass(frozen=True, slots=True)
class DecodeScratch:
    """What the programs of one launch leave for each other; one launch at a time may use it.

    sums: `[num_rows * num_kv_heads, num_splits, group * head_dim]` float32, not yet divided by the normalisers.
    scales: `[num_rows * num_kv_heads, num_splits, 2, group, 4]` float32, maxima (to base 2) and normalisers, each four
    times.
    counters: `[num_rows * num_kv_heads]` int32, 0 between launches.
    """

    sums: Tensor
    scales: Tensor
    counters: Tensor

    @classmethod
    def for_batch(
        cls,
        num_rows: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        max_context_tokens: int,
        device: torch.device,
    ) -> DecodeScratch:
        """Allocate for batches of up to `num_rows` rows whose block tables span up to `max_context_tokens`."""
        num_splits, group = max_splits(max_context_tokens), num_heads // num_kv_heads
        places = num_rows * num_kv_heads
        return cls(
            sums=torch.empty(places, num_splits, group * head_dim, dtype=torch.float32, device=device),
            scales=torch.empty(places, num_splits, 2, group, int(NUM_COPIES.value), dtype=torch.float32, device=device),
            counters=torch.zeros(places, dtype=torch.int32, device=device),
        )


def max_splits(max_context_tokens: int) -> int:
    """Give the largest number of splits of any context up to this long."""
    return min(int(MAX_SPLITS.value), max(1, -(-max_context_tokens // int(MIN_SPLIT_TOKENS.value))))


def tile_tokens(head_dim: int, itemsize: int) -> int:
    """Give how many tokens a program loads at once: so many that two programs fit on a multiprocessor."""
    return 64 if head_dim * itemsize <= 256 else 32


@triton.jit
def add_product(left, right, total):
    """Add a matrix product to `total`, in float32."""
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc=total, input_precision="tf32x3")


@triton.jit
def _split_tokens(seq_len):
    """Give the size of a row's splits: from its length alone."""
    return MIN_SPLIT_TOKENS * tl.maximum(tl.cdiv(seq_len, MIN_SPLIT_TOKENS * MAX_SPLITS), 1)


@triton.jit
def _read_length(seq_lens, row, max_context_tokens):
    """Read a row's length; one that its block table cannot hold is cut, so that nothing behind it is touched."""
    return tl.minimum(tl.maximum(tl.load(seq_lens + row), 0), max_context_tokens)


@triton.jit
def _attend_splits(
    query,
    keys,
    table,
    sums,
    scales,
    first_split,
    end_split,
    seq_len,
    scale_log2,
    kv_block_stride,
    kv_value_stride,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    tile: tl.constexpr,
):
    """Attend to a run of splits in one loop over their tiles, writing each split's partial result as it ends."""
    rows: tl.constexpr = query.shape[0]
    members, lanes, tokens = tl.arange(0, rows), tl.arange(0, query.shape[1]), tl.arange(0, tile)
    is_head, is_lane = members < group, lanes < head_dim
    tiles_per_split = _split_tokens(seq_len) // tile
    last_tile = tl.cdiv(seq_len, tile) - 1
    begin = first_split * tiles_per_split
    # Block ids are loaded one tile ahead: were they loaded beside their keys, the compiler would give half of its
    # stages to them. What stands in the table past the length is anything, and never read.
    first = begin * tile + tokens
    block = tl.load(table + first // block_size, mask=first < seq_len, other=0)
    maximum = tl.full([rows], LOWEST, tl.float32)
    # One normaliser per column: they are added up once a split, not once a tile.
    normalisers = tl.zeros([rows, tile], tl.float32)
    total = tl.zeros(query.shape, tl.float32)
    for index in range(begin, tl.minimum(end_split * tiles_per_split, last_tile + 1)):
        position = index * tile + tokens
        is_token = position < seq_len
        cell = block.to(tl.int64) * kv_block_stride + (position % block_size) * head_dim
        cells = keys + cell[:, None] + lanes[None, :]
        loaded = is_token[:, None] & is_lane[None, :]
        key = tl.load(cells, mask=loaded, other=0.0).to(query.dtype)
        value = tl.load(cells + kv_value_stride, mask=loaded, other=0.0).to(query.dtype)
        following = position + tile
        block = tl.load(table + following // block_size, mask=following < seq_len, other=0)

        scores = add_product(query, tl.trans(key), tl.zeros([rows, tile], tl.float32))
        scores = tl.where(is_token[None, :], scores * scale_log2, LOWEST)
        tile_in_split = index % tiles_per_split
        is_new = tile_in_split == 0
        before = tl.where(is_new, LOWEST, maximum)
        maximum = tl.maximum(before, tl.max(scores, 1))
        weights = tl.exp2(scores - maximum[:, None])
        decay = tl.exp2(before - maximum)[:, None]
        normalisers = tl.where(is_new, 0.0, normalisers * decay) + weights
        total = add_product(weights.to(query.dtype), value, tl.where(is_new, 0.0, total * decay))

        if (tile_in_split == tiles_per_split - 1) | (index == last_tile):
            split = index // tiles_per_split
            copies = tl.arange(0, NUM_COPIES)[None, :]
            to = scales + split * (2 * group * NUM_COPIES) + members[:, None] * NUM_COPIES + copies
            normaliser = tl.sum(normalisers, 1)
            tl.store(to, tl.broadcast_to(maximum[:, None], to.shape), mask=is_head[:, None])
            tl.store(to + group * NUM_COPIES, tl.broadcast_to(normaliser[:, None], to.shape), mask=is_head[:, None])
            to = sums + split * (group * head_dim) + members[:, None] * head_dim + lanes[None, :]
            tl.store(to, total, mask=is_head[:, None] & is_lane[None, :])


@triton.jit
def _combine(sums, scales, out, seq_len, group: tl.constexpr, head_dim: tl.constexpr):
    """Add the splits of one row and KV head in index order, and write the row; one of no tokens is zeros."""
    members = tl.arange(0, triton.next_power_of_2(group))
    lanes = tl.arange(0, triton.next_power_of_2(head_dim))
    splits = tl.arange(0, triton.next_power_of_2(MAX_SPLITS))
    num_splits = tl.cdiv(seq_len, _split_tokens(seq_len))
    is_head = members < group
    inside = is_head[:, None] & (lanes[None, :] < head_dim)
    cells = members[:, None] * head_dim + lanes[None, :]
    # Other programs wrote these: read past the first-level cache, which may hold what stood there before.
    maxima = tl.load(
        scales + (splits[:, None] * (2 * group) + members[None, :]) * NUM_COPIES,
        mask=(splits[:, None] < num_splits) & is_head[None, :],
        other=LOWEST,
        cache_modifier=".cg",
    )
    highest = tl.max(maxima, 0)[:, None]
    # Every cell reads a copy of the maximum and the normaliser of its own head.
    heads = members[:, None] * NUM_COPIES + lanes[None, :] % NUM_COPIES
    total = tl.zeros(cells.shape, tl.float32)
    normaliser = tl.zeros(cells.shape, tl.float32)
    for base in range(0, num_splits, 8):
        # Eight at a time, so that their loads are under way together.
        for step in tl.static_range(8):
            # Past the end the last one is read again, at no weight: loads without a condition can be issued at once.
            split = tl.minimum(base + step, num_splits - 1)
            at = scales + split * (2 * group * NUM_COPIES) + heads
            maximum = tl.load(at, mask=inside, other=LOWEST, cache_modifier=".cg")
            share = tl.load(at + group * NUM_COPIES, mask=inside, other=0.0, cache_modifier=".cg")
            part = tl.load(sums + split * (group * head_dim) + cells, mask=inside, other=0.0, cache_modifier=".cg")
            weight = tl.where(base + step < num_splits, tl.exp2(maximum - highest), 0.0)
            normaliser += weight * share
            total += weight * part
    result = total / tl.where(normaliser == 0.0, 1.0, normaliser)
    tl.store(out + cells, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["max_context_tokens", "scratch_splits"])
def _combine_kernel(
    sums,
    scales,
    out,
    seq_lens,
    max_context_tokens,
    scratch_splits,
    out_row_stride,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    row, head = place // num_kv_heads, place % num_kv_heads
    sums += place * scratch_splits * (group * head_dim)
    scales += place * scratch_splits * (2 * group * NUM_COPIES)
    out += row * out_row_stride + head * (group * head_dim)
    _combine(sums, scales, out, _read_length(seq_lens, row, max_context_tokens), group, head_dim)


@triton.jit(do_not_specialize=["table_stride", "max_context_tokens", "scratch_splits"])
def _decode_kernel(
    q,
    kv,
    block_tables,
    seq_lens,
    out,
    sums,
    scales,
    counters,
    scale_log2,
    q_row_stride,
    q_head_stride,
    out_row_stride,
    table_stride,
    kv_block_stride,
    kv_value_stride,
    kv_head_stride,
    max_context_tokens,
    scratch_splits,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    tile: tl.constexpr,
    fused_combine: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    row, head = place // num_kv_heads, place % num_kv_heads
    sums += place * scratch_splits * (group * head_dim)
    scales += place * scratch_splits * (2 * group * NUM_COPIES)
    out += row * out_row_stride + head * (group * head_dim)
    seq_len = _read_length(seq_lens, row, max_context_tokens)
    num_splits = tl.cdiv(seq_len, _split_tokens(seq_len))
    program = tl.program_id(1)
    num_active = tl.minimum(tl.num_programs(1), num_splits)
    if program >= num_active:
        if fused_combine and (program == 0):
            _combine(sums, scales, out, 0, group, head_dim)
        return

    members = tl.arange(0, max(16, triton.next_power_of_2(group)))
    lanes = tl.arange(0, triton.next_power_of_2(head_dim))
    query = tl.load(
        q + row * q_row_stride + (head * group + members[:, None]) * q_head_stride + lanes[None, :],
        mask=(members[:, None] < group) & (lanes[None, :] < head_dim),
        other=0.0,
    )
    _attend_splits(
        query,
        kv + head * kv_head_stride,
        block_tables + row * table_stride,
        sums,
        scales,
        program * num_splits // num_active,
        (program + 1) * num_splits // num_active,
        seq_len,
        scale_log2,
        kv_block_stride,
        kv_value_stride,
        group,
        head_dim,
        block_size,
        tile,
    )
    if fused_combine:
        # The barrier puts the other warps' writes before the counter's release; the counter's acquire and the second
        # barrier put the other programs' writes before every warp's reads.
        tl.debug_barrier()
        num_before = 0
        if num_active > 1:
            num_before = tl.atomic_add(counters + place, 1, sem="acq_rel", scope="gpu")
        if num_before == num_active - 1:
            tl.debug_barrier()
            _combine(sums, scales, out, seq_len, group, head_dim)
            tl.store(counters + place, 0)


def paged_decode_attention(
    q: Tensor,
    kv_layer: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    scratch: DecodeScratch | None = None,
    fused_combine: bool = True,
) -> Tensor:
    """Attend one query per sequence to its whole cached context; see `kernels.reference.paged_decode_attention`.

    The bits of a row depend on its own query, keys, values and length, and on nothing else. scratch: used by one
    launch at a time, at least as large as `DecodeScratch.for_batch` makes it for this batch and table; without it,
    one is allocated. fused_combine: False adds the splits in a second kernel (same bits). Enqueued, not synchronised.
    """
    (num_rows, num_heads, head_dim), num_kv_heads, block_size = q.shape, kv_layer.shape[2], kv_layer.shape[3]
    max_context_tokens = block_tables.shape[1] * block_size
    if num_rows == 0 or max_context_tokens == 0:
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    assert q.stride(2) == 1 and kv_layer.stride()[3:] == (head_dim, 1)
    assert block_tables.stride(1) == 1 and seq_lens.is_contiguous()
    group, places, num_splits = num_heads // num_kv_heads, num_rows * num_kv_heads, max_splits(max_context_tokens)
    if scratch is None:
        scratch = DecodeScratch.for_batch(num_rows, num_heads, num_kv_heads, head_dim, max_context_tokens, q.device)
    assert scratch.sums.shape[0] >= places and scratch.sums.shape[1] >= num_splits
    assert scratch.sums.shape[2] == group * head_dim
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_programs = min(num_splits, max(MIN_PROGRAMS_PER_ROW, -(-TARGET_PROGRAMS // places)))
    launch: Any = _decode_kernel[(places, num_programs)]
    launch(
        q,
        kv_layer,
        block_tables,
        seq_lens,
        out,
        scratch.sums,
        scratch.scales,
        scratch.counters,
        scale * math.log2(math.e),
        q.stride(0),
        q.stride(1),
        out.stride(0),
        block_tables.stride(0),
        *kv_layer.stride()[:3],
        max_context_tokens,
        scratch.sums.shape[1],
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        block_size=block_size,
        tile=tile_tokens(head_dim, max(q.element_size(), kv_layer.element_size())),
        fused_combine=fused_combine,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    if not fused_combine:
        _combine_separately(scratch, out, seq_lens, max_context_tokens, num_kv_heads)
    return out


def _combine_separately(
    scratch: DecodeScratch, out: Tensor, seq_lens: Tensor, max_context_tokens: int, num_kv_heads: int
) -> None:
    num_rows, num_heads, head_dim = out.shape
    launch: Any = _combine_kernel[(num_rows * num_kv_heads,)]
    launch(
        scratch.sums,
        scratch.scales,
        out,
        seq_lens,
        max_context_tokens,
        scratch.sums.shape[1],
        out.stride(0),
        num_kv_heads=num_kv_heads,
        group=num_heads // num_kv_heads,
        head_dim=head_dim,
        num_warps=NUM_WARPS,
    )
