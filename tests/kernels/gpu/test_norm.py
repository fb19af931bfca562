"""Norms, rotation with the write of keys and values, and SiLU: Triton against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.gpu.activation import silu_mul
from kernels.gpu.norm import add_rms_norm, rms_norm
from kernels.gpu.rope import rope_store
from kernels.reference import HeadNorms

# The interpreter rounds to bfloat16 by cutting off, so there a last bit may differ where a GPU's may not.
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 2e-3), torch.bfloat16: (4e-2, 4e-2)}
DTYPES = list(TOLERANCE)


def _random(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _close(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    rtol, atol = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.float(), expected.float(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "size"), [(0, 64), (1, 576), (3, 2048), (5, 100)])
def test_norms(num_rows: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    x, residual, weight = (_random(device, dtype, *s, seed=i) for i, s in enumerate([(num_rows, size)] * 2 + [(size,)]))
    _close(rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    expected_normed, expected_total = reference.add_rms_norm(x, residual, weight, 1e-5)
    _close(normed, expected_normed)
    _close(total, expected_total)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "size"), [(0, 8), (1, 1536), (4, 1000)])
def test_silu(num_rows: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    gate_up = _random(device, dtype, num_rows, 2 * size) * 4
    _close(silu_mul(gate_up), reference.silu_mul(gate_up))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 128), (2, 1, 96)])
def test_rotation_and_the_write_of_keys_and_values(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    has_norms: bool,
    kv_dtype: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    slots = torch.tensor([3, 70, -1, 8, 20], device=device)
    qkv = _random(device, dtype, len(slots), (num_heads + 2 * num_kv_heads) * head_dim)
    tables = tuple(_random(device, torch.float32, 100, head_dim // 2, seed=s) for s in (1, 2))
    positions = torch.tensor([0, 99, 5, 50, 7], device=device)
    norms = None
    if has_norms:
        norms = HeadNorms(_random(device, dtype, head_dim, seed=3), _random(device, dtype, head_dim, seed=4), 1e-6)
    caches = [torch.full((9, 3, 2, num_kv_heads, 8, head_dim), 7.0, dtype=kv_dtype, device=device) for _ in range(2)]
    got = rope_store(qkv, positions, (tables[0], tables[1]), caches[0][:, 1], slots, num_heads, norms)
    expected = reference.rope_store(qkv, positions, (tables[0], tables[1]), caches[1][:, 1], slots, num_heads, norms)
    _close(got, expected)
    rtol, atol = max(TOLERANCE[dtype], TOLERANCE[kv_dtype])
    torch.testing.assert_close(caches[0].float(), caches[1].float(), rtol=rtol, atol=atol)
    untouched = torch.ones(72, dtype=torch.bool)
    untouched[slots[slots >= 0].cpu()] = False
    by_slot = caches[0].permute(0, 4, 1, 2, 3, 5).reshape(72, 3, -1)
    assert (by_slot[untouched] == 7.0).all() and (by_slot[:, [0, 2]] == 7.0).all()


def test_a_token_has_the_same_bits_alone_and_in_any_batch(device: torch.device) -> None:
    num_heads, num_kv_heads, head_dim, dtype = 14, 3, 96, torch.float16
    qkv = _random(device, dtype, 5, (num_heads + 2 * num_kv_heads) * head_dim)
    tables = (_random(device, torch.float32, 9, 48, seed=1), _random(device, torch.float32, 9, 48, seed=2))
    norms = HeadNorms(_random(device, dtype, head_dim, seed=3), _random(device, dtype, head_dim, seed=4), 1e-6)
    positions, slots = torch.tensor([8, 0, 3, 3, 5], device=device), torch.tensor([4, 0, 9, 2, 11], device=device)
    caches = [torch.zeros((2, 2, num_kv_heads, 8, head_dim), dtype=dtype, device=device) for _ in range(2)]
    together = rope_store(qkv, positions, tables, caches[0], slots, num_heads, norms)
    singles = [slice(row, row + 1) for row in range(5)]
    alone = [rope_store(qkv[s], positions[s], tables, caches[1], slots[s], num_heads, norms) for s in singles]
    assert torch.equal(together, torch.cat(alone)) and torch.equal(*caches)
    assert torch.equal(rms_norm(qkv, qkv[0], 1e-5), torch.cat([rms_norm(qkv[s], qkv[0], 1e-5) for s in singles]))
    assert rope_store(qkv[:0], positions[:0], tables, caches[0], slots[:0], num_heads).shape == (0, num_heads, head_dim)


def test_a_block_far_out_is_reached(device: torch.device) -> None:
    """Offsets past 2**31 elements."""
    if device.type != "cuda":
        pytest.skip("takes 4.6 GB")
    cache = torch.zeros((70_000, 2, 2, 8, 16, 128), dtype=torch.uint8, device=device).view(torch.bfloat16)
    qkv = _random(device, torch.bfloat16, 1, (2 + 2 * 8) * 64)
    tables = (torch.ones(4, 32, device=device), torch.zeros(4, 32, device=device))
    slot = torch.tensor([69_999 * 16 + 5], device=device)
    rope_store(qkv, torch.tensor([1], device=device), tables, cache[:, 1], slot, 2)
    assert cache[69_999, 1, :, :, 5].any()
