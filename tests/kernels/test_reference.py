"""The reference kernels against the plainest possible formulas."""

import math

import pytest
import torch
from torch import Tensor

from kernels import reference


def plain_attention(q: Tensor, keys: Tensor, values: Tensor, scale: float, first_position: int) -> Tensor:
    """Causal attention of q [n, h, d] over keys and values [context, kvh, d], one element at a time over heads."""
    out = torch.empty_like(q)
    group = q.shape[1] // keys.shape[1]
    for row in range(q.shape[0]):
        seen = first_position + row + 1
        for head in range(q.shape[1]):
            scores = (keys[:seen, head // group] @ q[row, head]) * scale
            out[row, head] = torch.softmax(scores, 0) @ values[:seen, head // group]
    return out


def filled_cache(
    seq_lens: list[int], num_kv_heads: int, block_size: int, head_dim: int
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Make a layer with shuffled blocks: (kv_layer, block_tables padded with -1, keys and values per sequence)."""
    counts = [-(-length // block_size) for length in seq_lens]
    order = torch.randperm(sum(counts) + 3).int()
    kv_cache = torch.full((sum(counts) + 3, 3, 2, num_kv_heads, block_size, head_dim), math.nan)
    kv_layer = kv_cache[:, 1]
    tables = torch.full((len(seq_lens), max(counts, default=0) + 1), -1, dtype=torch.int32)
    keys, values, used = [], [], 0
    for row, (length, count) in enumerate(zip(seq_lens, counts, strict=True)):
        tables[row, :count] = order[used : used + count]
        used += count
        keys.append(torch.randn(length, num_kv_heads, head_dim))
        values.append(torch.randn(length, num_kv_heads, head_dim))
        places = torch.arange(length)
        slots = tables[row, places // block_size].long() * block_size + places % block_size
        reference.store_kv(keys[-1], values[-1], kv_layer, slots)
    return kv_layer, tables, keys, values


def test_rms_norm_divides_by_the_root_mean_square() -> None:
    x, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0])
    expected = torch.tensor([[3.0, 8.0]]) / math.sqrt(12.5)
    torch.testing.assert_close(reference.rms_norm(x, weight, 0.0), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_keeps_a_narrow_dtype_but_computes_wide(dtype: torch.dtype) -> None:
    x, weight = (torch.randn(5, 64) * 100).to(dtype), torch.randn(64).to(dtype)
    found = reference.rms_norm(x, weight, 1e-5)
    assert found.dtype == dtype
    exact = reference.rms_norm(x.double(), weight.double(), 1e-5)
    torch.testing.assert_close(found.double(), exact, rtol=0.02, atol=1e-3)


def test_rope_rotates_pairs_half_a_head_apart() -> None:
    positions = torch.tensor([0, 5, 2])
    angles = torch.outer(torch.arange(8.0), torch.tensor([1.0, 0.1]))
    q, k = torch.randn(3, 2, 4), torch.randn(3, 1, 4)
    rotated_q, rotated_k = reference.rope(q, k, positions, angles.cos(), angles.sin())
    for x, rotated in ((q, rotated_q), (k, rotated_k)):
        pairs = torch.complex(x[..., :2], x[..., 2:])
        turned = pairs * torch.polar(torch.ones(3, 1, 2), angles[positions].unsqueeze(1))
        torch.testing.assert_close(rotated, torch.cat((turned.real, turned.imag), -1))


def test_store_kv_writes_its_slots_and_nothing_else() -> None:
    kv_cache = torch.zeros(4, 3, 2, 2, 8, 16)
    k, v = torch.randn(4, 2, 16), torch.randn(4, 2, 16)
    reference.store_kv(k, v, kv_cache[:, 1], torch.tensor([9, -1, 31, 0]))
    for row, (block, offset) in {0: (1, 1), 2: (3, 7), 3: (0, 0)}.items():
        assert torch.equal(kv_cache[block, 1, 0, :, offset], k[row])
        assert torch.equal(kv_cache[block, 1, 1, :, offset], v[row])
    assert kv_cache.count_nonzero() == 3 * 2 * 2 * 16


def test_store_kv_of_no_rows_changes_nothing() -> None:
    kv_layer = torch.zeros(2, 2, 1, 4, 8)
    reference.store_kv(torch.empty(0, 1, 8), torch.empty(0, 1, 8), kv_layer, torch.empty(0, dtype=torch.int64))
    assert kv_layer.count_nonzero() == 0


@pytest.mark.parametrize("seq_lens", [[1], [16], [17, 1, 40], [5, 64, 33, 2]])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (9, 3), (4, 1)])
def test_decode_attention_sees_the_whole_context_and_nothing_behind_it(
    seq_lens: list[int], num_heads: int, num_kv_heads: int
) -> None:
    # Unused slots are NaN and unused table entries -1: touching either would show.
    kv_layer, tables, keys, values = filled_cache(seq_lens, num_kv_heads, 16, 24)
    q = torch.randn(len(seq_lens), num_heads, 24)
    found = reference.paged_decode_attention(q, kv_layer, tables, torch.tensor(seq_lens, dtype=torch.int32), 0.3)
    for row, length in enumerate(seq_lens):
        expected = plain_attention(q[row : row + 1], keys[row], values[row], 0.3, length - 1)
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-5, atol=1e-5)


def test_decode_attention_of_an_empty_batch_is_empty() -> None:
    kv_layer = torch.zeros(2, 2, 1, 4, 8)
    tables, lengths = torch.zeros(0, 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    assert reference.paged_decode_attention(torch.zeros(0, 2, 8), kv_layer, tables, lengths, 1.0).shape == (0, 2, 8)


@pytest.mark.parametrize("chunks", [[(7, 7)], [(1, 1), (5, 37), (16, 16)], [(3, 20), (0, 9), (18, 18), (1, 33)]])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2)])
def test_prefill_attention_is_causal_over_cached_blocks_and_the_chunk(
    chunks: list[tuple[int, int]], num_heads: int, num_kv_heads: int
) -> None:
    queries, lengths = [n for n, _ in chunks], [length for _, length in chunks]
    kv_layer, tables, keys, values = filled_cache(lengths, num_kv_heads, 8, 16)
    q = torch.randn(sum(queries), num_heads, 16)
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    lens = torch.tensor(lengths, dtype=torch.int32)
    found = reference.paged_prefill_attention(q, kv_layer, tables, starts, lens, 0.25)
    for row, (count, length) in enumerate(chunks):
        piece = slice(int(starts[row]), int(starts[row + 1]))
        expected = plain_attention(q[piece], keys[row], values[row], 0.25, length - count)
        torch.testing.assert_close(found[piece], expected, rtol=1e-5, atol=1e-5)


def test_silu_mul_gates_the_second_half_by_the_first() -> None:
    x = torch.randn(3, 10)
    expected = x[:, :5] / (1 + (-x[:, :5]).exp()) * x[:, 5:]
    torch.testing.assert_close(reference.silu_mul(x), expected)


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_travel_through_a_slab_in_order(as_bytes: bool, dtype: torch.dtype) -> None:
    source, target = torch.randn(7, 4, 2, 2, 8, 16).to(dtype), torch.zeros(9, 4, 2, 2, 8, 16, dtype=dtype)
    piece = source[0, 1:3].numel()
    slab = torch.zeros(3 * piece * (dtype.itemsize if as_bytes else 1), dtype=torch.uint8 if as_bytes else dtype)
    reference.gather_blocks(source, torch.tensor([5, 0, 2]), 1, 2, slab)
    assert torch.equal(slab.view(dtype)[piece : 2 * piece], source[0, 1:3].flatten())
    reference.scatter_blocks(target, torch.tensor([8, 3, 1]), 1, 2, slab)
    for sent, received in ((5, 8), (0, 3), (2, 1)):
        assert torch.equal(target[received, 1:3], source[sent, 1:3])
    assert target[:, [0, 3]].count_nonzero() == 0
    assert target[[0, 2, 4, 5, 6, 7]].count_nonzero() == 0


def test_a_slab_of_the_wrong_size_is_refused() -> None:
    kv_cache = torch.zeros(3, 2, 2, 1, 4, 8)
    with pytest.raises(ValueError, match="slab of 100 bytes for 1024 bytes"):
        reference.gather_blocks(kv_cache, torch.tensor([0, 1]), 0, 2, torch.zeros(100, dtype=torch.uint8))
    with pytest.raises(ValueError, match="slab of"):
        reference.scatter_blocks(kv_cache, torch.tensor([0]), 0, 1, torch.zeros(300, dtype=torch.uint8))
