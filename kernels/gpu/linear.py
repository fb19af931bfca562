"""Products with a weight matrix in Triton: one way for prompts, one for decode steps.

    linear, linear_silu                 tiles of rows and outputs, the whole depth in one program
    decode_linear, decode_linear_silu   few rows: the weights stream once, past all rows

Each has one tile shape and one order of summation per weight, whatever the number of rows, so the bits of a row never
depend on its company. The two ways may differ from each other in the last bit.

A decode step has too few outputs to fill the machine with whole rows of a matrix, so its depth is split, the same way
for every batch. The programs of a tile leave partial sums in scratch memory; the last one to arrive adds them in order.
The transposed product is taken, weights on the left: they fill the 64 rows that Hopper's matrix instruction has, and
the few rows of x are its columns, padded to 16, 32 or 64.
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

TARGET_PROGRAMS = 264  # two for each multiprocessor of an H200
DECODE_OUTPUTS = 64
DECODE_DEPTH = 128
MAX_COLUMNS = 64
MAX_SPLITS = 16
_MIN_STEPS_PER_SPLIT = 2
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
def _decode_sums(
    x,
    weight,
    rows,
    is_row,
    columns,
    is_column,
    first_step,
    last_step,
    x_stride,
    depth: tl.constexpr,
    tile_depth: tl.constexpr,
    tile_outputs: tl.constexpr,
    tile_columns: tl.constexpr,
):
    """Sum one stretch of the depth: weights [tile_outputs, depth] times x transposed."""
    total = tl.zeros([tile_outputs, tile_columns], dtype=tl.float32)
    steps = tl.arange(0, tile_depth)
    for step in range(first_step, last_step):
        place = step * tile_depth + steps
        inside = place < depth
        w = tl.load(weight + rows[:, None] * depth + place[None, :], mask=is_row[:, None] & inside[None, :], other=0.0)
        v = tl.load(
            x + columns[None, :] * x_stride + place[:, None], mask=inside[:, None] & is_column[None, :], other=0.0
        )
        total = _add_product(_as_type(w, x.dtype.element_ty), v, total)
    return total


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
    steps_per_split: tl.constexpr,
    num_splits: tl.constexpr,
    tile_depth: tl.constexpr,
    tile_outputs: tl.constexpr,
    tile_columns: tl.constexpr,
    has_scales: tl.constexpr,
    has_bias: tl.constexpr,
    is_gated: tl.constexpr,
):
    tile, split, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tile.to(tl.int64) * tile_outputs + tl.arange(0, tile_outputs)
    is_row = rows < outputs
    columns = group.to(tl.int64) * tile_columns + tl.arange(0, tile_columns)
    is_column = columns < num_columns
    first = split * steps_per_split
    last = tl.minimum(first + steps_per_split, tl.cdiv(depth, tile_depth))
    total = _decode_sums(
        x,
        weight,
        rows,
        is_row,
        columns,
        is_column,
        first,
        last,
        x_stride,
        depth,
        tile_depth,
        tile_outputs,
        tile_columns,
    )
    up = total
    if is_gated:
        up = _decode_sums(
            x, weight, rows + outputs, is_row, columns, is_column, first, last, x_stride, depth,
            tile_depth, tile_outputs, tile_columns,
        )  # fmt: skip
    if num_splits > 1:
        area: tl.constexpr = tile_outputs * tile_columns
        halves: tl.constexpr = 2 if is_gated else 1
        offsets = tl.arange(0, tile_outputs)[:, None] * tile_columns + tl.arange(0, tile_columns)[None, :]
        spot = group * tl.num_programs(0) + tile
        place = spot.to(tl.int64) * (area * halves)
        stride = tl.num_programs(0).to(tl.int64) * tl.num_programs(2) * (area * halves)
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
    dtype = out.dtype.element_ty
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
class DecodeShape:
    """How decode cuts a weight: a property of the weight and of the type of x, never of the batch.

    num_tiles: of outputs. num_splits: stretches of the depth, of `steps_per_split` tiles of `tile_depth` each.
    """

    num_tiles: int
    num_splits: int
    steps_per_split: int
    tile_depth: int
    num_stages: int


def decode_shape(outputs: int, depth: int, itemsize: int, *, is_gated: bool, num_splits: int = 0) -> DecodeShape:
    """Choose the shape for a weight of so many outputs (a half of them, if gated); num_splits 0 chooses too.

    itemsize: bytes of an element of x.
    """
    tile_depth = DECODE_DEPTH * 2 // itemsize if itemsize <= 2 else 32
    num_steps, num_tiles = -(-depth // tile_depth), -(-outputs // DECODE_OUTPUTS)
    if num_splits == 0:
        wanted = round(TARGET_PROGRAMS / num_tiles)
        num_splits = max(1, min(wanted, num_steps // _MIN_STEPS_PER_SPLIT, MAX_SPLITS))
    steps_per_split = -(-num_steps // min(num_splits, num_steps))
    return DecodeShape(num_tiles, -(-num_steps // steps_per_split), steps_per_split, tile_depth, 3 if is_gated else 4)


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
    shape = decode_shape(outputs, depth, x.element_size(), is_gated=is_gated, num_splits=num_splits)
    tile_columns = min(MAX_COLUMNS, max(16, triton.next_power_of_2(num_columns)))
    num_groups = -(-num_columns // tile_columns)
    scratch = scratch or LinearScratch.on(x.device)
    if shape.num_splits > 1:
        area = DECODE_OUTPUTS * tile_columns * (2 if is_gated else 1)
        scratch.reserve(shape.num_splits * shape.num_tiles * num_groups * area, shape.num_tiles * num_groups)
    launch: Any = _decode_kernel[(shape.num_tiles, shape.num_splits, num_groups)]
    launch(
        x, data, scales if scales is not None else x, bias if bias is not None else x, out,
        scratch.partials, scratch.counters, num_columns, x.stride(0),
        outputs=outputs, depth=depth, steps_per_split=shape.steps_per_split, num_splits=shape.num_splits,
        tile_depth=shape.tile_depth, tile_outputs=DECODE_OUTPUTS, tile_columns=tile_columns,
        has_scales=scales is not None, has_bias=bias is not None, is_gated=is_gated,
        num_warps=4, num_stages=shape.num_stages,
    )  # fmt: skip
    return out


def _parts(weight: Matrix) -> tuple[Tensor, Tensor | None]:
    return (weight.data, weight.scales) if isinstance(weight, Fp8Matrix) else (weight, None)
