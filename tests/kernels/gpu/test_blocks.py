"""Copies of KV blocks in Triton against the torch reference, byte for byte."""

from __future__ import annotations

import pytest
import torch

from kernels import reference

pytest.importorskip("triton")

from kernels.gpu import blocks  # noqa: E402

# num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim
SHAPE = (9, 4, 2, 3, 16, 64)


def _cache(dtype: torch.dtype, device: torch.device, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    octets = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8)
    return octets.to(device).view(dtype)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare bytes: NaN is equal to itself here."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
@pytest.mark.parametrize(("first_layer", "num_layers"), [(0, 4), (1, 1), (2, 2)])
def test_gathered_bytes_are_the_reference_s(
    dtype: torch.dtype, first_layer: int, num_layers: int, device: torch.device
) -> None:
    cache, block_ids = _cache(dtype, device), torch.tensor([7, 0, 3, 3, 8], device=device)
    slabs = [torch.empty((5, num_layers, *SHAPE[2:]), dtype=dtype, device=device) for _ in range(2)]
    blocks.gather_blocks(cache, block_ids, first_layer, num_layers, slabs[0].view(torch.uint8).view(-1))
    reference.gather_blocks(cache, block_ids, first_layer, num_layers, slabs[1].view(-1))
    assert _same(slabs[0], slabs[1])


@pytest.mark.parametrize(("first_layer", "num_layers"), [(0, 4), (3, 1)])
def test_scattered_bytes_are_the_reference_s_and_the_rest_is_untouched(
    first_layer: int, num_layers: int, device: torch.device
) -> None:
    cache, block_ids = _cache(torch.bfloat16, device), torch.tensor([5, 1, 8], device=device)
    slab = _cache(torch.bfloat16, device, (3, num_layers, *SHAPE[2:])).view(-1)
    expected, before = cache.clone(), cache.clone()
    blocks.scatter_blocks(cache, block_ids, first_layer, num_layers, slab)
    reference.scatter_blocks(expected, block_ids, first_layer, num_layers, slab)
    assert _same(cache, expected) and not _same(cache, before)


def test_odd_sizes_and_addresses_are_copied_too(device: torch.device) -> None:
    shape = (4, 3, 2, 1, 3, 5)
    cache, block_ids = _cache(torch.bfloat16, device, shape), torch.tensor([2, 0], device=device)
    room = torch.zeros(2 * 2 * 60 + 3, dtype=torch.uint8, device=device)
    slab = room[3:]
    blocks.gather_blocks(cache, block_ids, 1, 2, slab)
    assert torch.equal(slab.view(2, 2, 60), cache[block_ids, 1:].view(torch.uint8).reshape(2, 2, 60))
    other = torch.zeros_like(cache)
    blocks.scatter_blocks(other, block_ids, 1, 2, slab)
    assert _same(other[block_ids, 1:].contiguous(), cache[block_ids, 1:].contiguous())
    assert not other[1].view(torch.uint8).any() and not other[:, 0].contiguous().view(torch.uint8).any()


def test_ids_outside_the_cache_reach_no_memory(device: torch.device) -> None:
    cache, block_ids = _cache(torch.bfloat16, device), torch.tensor([-1, 9, 2], device=device)
    slab = torch.zeros((3, 1, *SHAPE[2:]), dtype=torch.bfloat16, device=device)
    before = cache.clone()
    blocks.scatter_blocks(cache, block_ids, 0, 1, slab.view(-1))
    before[2, 0] = 0
    assert _same(cache, before)


def test_nothing_to_copy_is_fine_and_a_wrong_slab_is_refused(device: torch.device) -> None:
    cache = _cache(torch.bfloat16, device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    blocks.gather_blocks(cache, none, 0, 4, torch.empty(0, dtype=torch.uint8, device=device))
    with pytest.raises(ValueError, match="slab of 10 bytes"):
        blocks.gather_blocks(cache, none + 0, 0, 4, torch.empty(10, dtype=torch.uint8, device=device))
    with pytest.raises(ValueError, match="slab of"):
        blocks.scatter_blocks(cache, torch.tensor([1], device=device), 0, 2, cache[:1, :1].reshape(-1))
