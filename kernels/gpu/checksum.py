"""`kernels.checksum` on the device: two launches, no synchronisation.

1. Each program multiplies and adds a tile of whole words.
2. One program adds the tiles' sums and the tail of fewer than eight bytes, and mixes in the length.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import checksum as meaning

TILE_WORDS = 2048
SUMS_AT_ONCE = 1024

GAMMA = tl.constexpr(meaning.GAMMA)
M0, M1 = (tl.constexpr(multiplier) for multiplier in meaning.MIX_MULTIPLIERS)
S0, S1, S2 = (tl.constexpr(shift) for shift in meaning.MIX_SHIFTS)


@triton.jit
def _splitmix(number):
    z = (number + 1) * GAMMA
    z = (z ^ (z >> S0)) * M0
    z = (z ^ (z >> S1)) * M1
    return z ^ (z >> S2)


@triton.jit
def _product(word, index):
    """Return a word's part in the sum; both uint64."""
    return word * (_splitmix(2 * index) | 1) + (word >> 32) * (_splitmix(2 * index + 1) | 1)


@triton.jit(do_not_specialize=["num_words"])
def _tile_kernel(words, sums, num_words, tile: tl.constexpr):
    part = tl.program_id(0).to(tl.int64)
    index = part * tile + tl.arange(0, tile)
    word = tl.load(words + index, mask=index < num_words, other=0).to(tl.uint64, bitcast=True)
    # A word of zero adds nothing, wherever it stands.
    total = tl.sum(_product(word, index.to(tl.uint64)).to(tl.int64, bitcast=True), axis=0)
    tl.store(sums + part, total)


@triton.jit(do_not_specialize=["num_sums", "num_bytes"])
def _finish_kernel(octets, sums, out, num_sums, num_bytes, width: tl.constexpr):
    column = tl.arange(0, width)
    added = tl.zeros([width], tl.int64)
    start = num_sums * 0
    while start < num_sums:
        place = start + column
        added += tl.load(sums + place, mask=place < num_sums, other=0)
        start += width
    num_octets = num_bytes.to(tl.int64)
    whole = num_octets // 8
    byte = tl.arange(0, 8)
    octet = tl.load(octets + whole * 8 + byte, mask=whole * 8 + byte < num_octets, other=0).to(tl.int64)
    tail = tl.sum(octet << (byte * 8).to(tl.int64), axis=0).to(tl.uint64, bitcast=True)
    total = tl.sum(added, axis=0).to(tl.uint64, bitcast=True) + _product(tail, whole.to(tl.uint64))
    result = _splitmix(_splitmix(num_octets.to(tl.uint64)) + total)
    tl.store(out, result.to(tl.int64, bitcast=True))


def checksum(data: Tensor) -> Tensor:
    """Compute `kernels.checksum.checksum` of a tensor's bytes.

    data: contiguous, of any dtype, at an address divisible by 8; ValueError otherwise. Returns int64 `[1]`, the
    checksum's 64 bits. Enqueued, not synchronised.
    """
    if not data.is_contiguous() or data.data_ptr() % 8:
        raise ValueError("a checksum needs a contiguous tensor at an address divisible by 8")
    octets = data.reshape(-1).view(torch.uint8)
    num_bytes = octets.numel()
    num_words = num_bytes // 8
    num_tiles = triton.cdiv(num_words, TILE_WORDS)
    sums = torch.empty(num_tiles, dtype=torch.int64, device=data.device)
    out = torch.empty(1, dtype=torch.int64, device=data.device)
    if num_tiles:
        launch: Any = _tile_kernel[(num_tiles,)]
        launch(octets[: num_words * 8].view(torch.int64), sums, num_words, tile=TILE_WORDS)
    finish: Any = _finish_kernel[(1,)]
    finish(octets, sums, out, num_tiles, num_bytes, width=SUMS_AT_ONCE)
    return out
