"""The native CPU kernels against the reference, and their promise that a row does not depend on its batch."""

import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import ops, reference
from kernels.cpu import build, native

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> native.NativeKernels:
    """Build the source of this checkout, so that a stale installed library is not what gets tested."""
    compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    library = tmp_path_factory.mktemp("native") / "kernels.so"
    subprocess.run([*build.compile_command(compiler, ROOT, library), "-Wall", "-Wextra", "-Werror"], check=True)
    return native.load(library)


class Case:
    """Inputs of one attention call; every slot that no sequence owns is NaN, every unused table entry -1."""

    def __init__(self, seq_lens: list[int], num_heads: int, num_kv_heads: int, block_size: int, head_dim: int) -> None:
        counts = [-(-length // block_size) for length in seq_lens]
        order = torch.randperm(sum(counts) + 2).int()
        kv_cache = torch.full((sum(counts) + 2, 3, 2, num_kv_heads, block_size, head_dim), math.nan)
        self.kv_layer = kv_cache[:, 1]
        self.q = torch.randn(len(seq_lens), num_heads, head_dim) * 3
        self.tables = torch.full((len(seq_lens), max([*counts, 0]) + 1), -1, dtype=torch.int32)
        self.seq_lens = torch.tensor(seq_lens, dtype=torch.int32)
        used = 0
        for row, (length, count) in enumerate(zip(seq_lens, counts, strict=True)):
            self.tables[row, :count] = order[used : used + count]
            used += count
            for place in range(0, length, block_size):
                size = min(block_size, length - place)
                block = self.kv_layer[int(self.tables[row, place // block_size])]
                block[:, :, :size] = torch.randn(2, num_kv_heads, size, head_dim)

    def run(self, kernels: native.NativeKernels, rows: list[int] | None = None) -> Tensor:
        """Call the native kernel on all rows or on some."""
        chosen = slice(None) if rows is None else rows
        return kernels.paged_decode_attention(
            self.q[chosen], self.kv_layer, self.tables[chosen], self.seq_lens[chosen], 0.2
        )


@pytest.mark.parametrize("seq_lens", [[], [1], [7], [16, 17], [300, 1, 33, 64, 15]])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "block_size", "head_dim"),
    [(9, 3, 16, 64), (4, 4, 16, 128), (8, 1, 8, 72), (2, 2, 5, 8), (40, 1, 32, 80)],
)
def test_native_decode_attention_agrees_with_the_reference(
    kernels: native.NativeKernels,
    seq_lens: list[int],
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
) -> None:
    case = Case(seq_lens, num_heads, num_kv_heads, block_size, head_dim)
    expected = reference.paged_decode_attention(case.q, case.kv_layer, case.tables, case.seq_lens, 0.2)
    torch.testing.assert_close(case.run(kernels), expected, rtol=2e-5, atol=2e-5)


def test_large_scores_neither_overflow_nor_vanish(kernels: native.NativeKernels) -> None:
    case = Case([40], 2, 1, 16, 16)
    case.q *= 1e4
    expected = reference.paged_decode_attention(case.q, case.kv_layer, case.tables, case.seq_lens, 0.2)
    torch.testing.assert_close(case.run(kernels), expected, rtol=1e-5, atol=1e-5)


def test_a_row_is_bitwise_the_same_in_every_batch(kernels: native.NativeKernels) -> None:
    case = Case([130, 1, 64, 257, 16, 90], 9, 3, 16, 64)
    together = case.run(kernels)
    for row in range(6):
        assert torch.equal(case.run(kernels, [row])[0], together[row])
    assert torch.equal(case.run(kernels, [5, 3, 0])[1], together[3])


def test_an_empty_sequence_gives_zeros(kernels: native.NativeKernels) -> None:
    case = Case([0, 3], 2, 1, 4, 8)
    assert case.run(kernels)[0].count_nonzero() == 0


def test_a_block_outside_the_cache_is_refused(kernels: native.NativeKernels) -> None:
    case = Case([20], 2, 1, 16, 8)
    case.tables[0, 1] = case.kv_layer.shape[0]
    with pytest.raises(ValueError, match="outside the KV cache"):
        case.run(kernels)


def test_a_length_beyond_its_table_is_refused(kernels: native.NativeKernels) -> None:
    case = Case([20], 2, 1, 16, 8)
    case.seq_lens[0] = 49
    with pytest.raises(ValueError, match="longer than its block table"):
        case.run(kernels)


def test_only_fitting_tensors_go_to_the_native_kernel() -> None:
    q, kv_layer = torch.zeros(1, 2, 16), torch.zeros(3, 2, 2, 1, 4, 16)[:, 0]
    assert native.accepts(q, kv_layer)
    assert not native.accepts(q.bfloat16(), kv_layer.bfloat16())
    assert not native.accepts(torch.zeros(1, 2, 12), torch.zeros(3, 2, 1, 4, 12))
    assert not native.accepts(q, torch.zeros(3, 2, 1, 16, 4).transpose(-1, -2))


def test_a_library_that_is_none_says_so(tmp_path: Path) -> None:
    broken = tmp_path / "kernels.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(native.NativeUnavailableError, match="does not load"):
        native.load(broken)


def test_the_backend_is_described_in_one_line_that_matches_what_is_installed() -> None:
    line = ops.describe_backend()
    assert "\n" not in line
    assert ("native decode attention" in line) == (native.find_library() is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ops_decode_attention_works_whatever_was_chosen(dtype: torch.dtype) -> None:
    case = Case([9, 30], 4, 2, 16, 16)
    q, kv_layer = case.q.to(dtype), case.kv_layer.to(dtype)
    found = ops.paged_decode_attention(q, kv_layer, case.tables, case.seq_lens, 0.2)
    expected = reference.paged_decode_attention(q.float(), kv_layer.float(), case.tables, case.seq_lens, 0.2)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
