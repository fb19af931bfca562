"""The norms of query and key heads, their rotation, and the write of keys and values, in one Triton kernel.

One program a token and up to 16 heads: q heads first, then k heads, then v heads, as they stand in the packed row. All
heads of a program take the same steps; which of the results counts is told by the head. A program a head would be
400,000 of them for a long prompt, and starting them would take longer than their work.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels.gpu.interpreted  # noqa: F401  mends the interpreter
from kernels.reference import HeadNorms

_MAX_TILE_HEADS = 16


@triton.jit
def _factors(q_weight, k_weight, column, inside, is_query):
    query = tl.load(q_weight + column, mask=inside, other=0.0).to(tl.float32)
    key = tl.load(k_weight + column, mask=inside, other=0.0).to(tl.float32)
    return tl.where(is_query[:, None], query[None, :], key[None, :])


@triton.jit
def _normed(first, second, q_weight, k_weight, column, inside, is_query, half: tl.constexpr, eps):
    dtype = first.dtype
    a, b = first.to(tl.float32), second.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(a * a + b * b, axis=1) / (2 * half) + eps)
    left = _factors(q_weight, k_weight, column, inside, is_query)
    right = _factors(q_weight + half, k_weight + half, column, inside, is_query)
    # Rounded before and after the weight comes in, as the reference's norm does.
    return (
        ((a * scale[:, None]).to(dtype).to(tl.float32) * left).to(dtype),
        ((b * scale[:, None]).to(dtype).to(tl.float32) * right).to(dtype),
    )


@triton.jit
def _rope_kernel(
    qkv,
    positions,
    cosines,
    sines,
    kv,
    slots,
    q_weight,
    k_weight,
    out,
    eps,
    qkv_stride,
    kv_block_stride,
    kv_value_stride,
    kv_head_stride,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    half: tl.constexpr,
    width: tl.constexpr,
    tile_heads: tl.constexpr,
    block_size: tl.constexpr,
    has_norms: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * tile_heads + tl.arange(0, tile_heads)
    column = tl.arange(0, width)
    inside = column < half
    is_query, is_value = head < num_heads, head >= num_heads + num_kv_heads
    is_there = (head < num_heads + 2 * num_kv_heads)[:, None] & inside[None, :]
    row = qkv + token * qkv_stride + head[:, None] * (2 * half) + column[None, :]
    first = tl.load(row, mask=is_there, other=0.0)
    second = tl.load(row + half, mask=is_there, other=0.0)
    a, b = first, second
    if has_norms:
        a, b = _normed(first, second, q_weight, k_weight, column, inside, is_query, half, eps)
    a, b = a.to(tl.float32), b.to(tl.float32)
    place = tl.load(positions + token) * half
    cos = tl.load(cosines + place + column, mask=inside, other=0.0)[None, :]
    sin = tl.load(sines + place + column, mask=inside, other=0.0)[None, :]
    dtype = first.dtype
    first = tl.where(is_value[:, None], first, (a * cos - b * sin).to(dtype))
    second = tl.where(is_value[:, None], second, (b * cos + a * sin).to(dtype))

    target = out + (token * num_heads + head)[:, None] * (2 * half) + column[None, :]
    is_target = is_there & is_query[:, None]
    tl.store(target, first, mask=is_target)
    tl.store(target + half, second, mask=is_target)
    slot = tl.load(slots + token)
    if slot >= 0:
        kv_head = tl.where(is_value, head - num_heads - num_kv_heads, head - num_heads)
        offset = kv_head * kv_head_stride + tl.where(is_value, kv_value_stride, 0)
        target = kv + (slot // block_size) * kv_block_stride + (slot % block_size) * (2 * half)
        target = target + offset[:, None] + column[None, :]
        is_target = is_there & (head >= num_heads)[:, None]
        tl.store(target, first.to(kv.dtype.element_ty), mask=is_target)
        tl.store(target + half, second.to(kv.dtype.element_ty), mask=is_target)


def rope_store(
    qkv: Tensor,
    positions: Tensor,
    tables: tuple[Tensor, Tensor],
    kv_layer: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
    norms: HeadNorms | None = None,
) -> Tensor:
    """See `kernels.reference.rope_store`. Enqueued, not synchronised."""
    num_tokens, num_kv_heads, block_size, head_dim = qkv.shape[0], *kv_layer.shape[2:]
    assert qkv.stride(1) == 1 and kv_layer.stride()[3:] == (head_dim, 1)
    assert tables[0].is_contiguous() and tables[1].is_contiguous()
    out = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if num_tokens == 0:
        return out
    num_rows = num_heads + 2 * num_kv_heads
    tile_heads = min(_MAX_TILE_HEADS, triton.next_power_of_2(num_rows))
    launch: Any = _rope_kernel[(num_tokens, -(-num_rows // tile_heads))]
    launch(
        qkv,
        positions,
        *tables,
        kv_layer,
        slot_mapping,
        norms.query if norms else qkv,
        norms.key if norms else qkv,
        out,
        norms.eps if norms else 0.0,
        qkv.stride(0),
        *kv_layer.stride()[:3],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        half=head_dim // 2,
        width=triton.next_power_of_2(head_dim // 2),
        tile_heads=tile_heads,
        block_size=block_size,
        has_norms=norms is not None,
        num_warps=4,
    )
    return out
