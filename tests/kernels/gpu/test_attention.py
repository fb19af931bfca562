"""Paged attention in Triton against the reference, and bit for bit against itself in other company."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference

pytest.importorskip("triton", reason="triton is not installed")
from triton.runtime import interpreter  # noqa: E402

from kernels.gpu import decode_attention as decode  # noqa: E402
from kernels.gpu import prefill_attention as prefill  # noqa: E402

SCALE = 0.11
# float32 on a GPU multiplies in three parts of tf32; narrow types round the weights before they meet the values.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture
def all_rows_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply matrices in the interpreter row by row: the library behind numpy adds up some rows in another order."""

    def multiply(self: Any, left: Any, right: Any, total: Any, *_: Any) -> Any:
        products = (left.data[:, :, None] * right.data[None]).sum(1)
        return interpreter.TensorHandle(total.data + products, total.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", multiply)


@dataclass(frozen=True, slots=True)
class Scene:
    """Some sequences in a cache: what nobody owns is NaN in the cache and -1 in the tables."""

    kv_layer: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    q: Tensor


def make_scene(
    seq_lens: list[int],
    num_queries: int,
    heads: tuple[int, int, int] = (9, 3, 64),
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Scene:
    """Scatter sequences over a shuffled cache; q is a strided view, as the rows of a packed projection are."""
    num_heads, num_kv_heads, head_dim = heads
    counts = [-(-length // block_size) for length in seq_lens]
    num_blocks = sum(counts) + 3
    order = torch.randperm(num_blocks)
    shape = (num_blocks, 3, 2, num_kv_heads, block_size, head_dim)
    kv_layer = torch.full(shape, math.nan, dtype=dtype, device=device)[:, 1]
    tables = torch.full((len(seq_lens), max(counts, default=0) + 2), -1, dtype=torch.int32)
    for row, (length, count) in enumerate(zip(seq_lens, counts, strict=True)):
        owned, order = order[:count], order[count:]
        tables[row, :count] = owned
        for place, block in enumerate(owned.tolist()):
            filled = min(block_size, length - place * block_size)
            kv_layer[block, :, :, :filled] = torch.randn(2, num_kv_heads, filled, head_dim).to(kv_layer)
    q = torch.randn(num_queries, num_heads + 2 * num_kv_heads, head_dim)[:, :num_heads].to(device=device, dtype=dtype)
    lengths = torch.tensor(seq_lens, dtype=torch.int32, device=device)
    return Scene(kv_layer, tables.to(kv_layer.device), lengths, q)


def pick(scene: Scene, rows: list[int]) -> Scene:
    """Make a decode batch of some of a scene's rows; -1 is a padding row."""
    chosen = torch.tensor([max(row, 0) for row in rows], dtype=torch.int64, device=scene.q.device)
    empty = torch.tensor([row < 0 for row in rows], dtype=torch.bool, device=scene.q.device)
    return dataclasses.replace(
        scene,
        block_tables=scene.block_tables[chosen].masked_fill(empty[:, None], -1),
        seq_lens=scene.seq_lens[chosen].masked_fill(empty, 0),
        q=scene.q[chosen],
    )


def move_blocks(scene: Scene) -> Scene:
    """Move every block to another place of the cache."""
    order = torch.randperm(scene.kv_layer.shape[0], device=scene.q.device)
    back = torch.argsort(order).int()
    tables = torch.where(scene.block_tables < 0, -1, back[scene.block_tables.clamp(min=0).long()])
    return dataclasses.replace(scene, kv_layer=scene.kv_layer[order], block_tables=tables)


def run_decode(scene: Scene, **options: Any) -> Tensor:
    """Attend by the kernel."""
    return decode.paged_decode_attention(scene.q, scene.kv_layer, scene.block_tables, scene.seq_lens, SCALE, **options)


def check_decode(scene: Scene) -> None:
    """Compare the kernel with the reference in float32 arithmetic."""
    found = run_decode(scene)
    assert found.dtype == scene.q.dtype and found.shape == scene.q.shape
    expected = reference.paged_decode_attention(
        scene.q.float(), scene.kv_layer.float(), scene.block_tables, scene.seq_lens, SCALE
    )
    tolerance = TOLERANCE[scene.q.dtype]
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("heads", "block_size", "seq_lens"),
    [
        ((9, 3, 64), 16, [1, 0, 65]),
        ((4, 2, 128), 8, [127, 128]),
        ((2, 2, 64), 32, [33, 129]),
        ((3, 1, 80), 16, [17, 64, 63]),
        ((20, 1, 32), 128, [257]),
        ((1, 1, 16), 24, [47, 0, 256]),
    ],
)
def test_decode_agrees_with_the_reference(
    heads: tuple[int, int, int], block_size: int, seq_lens: list[int], device: torch.device
) -> None:
    check_decode(make_scene(seq_lens, len(seq_lens), heads, block_size, device=device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decode_keeps_a_narrow_dtype(dtype: torch.dtype, device: torch.device) -> None:
    check_decode(make_scene([70, 0, 140], 3, (4, 1, 64), dtype=dtype, device=device))


def test_a_long_context_is_cut_into_few_larger_splits(device: torch.device) -> None:
    check_decode(make_scene([4097], 1, (2, 1, 16), 128, device=device))


def test_decode_of_nothing_is_nothing(device: torch.device) -> None:
    scene = make_scene([5], 1, device=device)
    assert run_decode(pick(scene, [])).shape == (0, 9, 64)
    without_table = dataclasses.replace(scene, block_tables=scene.block_tables[:, :0])
    assert run_decode(without_table).count_nonzero() == 0


def test_a_length_that_the_table_cannot_hold_is_cut(device: torch.device) -> None:
    scene = make_scene([64], 1, (2, 1, 16), device=device)
    full = dataclasses.replace(scene, block_tables=scene.block_tables[:, :4].contiguous())
    too_long = dataclasses.replace(full, seq_lens=full.seq_lens + 1000)
    assert torch.equal(run_decode(too_long), run_decode(full))


def test_a_decode_row_has_the_same_bits_in_any_company_and_place(device: torch.device) -> None:
    scene = make_scene([300, 5, 129, 0], 4, (3, 1, 64), device=device)
    together = run_decode(scene)
    assert not together.isnan().any() and together[3].count_nonzero() == 0
    for row in range(2):
        assert torch.equal(run_decode(pick(scene, [row]))[0], together[row])
    mixed = run_decode(pick(move_blocks(scene), [-1, 2, 1, -1, 0]))
    assert torch.equal(mixed, together[[3, 2, 1, 3, 0]])
    wider = torch.nn.functional.pad(scene.block_tables, (0, 30), value=-1)
    assert torch.equal(run_decode(dataclasses.replace(scene, block_tables=wider)), together)


@pytest.mark.parametrize(("num_programs", "fused_combine"), [(1, True), (2, False), (3, True)])
def test_decode_has_the_same_bits_for_any_number_of_programs_and_either_way_to_combine(
    num_programs: int, fused_combine: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    scene = make_scene([400, 0], 2, (4, 1, 64), device=device)
    expected = run_decode(scene)
    monkeypatch.setattr(decode, "TARGET_PROGRAMS", 1)
    monkeypatch.setattr(decode, "MIN_PROGRAMS_PER_ROW", num_programs)
    assert torch.equal(run_decode(scene, fused_combine=fused_combine), expected)


def test_scratch_serves_one_launch_after_another_whatever_it_held(device: torch.device) -> None:
    scene = make_scene([130, 3, 150], 3, (2, 1, 32), device=device)
    expected = run_decode(scene)
    scratch = decode.DecodeScratch.for_batch(5, 2, 1, 32, 2048, device)
    for tensor in (scratch.sums, scratch.scales):
        tensor.fill_(math.nan)
    for rows in ([0, 1, 2], [2, 0], [1, -1, 0, 2]):
        found = run_decode(pick(scene, rows), scratch=scratch)
        for place, row in enumerate(rows):
            assert torch.equal(found[place], expected[row] if row >= 0 else torch.zeros_like(found[place]))
        assert scratch.counters.count_nonzero() == 0


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.data())
def test_decode_agrees_with_the_reference_at_any_shape(data: st.DataObject) -> None:
    num_kv_heads, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 5))
    head_dim = data.draw(st.sampled_from([16, 40, 64]))
    seq_lens = data.draw(st.lists(st.integers(0, 200), min_size=1, max_size=2))
    block_size = data.draw(st.sampled_from([8, 16, 32, 128]))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    heads = (num_kv_heads * group, num_kv_heads, head_dim)
    check_decode(make_scene(seq_lens, len(seq_lens), heads, block_size, device=device))


def run_prefill(scene: Scene, queries: list[int]) -> Tensor:
    """Attend chunks of so many queries by the kernel."""
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32, device=scene.q.device)
    return prefill.paged_prefill_attention(scene.q, scene.kv_layer, scene.block_tables, starts, scene.seq_lens, SCALE)


def check_prefill(scene: Scene, queries: list[int]) -> None:
    """Compare the kernel with the reference in float32 arithmetic."""
    found = run_prefill(scene, queries)
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    # The reference's cache must not hold NaN in the slots of a sequence's last block.
    kv_layer = scene.kv_layer.float().nan_to_num(0.0)
    expected = reference.paged_prefill_attention(
        scene.q.float(), kv_layer, scene.block_tables, starts, scene.seq_lens, SCALE
    )
    tolerance = TOLERANCE[scene.q.dtype]
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


def check_cuts(scene: Scene, length: int, cuts: list[int]) -> None:
    """Compare a prompt computed at once with the same one computed in chunks, bit for bit."""
    whole = run_prefill(scene, [length])
    assert not whole.isnan().any()
    for first, end in zip([0, *cuts], [*cuts, length], strict=True):
        chunk = dataclasses.replace(scene, q=scene.q[first:end], seq_lens=torch.full_like(scene.seq_lens, end))
        assert torch.equal(run_prefill(chunk, [end - first]), whole[first:end])


@pytest.mark.parametrize(
    ("heads", "block_size", "chunks"),
    [
        ((9, 3, 64), 16, [(3, 20), (0, 9), (33, 33), (1, 70)]),
        ((4, 2, 128), 8, [(64, 64), (1, 1), (31, 65)]),
        ((2, 2, 64), 32, [(40, 40)]),
        ((8, 1, 80), 128, [(17, 17), (16, 200)]),
        ((3, 1, 16), 24, [(0, 5), (43, 50), (0, 0)]),
    ],
)
def test_prefill_agrees_with_the_reference(
    heads: tuple[int, int, int], block_size: int, chunks: list[tuple[int, int]], device: torch.device
) -> None:
    queries = [count for count, _ in chunks]
    scene = make_scene([length for _, length in chunks], sum(queries), heads, block_size, device=device)
    check_prefill(scene, queries)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_prefill_keeps_a_narrow_dtype(dtype: torch.dtype, device: torch.device) -> None:
    check_prefill(make_scene([30, 1, 140], 80, (6, 2, 64), dtype=dtype, device=device), [20, 1, 59])


def test_prefill_of_no_queries_is_empty(device: torch.device) -> None:
    assert run_prefill(make_scene([4], 0, device=device), [0]).shape == (0, 9, 64)


@pytest.mark.usefixtures("all_rows_alike")
@pytest.mark.parametrize(("cuts", "dtype"), [([64], torch.float32), ([1, 2, 80], torch.bfloat16)])
def test_a_prompt_has_the_same_bits_however_it_is_cut_into_chunks(
    cuts: list[int], dtype: torch.dtype, device: torch.device
) -> None:
    check_cuts(make_scene([90], 90, (3, 1, 32), dtype=dtype, device=device), 90, cuts)


@pytest.mark.usefixtures("all_rows_alike")
def test_a_prefill_row_has_the_same_bits_in_any_company_and_place(device: torch.device) -> None:
    queries, lengths = [12, 3, 15], [12, 40, 70]
    scene = make_scene(lengths, sum(queries), (3, 1, 32), device=device)
    together = torch.split(run_prefill(scene, queries), queries)
    moved, parts = move_blocks(scene), torch.split(scene.q, queries)
    order = [2, 0, 1]
    other = dataclasses.replace(pick(moved, order), q=torch.cat([parts[row] for row in order]))
    counts = [queries[row] for row in order]
    found = torch.split(run_prefill(other, counts), counts)
    for place, row in enumerate(order):
        assert torch.equal(found[place], together[row])
        alone = dataclasses.replace(pick(scene, [row]), q=parts[row])
        assert torch.equal(run_prefill(alone, [queries[row]]), together[row])


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("heads", [(32, 8, 128), (16, 8, 128), (9, 3, 64)])
def test_models_shapes_agree_with_the_reference_on_a_gpu(heads: tuple[int, int, int], device: torch.device) -> None:
    lengths, queries = [1, 700, 4096, 5001], [1, 700, 33, 1000]
    check_decode(make_scene(lengths, 4, heads, dtype=torch.bfloat16, device=device))
    check_prefill(make_scene(lengths, sum(queries), heads, dtype=torch.bfloat16, device=device), queries)


@pytest.mark.gpu
@needs_gpu
def test_bits_stay_the_same_on_a_gpu(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    check_cuts(make_scene([1500], 1500, (32, 8, 128), dtype=torch.bfloat16, device=device), 1500, [1, 130, 768, 1499])
    scene = make_scene([3000, 5001, 17, 640], 4, (32, 8, 128), dtype=torch.bfloat16, device=device)
    together = run_decode(scene)
    for row in range(4):
        assert torch.equal(run_decode(move_blocks(pick(scene, [row, -1])))[0], together[row])
    assert torch.equal(run_decode(scene, fused_combine=False), together)
    monkeypatch.setattr(decode, "TARGET_PROGRAMS", 1)
    assert torch.equal(run_decode(scene), together)


@pytest.mark.gpu
@needs_gpu
def test_one_captured_decode_serves_all_lengths(device: torch.device) -> None:
    scene = make_scene([2000, 900, 1], 3, (32, 8, 128), dtype=torch.bfloat16, device=device)
    scratch = decode.DecodeScratch.for_batch(3, 32, 8, 128, scene.block_tables.shape[1] * 16, device)
    run_decode(scene, scratch=scratch)
    graph = torch.cuda.CUDAGraph()
    lengths = scene.seq_lens.clone()
    with torch.cuda.graph(graph):
        found = run_decode(scene, scratch=scratch)
    for shorter in (0, 1, 500, 899):
        scene.seq_lens.copy_((lengths - shorter).clamp(min=0))
        expected = run_decode(scene)
        for _ in range(20):
            graph.replay()
            assert torch.equal(found, expected)
        assert scratch.counters.count_nonzero() == 0
