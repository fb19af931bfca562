"""Products with a weight matrix in Triton: one way for prompts, one for decode steps.

    linear, linear_silu                 tiles of rows and outputs, the whole depth in one program
    decode_linear, decode_linear_silu   few rows: the weights stream once, past all rows

Each sums a row in one order per weight, whatever the number of rows, so the bits of a row never depend on its company.
The two ways may differ from each other in the last bit.

A decode step has too few outputs to fill the machine with whole rows of a matrix, so its depth is split, the same way
for every batch. The programs of a tile leave partial sums in scratch memory; the last one to arrive adds them in order.
The transposed product is taken, weights on the left: they fill the 64 rows that Hopper's matrix instruction has, and
the few rows of x are its columns, padded to 16, 32 or 64. More of them come in groups of 64.

What holds a decode product to the memory's pace (`decode_split`, `decode_tile`):
- all programs run at once: a second wave of a few would cost as much again as the first;
- each keeps copies in flight while it waits, together some megabytes, as much as the memory's latency hides;
- with many columns a tile has twice the outputs, for x comes from the L2 cache once per tile and the cache has a pace.
The tile may therefore differ between batches. The order of summation does not: the instruction adds 16 of the depth at
a time to what it has, from the split's beginning to its end, in whatever tiles they arrive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fp8 import Fp8Matrix
from kernels.gpu.activation import silu_mul
from kernels.gpu.interpreted import INTERPRETED
from kernels.reference import Matrix

MULTIPROCESSORS = 132
SHARED_BYTES = 233_472  # of a multiprocessor; each program takes 1 KiB beside its own
SPLIT_UNIT = 128  # of the depth: a multiple of every tile's
MAX_COLUMNS = 64
MAX_SPLITS = 16
_SPLIT_OUTPUTS = 64
_MIN_UNITS_PER_SPLIT = 2
_MAX_STAGES = 8
PROMPT_TILE = (128, 256, 64, 8, 3)  # rows, outputs, depth, warps, stages


@dataclass(slots=True)
class LinearScratch:
    """Partial sums and arrival counts of split products; grows on demand, used by one launch at a time.

    partials: float32, flat. counters: int32, all 0 between launches.
    """

    partials: Tensor
    counters: Tensor

    @classmethod
    def on(cls, device: torch.device) -> LinearScratch:
        """Give empty scratch on a device."""
        return cls(torch.empty(0, device=device), torch.zeros(0, dtype=torch.int32, device=device))

    def reserve(self, num_partials: int, num_counters: int) -> None:
        """Grow if need be; never while a graph is recorded, if the largest batch ran before."""
        if self.partials.numel() < num_partials:
            self.partials = torch.empty(num_partials, device=self.partials.device)
        if self.counters.numel() < num_counters:
            self.counters = torch.zeros(num_counters, dtype=torch.int32, device=self.counters.device)


@triton.jit
def _add_product(left, right, total):
    if INTERPRETED:
        return total + tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    return tl.dot(left, right, acc=total, input_precision="ieee")


@triton.jit
def _as_type(tile, dtype: tl.constexpr):
    if INTERPRETED:
        return tile.to(tl.float32)
    return tile.to(dtype)


@triton.jit
def _weights(weight, rows, is_row, place, inside, depth: tl.constexpr, dtype: tl.constexpr):
    spots = weight + rows[:, None] * depth + place[None, :]
    return _as_type(tl.load(spots, mask=is_row[:, None] & inside[None, :], other=0.0), dtype)


@triton.jit
def _gathered(partials, place, num_splits: tl.constexpr, split_stride, offsets):
    """Add the stretches in order; they were written by other programs, so not through the nearest cache."""
    total = tl.load(partials + place + offsets, cache_modifier=".cg")
    for split in range(1, num_splits):
        total += tl.load(partials + split * split_stride + place + offsets, cache_modifier=".cg")
    return total


@triton.jit
def _finished(total, scales, bias, rows, is_row, has_scales: tl.constexpr, has_bias: tl.constexpr):
    if has_scales:
        total *= tl.load(scales + rows, mask=is_row, other=0.0)[:, None]
    if has_bias:
        total += tl.load(bias + rows, mask=is_row, other=0.0).to(tl.float32)[:, None]
    return total


@triton.jit(do_not_specialize=["num_columns"])
def _decode_kernel(
    x,
    weight,
    scales,
    bias,
    out,
    partials,
    counters,
    num_columns,
    x_stride,
    outputs: tl.constexpr,
    depth: tl.constexpr,
    split_depth: tl.constexpr,
    num_splits: tl.constexpr,
    tile_outputs: tl.constexpr,
    tile_columns: tl.constexpr,
    tile_depth: tl.constexpr,
    has_scales: tl.constexpr,
    has_bias: tl.constexpr,
    is_gated: tl.constexpr,
):
    # Groups of rows of x stand next to each other, so that they find a tile of weights in the L2 cache.
    group, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tile.to(tl.int64) * tile_outputs + tl.arange(0, tile_outputs)
    is_row = rows < outputs
    columns = group.to(tl.int64) * tile_columns + tl.arange(0, tile_columns)
    is_column = columns < num_columns
    dtype = x.dtype.element_ty
    total = tl.zeros([tile_outputs, tile_columns], dtype=tl.float32)
    up = tl.zeros([tile_outputs, tile_columns], dtype=tl.float32)
    first = split * split_depth
    last = tl.minimum(first + split_depth, depth)
    for start in range(first, last, tile_depth):
        place = start + tl.arange(0, tile_depth)
        inside = place < depth
        spots = x + columns[None, :] * x_stride + place[:, None]
        v = tl.load(spots, mask=inside[:, None] & is_column[None, :], other=0.0)
        total = _add_product(_weights(weight, rows, is_row, place, inside, depth, dtype), v, total)
        if is_gated:
            up = _add_product(_weights(weight, rows + outputs, is_row, place, inside, depth, dtype), v, up)
    if num_splits > 1:
        area: tl.constexpr = tile_outputs * tile_columns
        halves: tl.constexpr = 2 if is_gated else 1
        offsets = tl.arange(0, tile_outputs)[:, None] * tile_columns + tl.arange(0, tile_columns)[None, :]
        spot = tile * tl.num_programs(0) + group
        place = spot.to(tl.int64) * (area * halves)
        stride = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * (area * halves)
        tl.store(partials + split * stride + place + offsets, total)
        if is_gated:
            tl.store(partials + split * stride + place + area + offsets, up)
        # The barrier puts the other warps' writes before the count's release; its acquire and the second barrier put
        # the other programs' writes before every warp's reads.
        tl.debug_barrier()
        if tl.atomic_add(counters + spot, 1, sem="acq_rel", scope="gpu") < num_splits - 1:
            return
        tl.debug_barrier()
        total = _gathered(partials, place, num_splits, stride, offsets)
        if is_gated:
            up = _gathered(partials, place + area, num_splits, stride, offsets)
        tl.store(counters + spot, 0)
    total = _finished(total, scales, bias, rows, is_row, has_scales, has_bias)
    if is_gated:
        # Rounded as the reference does, which has the product, the activation and their product in x's type.
        up = _finished(up, scales, bias, rows + outputs, is_row, has_scales, False).to(dtype).to(tl.float32)
        gate = total.to(dtype).to(tl.float32)
        total = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up
    target = out + columns[None, :] * outputs + rows[:, None]
    tl.store(target, total.to(dtype), mask=is_row[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _prompt_kernel(
    x,
    weight,
    scales,
    bias,
    out,
    num_rows,
    x_stride,
    outputs: tl.constexpr,
    depth: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_outputs: tl.constexpr,
    tile_depth: tl.constexpr,
    group_rows: tl.constexpr,
    has_scales: tl.constexpr,
    has_bias: tl.constexpr,
):
    # Programs that run together share rows and weights in the L2 cache: groups of row tiles, column by column.
    program = tl.program_id(0)
    row_tiles, output_tiles = tl.cdiv(num_rows, tile_rows), tl.cdiv(outputs, tile_outputs)
    per_group = group_rows * output_tiles
    first_tile = program // per_group * group_rows
    size = tl.minimum(row_tiles - first_tile, group_rows)
    row_tile, output_tile = first_tile + program % per_group % size, program % per_group // size

    rows = row_tile.to(tl.int64) * tile_rows + tl.arange(0, tile_rows)
    columns = output_tile.to(tl.int64) * tile_outputs + tl.arange(0, tile_outputs)
    is_row, is_column = rows < num_rows, columns < outputs
    steps = tl.arange(0, tile_depth)
    total = tl.zeros([tile_rows, tile_outputs], dtype=tl.float32)
    for step in range(0, tl.cdiv(depth, tile_depth)):
        place = step * tile_depth + steps
        inside = place < depth
        v = tl.load(x + rows[:, None] * x_stride + place[None, :], mask=is_row[:, None] & inside[None, :], other=0.0)
        w = tl.load(
            weight + columns[None, :] * depth + place[:, None], mask=inside[:, None] & is_column[None, :], other=0.0
        )
        total = _add_product(v, _as_type(w, x.dtype.element_ty), total)
    if has_scales:
        total *= tl.load(scales + columns, mask=is_column, other=0.0)[None, :]
    if has_bias:
        total += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    target = out + rows[:, None] * outputs + columns[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@dataclass(frozen=True, slots=True)
class DecodeSplit:
    """How decode cuts a weight's depth: a property of the weight, never of the batch.

    num_splits: none of them empty. depth: of each but the last, a multiple of `SPLIT_UNIT`.
    """

    num_splits: int
    depth: int


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """What one program of a decode product does at a time; the bits of a result do not depend on it.

    outputs, columns, depth: of a tile; gated, it has so many outputs of the gate and as many of the other half.
    num_resident: programs that a multiprocessor has room for.
    """

    outputs: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    num_resident: int


def decode_split(outputs: int, depth: int, num_splits: int = 0) -> DecodeSplit:
    """Cut a weight of so many outputs (a half of them, if gated) for two programs or so on each multiprocessor.

    Up to three are resident (see `decode_tile`), and rounding gives at most that many. num_splits 0 chooses, else so
    many are taken if the depth has them.
    """
    num_units = -(-depth // SPLIT_UNIT)
    if num_splits == 0:
        wanted = round(2 * MULTIPROCESSORS / -(-outputs // _SPLIT_OUTPUTS))
        num_splits = max(1, min(wanted, num_units // _MIN_UNITS_PER_SPLIT, MAX_SPLITS))
    units_per_split = -(-num_units // min(num_splits, num_units))
    return DecodeSplit(-(-num_units // units_per_split), units_per_split * SPLIT_UNIT)


def decode_tile(num_columns: int, itemsize: int, weight_itemsize: int, *, is_gated: bool) -> DecodeTile:
    """Choose the tile for a batch of so many rows, by the bytes of an element of x and of the weight.

    A stage holds 128 bytes of each output's weights, half of that where not three stages have room. Tiles of twice the
    outputs are half as many programs, of which two a multiprocessor are resident in place of three.
    """
    columns = min(MAX_COLUMNS, max(16, triton.next_power_of_2(num_columns)))
    is_tall = columns > 16 and not is_gated
    outputs, num_resident = (128, 2) if is_tall else (64, 3)
    budget_bytes = SHARED_BYTES // num_resident - 1024
    for depth in (128 // weight_itemsize, 64 // weight_itemsize):
        stage_bytes = depth * (outputs * weight_itemsize * (2 if is_gated else 1) + columns * itemsize)
        if budget_bytes // stage_bytes >= 3:
            break
    num_stages = min(_MAX_STAGES, budget_bytes // stage_bytes)
    return DecodeTile(outputs, columns, depth, 8 if is_tall else 4, num_stages, num_resident)


def decode_linear(
    x: Tensor, weight: Matrix, bias: Tensor | None = None, scratch: LinearScratch | None = None, num_splits: int = 0
) -> Tensor:
    """See `kernels.reference.linear`; x `[M, K]`, meant for M up to a few hundred.

    scratch: used by one launch at a time; without it some is allocated. num_splits: 0 chooses by the weight. The bits
    of a row depend on its own values and on the weight. Enqueued, not synchronised.
    """
    return _decode(x, weight, bias, scratch, num_splits, is_gated=False)


def decode_linear_silu(x: Tensor, weight: Matrix, scratch: LinearScratch | None = None, num_splits: int = 0) -> Tensor:
    """See `kernels.reference.linear_silu`, and `decode_linear` for the rest."""
    return _decode(x, weight, None, scratch, num_splits, is_gated=True)


def linear(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """See `kernels.reference.linear`; x `[M, K]`, any M. A row's bits depend on its own values and on the weight.

    Enqueued, not synchronised.
    """
    data, scales = _parts(weight)
    (num_rows, depth), outputs = x.shape, data.shape[0]
    assert x.stride(1) == 1 and data.is_contiguous()
    out = torch.empty((num_rows, outputs), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    # Of float32, which is there for exactness, tiles of this size would not fit.
    rows, columns, tile_depth, num_warps, num_stages = (64, 64, 32, 4, 2) if x.dtype == torch.float32 else PROMPT_TILE
    launch: Any = _prompt_kernel[(-(-num_rows // rows) * -(-outputs // columns),)]
    launch(
        x, data, scales if scales is not None else x, bias if bias is not None else x, out, num_rows, x.stride(0),
        outputs=outputs, depth=depth, tile_rows=rows, tile_outputs=columns, tile_depth=tile_depth, group_rows=8,
        has_scales=scales is not None, has_bias=bias is not None, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out


def linear_silu(x: Tensor, weight: Matrix) -> Tensor:
    """See `kernels.reference.linear_silu`, and `linear` for the rest."""
    return silu_mul(linear(x, weight))


def _decode(
    x: Tensor, weight: Matrix, bias: Tensor | None, scratch: LinearScratch | None, num_splits: int, *, is_gated: bool
) -> Tensor:
    data, scales = _parts(weight)
    (num_columns, depth), outputs = x.shape, data.shape[0] // (2 if is_gated else 1)
    assert x.stride(1) == 1 and data.is_contiguous()
    out = torch.empty((num_columns, outputs), dtype=x.dtype, device=x.device)
    if num_columns == 0:
        return out
    split = decode_split(outputs, depth, num_splits)
    tile = decode_tile(num_columns, x.element_size(), data.element_size(), is_gated=is_gated)
    num_groups, num_tiles = -(-num_columns // tile.columns), -(-outputs // tile.outputs)
    scratch = scratch or LinearScratch.on(x.device)
    if split.num_splits > 1:
        area = tile.outputs * tile.columns * (2 if is_gated else 1)
        # As many counters as the smallest tiles need, so that a smaller batch never asks for more than a larger one.
        num_counters = num_groups * -(-outputs // _SPLIT_OUTPUTS)
        scratch.reserve(split.num_splits * num_tiles * num_groups * area, num_counters)
    launch: Any = _decode_kernel[(num_groups, num_tiles, split.num_splits)]
    launch(
        x, data, scales if scales is not None else x, bias if bias is not None else x, out,
        scratch.partials, scratch.counters, num_columns, x.stride(0),
        outputs=outputs, depth=depth, split_depth=split.depth, num_splits=split.num_splits,
        tile_outputs=tile.outputs, tile_columns=tile.columns, tile_depth=tile.depth,
        has_scales=scales is not None, has_bias=bias is not None, is_gated=is_gated,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def _parts(weight: Matrix) -> tuple[Tensor, Tensor | None]:
    return (weight.data, weight.scales) if isinstance(weight, Fp8Matrix) else (weight, None)
