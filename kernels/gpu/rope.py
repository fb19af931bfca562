"""The norms of query and key heads, their rotation, and the write of keys and values, in one Triton kernel.

One program a token and head: q heads first, then k heads, then v heads, as they stand in the packed row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels.gpu.interpreted  # noqa: F401  mends the interpreter
from kernels.reference import HeadNorms


@triton.jit
def _normed(first, second, weight, column, inside, half: tl.constexpr, eps):
    dtype = first.dtype
    a, b = first.to(tl.float32), second.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn((tl.sum(a * a) + tl.sum(b * b)) / (2 * half) + eps)
    left = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(weight + half + column, mask=inside, other=0.0).to(tl.float32)
    # Rounded before and after the weight comes in, as the reference's norm does.
    return (
        ((a * scale).to(dtype).to(tl.float32) * left).to(dtype),
        ((b * scale).to(dtype).to(tl.float32) * right).to(dtype),
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
    block_size: tl.constexpr,
    has_norms: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    column = tl.arange(0, width)
    inside = column < half
    row = qkv + token * qkv_stride + head * (2 * half)
    first = tl.load(row + column, mask=inside, other=0.0)
    second = tl.load(row + half + column, mask=inside, other=0.0)
    is_query, is_value = head < num_heads, head >= num_heads + num_kv_heads
    if not is_value:
        if has_norms:
            if is_query:
                first, second = _normed(first, second, q_weight, column, inside, half, eps)
            else:
                first, second = _normed(first, second, k_weight, column, inside, half, eps)
        place = tl.load(positions + token) * half
        cos = tl.load(cosines + place + column, mask=inside, other=0.0)
        sin = tl.load(sines + place + column, mask=inside, other=0.0)
        a, b = first.to(tl.float32), second.to(tl.float32)
        first, second = (a * cos - b * sin).to(first.dtype), (b * cos + a * sin).to(second.dtype)
    if is_query:
        target = out + (token * num_heads + head) * (2 * half)
        tl.store(target + column, first, mask=inside)
        tl.store(target + half + column, second, mask=inside)
    else:
        slot = tl.load(slots + token)
        if slot >= 0:
            kv_head = (head - num_heads) % num_kv_heads
            place = (slot // block_size) * kv_block_stride + (slot % block_size) * (2 * half) + kv_head * kv_head_stride
            target = kv + place
            if is_value:
                target += kv_value_stride
            dtype = kv.dtype.element_ty
            tl.store(target + column, first.to(dtype), mask=inside)
            tl.store(target + half + column, second.to(dtype), mask=inside)


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
    launch: Any = _rope_kernel[(num_tokens, num_heads + 2 * num_kv_heads)]
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
        block_size=block_size,
        has_norms=norms is not None,
        num_warps=1,
    )
    return out
