"""Plain-torch reference of every kernel: the meaning of each operation, on any device and float dtype.

The KV cache of a worker is one contiguous tensor `kv_cache` of shape
`[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`: one block of all layers is contiguous, a layer
range of one block is contiguous, K stands before V. The kernels of one layer take its strided view
`kv_layer = kv_cache[:, layer]` of shape `[num_blocks, 2, num_kv_heads, block_size, head_dim]`.
A token's slot is `block_id * block_size + offset`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fp8 import Fp8Matrix, fp8_linear

Matrix = Tensor | Fp8Matrix


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """The norms that some models apply to each query and key head before rotating: weights `[d]`, and their epsilon."""

    query: Tensor
    key: Tensor
    eps: float


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension by its root mean square, then scale by `weight`.

    x `[..., d]`, weight `[d]`; computed in float32, returned in x's dtype.
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add x to the residual, then normalise the sum: returns the normalised rows and the sum, both in x's dtype."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def linear(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """Multiply rows by a matrix: x `[..., K]`, weight `[N, K]`, bias `[N]`; summed in float32, given in x's dtype."""
    if isinstance(weight, Fp8Matrix):
        return fp8_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def linear_silu(x: Tensor, weight: Matrix) -> Tensor:
    """Multiply rows by gate and up at once, then `silu_mul`: x `[..., K]`, weight `[2n, K]` -> `[..., n]`."""
    return silu_mul(linear(x, weight))


def rope(q: Tensor, k: Tensor, positions: Tensor, cos_table: Tensor, sin_table: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q and k by their positions (rotate-half layout: element i pairs with i + d/2).

    q `[T, num_heads, d]`, k `[T, num_kv_heads, d]`, positions `[T]` int64, tables `[num_positions, d / 2]` float32;
    returns new tensors in q's and k's dtype.
    """
    cos, sin = cos_table[positions].unsqueeze(1), sin_table[positions].unsqueeze(1)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def store_kv(k: Tensor, v: Tensor, kv_layer: Tensor, slot_mapping: Tensor) -> None:
    """Write each token's K and V into its slot of one layer; a slot of -1 is skipped.

    k and v `[T, num_kv_heads, d]`, kv_layer `[num_blocks, 2, num_kv_heads, block_size, d]` (changed in place),
    slot_mapping `[T]` int64. On a GPU this synchronises (it looks for skipped slots on the host).
    """
    if bool((slot_mapping < 0).any()):
        keep = slot_mapping >= 0
        k, v, slot_mapping = k[keep], v[keep], slot_mapping[keep]
    block_size = kv_layer.shape[3]
    by_slot = kv_layer.permute(0, 3, 1, 2, 4)
    by_slot[slot_mapping // block_size, slot_mapping % block_size] = torch.stack((k, v), dim=1).to(kv_layer.dtype)


def rope_store(
    qkv: Tensor,
    positions: Tensor,
    tables: tuple[Tensor, Tensor],
    kv_layer: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
    norms: HeadNorms | None = None,
) -> Tensor:
    """Normalise (where the model does) and rotate packed q and k, write K and V into their slots, return q.

    qkv `[T, (num_heads + 2 * num_kv_heads) * d]`, rows q | k | v; tables: cosines and sines as in `rope`; kv_layer and
    slot_mapping as in `store_kv`. Returns q `[T, num_heads, d]` in qkv's dtype.
    """
    num_kv_heads, head_dim = kv_layer.shape[2], kv_layer.shape[4]
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
    query, key, value = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if norms is not None:
        query, key = rms_norm(query, norms.query, norms.eps), rms_norm(key, norms.key, norms.eps)
    query, key = rope(query, key, positions, *tables)
    store_kv(key, value, kv_layer, slot_mapping)
    return query


def paged_decode_attention(q: Tensor, kv_layer: Tensor, block_tables: Tensor, seq_lens: Tensor, scale: float) -> Tensor:
    """Attend one query per sequence to its whole cached context.

    q `[B, num_heads, d]`, kv_layer `[num_blocks, 2, num_kv_heads, block_size, d]`, block_tables `[B, max_blocks]`
    int32 (entries past the context are ignored and may be -1), seq_lens `[B]` int32, the new token included; a row
    with seq_len 0 gives zeros. Returns `[B, num_heads, d]` in q's dtype.
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, block_size = kv_layer.shape[2], kv_layer.shape[3]
    max_blocks = block_tables.shape[1]
    if num_rows == 0 or max_blocks == 0:
        return torch.zeros_like(q)
    blocks = kv_layer.index_select(0, block_tables.reshape(-1).clamp(min=0).long())
    blocks = blocks.view(num_rows, max_blocks, 2, num_kv_heads, block_size, head_dim)
    keys_values = blocks.permute(2, 0, 3, 1, 4, 5).reshape(2, num_rows, num_kv_heads, -1, head_dim)
    places = torch.arange(max_blocks * block_size, device=q.device)
    visible = places < seq_lens.unsqueeze(1)
    # What lies behind the mask belongs to someone else: zero it, since 0 * NaN would still be NaN.
    keys_values = keys_values.masked_fill(~visible[None, :, None, :, None], 0.0).to(q.dtype)
    # The query heads of one KV head stand as rows of one small matrix.
    grouped = q.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = (grouped.float() @ keys_values[0].float().transpose(-1, -2)) * scale
    scores = scores.masked_fill(~visible[:, None, None, :], float("-inf"))
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)
    return (weights @ keys_values[1].float()).reshape(num_rows, num_heads, head_dim).to(q.dtype)


