"""`gather_blocks` and `scatter_blocks` of `kernels.reference` in Triton: copies of bytes, whatever they mean.

A layer range of one block is contiguous in the cache, and a piece of the slab. One program copies a tile of one piece.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_BYTES = 16_384
# What a program counts in: two neighbours make an access of 16 bytes. Narrower only where sizes or addresses are odd.
_UNITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


@triton.jit(do_not_specialize=["first_layer", "num_layers", "num_blocks"])
def _copy_kernel(
    cache,
    slab,
    block_ids,
    first_layer,
    num_layers,
    num_blocks,
    block: tl.constexpr,
    layer: tl.constexpr,
    tile: tl.constexpr,
    gathers: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    block_id = tl.load(block_ids + number)
    if (block_id >= 0) & (block_id < num_blocks):
        # Products with constants: the compiler sees what divides them, and keeps 16-byte accesses.
        piece = num_layers * layer
        place = tl.program_id(1) * tile + tl.arange(0, tile)
        inside = place < piece
        slab_place = slab + number * piece + place
        cache_place = cache + block_id * block + first_layer * layer + place
        if gathers:
            tl.store(slab_place, tl.load(cache_place, mask=inside), mask=inside)
        else:
            tl.store(cache_place, tl.load(slab_place, mask=inside), mask=inside)


def gather_blocks(kv_cache: Tensor, block_ids: Tensor, first_layer: int, num_layers: int, out: Tensor) -> None:
    """See `kernels.reference.gather_blocks`. Enqueued, not synchronised; ids outside the cache are skipped."""
    _copy(kv_cache, block_ids, first_layer, num_layers, out, gathers=True)


def scatter_blocks(kv_cache: Tensor, block_ids: Tensor, first_layer: int, num_layers: int, src: Tensor) -> None:
    """See `kernels.reference.scatter_blocks`. Enqueued, not synchronised; ids outside the cache are skipped."""
    _copy(kv_cache, block_ids, first_layer, num_layers, src, gathers=False)


def _copy(
    kv_cache: Tensor, block_ids: Tensor, first_layer: int, num_layers: int, slab: Tensor, *, gathers: bool
) -> None:
    assert kv_cache.is_contiguous() and 0 <= first_layer <= first_layer + num_layers <= kv_cache.shape[1]
    num_ids, element_bytes = block_ids.numel(), kv_cache.element_size()
    block_bytes = math.prod(kv_cache.shape[1:]) * element_bytes
    layer_bytes = block_bytes // kv_cache.shape[1]
    slab_bytes, num_bytes = slab.numel() * slab.element_size(), num_ids * num_layers * layer_bytes
    if slab_bytes != num_bytes or not slab.is_contiguous():
        raise ValueError(f"slab of {slab_bytes} bytes for {num_bytes} bytes of KV blocks")
    if num_bytes == 0:
        return
    unit = math.gcd(8, layer_bytes, kv_cache.data_ptr(), slab.data_ptr())
    launch: Any = _copy_kernel[(num_ids, triton.cdiv(num_layers * layer_bytes, TILE_BYTES))]
    launch(
        _in_units(kv_cache, unit),
        _in_units(slab, unit),
        block_ids.contiguous(),
        first_layer,
        num_layers,
        kv_cache.shape[0],
        block=block_bytes // unit,
        layer=layer_bytes // unit,
        tile=TILE_BYTES // unit,
        gathers=gathers,
    )


def _in_units(tensor: Tensor, unit: int) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8).view(_UNITS[unit])