def paged_prefill_attention(
    q: Tensor, kv_layer: Tensor, block_tables: Tensor, query_start: Tensor, seq_lens: Tensor, scale: float
) -> Tensor:
    """Attend a ragged batch of query chunks causally to their cached context and to themselves.

    q `[T, num_heads, d]`, kv_layer as in `store_kv` (the chunk's K and V already stand in it), block_tables
    `[S, max_blocks]` int32, query_start `[S+1]` int32, seq_lens `[S]` int32: query i of sequence s stands at position
    `seq_len - num_queries + i`. Returns `[T, num_heads, d]` in q's dtype. On a GPU this synchronises (it reads the
    lengths on the host).
    """
    out = torch.empty_like(q)
    starts: list[int] = query_start.tolist()
    lengths: list[int] = seq_lens.tolist()
    for row, (start, end, seq_len) in enumerate(zip(starts, starts[1:], lengths, strict=False)):
        if end > start:
            out[start:end] = _attend_chunk(q[start:end], kv_layer, block_tables[row], seq_len, scale)
    return out


def _attend_chunk(q: Tensor, kv_layer: Tensor, block_table: Tensor, seq_len: int, scale: float) -> Tensor:
    num_queries, num_kv_heads, block_size = q.shape[0], kv_layer.shape[2], kv_layer.shape[3]
    num_blocks = -(-seq_len // block_size)
    blocks = kv_layer.index_select(0, block_table[:num_blocks].long())
    keys_values = blocks.permute(1, 2, 0, 3, 4).reshape(2, 1, num_kv_heads, num_blocks * block_size, -1)
    keys_values = keys_values[:, :, :, :seq_len].to(q.dtype)
    num_cached = seq_len - num_queries
    mask: Tensor | None = None
    if num_cached and num_queries > 1:
        mask = torch.ones(num_queries, seq_len, dtype=torch.bool, device=q.device).tril_(num_cached)
    attended = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        keys_values[0],
        keys_values[1],
        attn_mask=mask,
        is_causal=num_cached == 0,
        scale=scale,
        enable_gqa=q.shape[1] != num_kv_heads,
    )
    return attended.squeeze(0).transpose(0, 1)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Multiply SiLU of the first half of the last dimension by the second half: `[..., 2n]` -> `[..., n]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gather_blocks(kv_cache: Tensor, block_ids: Tensor, first_layer: int, num_layers: int, out: Tensor) -> None:
    """Copy a layer range of some blocks out of the cache into a flat slab, block by block in the given order.

    kv_cache as in the module's docstring, block_ids `[n]` int64, out: contiguous, flat, uint8 or the cache's dtype,
    exactly n pieces long. Raises ValueError where the slab does not fit. On a GPU: enqueued, not synchronised.
    """
    layers = kv_cache[:, first_layer : first_layer + num_layers]
    torch.index_select(layers, 0, block_ids, out=_slab_view(out, kv_cache, layers, block_ids))


def scatter_blocks(kv_cache: Tensor, block_ids: Tensor, first_layer: int, num_layers: int, src: Tensor) -> None:
    """Copy a flat slab written by `gather_blocks` into a layer range of the given blocks (changed in place).

    Arguments as in `gather_blocks`; block_ids must not repeat. Raises ValueError where the slab does not fit.
    """
    layers = kv_cache[:, first_layer : first_layer + num_layers]
    layers.index_copy_(0, block_ids, _slab_view(src, kv_cache, layers, block_ids))


def _slab_view(slab: Tensor, kv_cache: Tensor, layers: Tensor, block_ids: Tensor) -> Tensor:
    piece = layers.shape[1:]
    num_bytes = block_ids.numel() * piece.numel() * kv_cache.element_size()
    if slab.numel() * slab.element_size() != num_bytes or not slab.is_contiguous():
        raise ValueError(f"slab of {slab.numel() * slab.element_size()} bytes for {num_bytes} bytes of KV blocks")
    return slab.view(-1).view(kv_cache.dtype).view(block_ids.numel(), *piece)
