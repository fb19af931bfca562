"""The native CPU kernels against the reference over random shapes, for every instruction set of this machine."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import reference
from kernels.cpu import native
from kernels.cpu.native import NativeKernels, NativeUnavailableError
from tests.kernels.native_cases import INSTRUCTION_SETS, KvCase, kernels_for

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=INSTRUCTION_SETS)
def kernels(request: pytest.FixtureRequest) -> NativeKernels:
    """Each instruction set that this processor has, with two threads."""
    return kernels_for(request.param, num_threads=2)


@pytest.mark.parametrize("seq_lens", [[1], [7], [16, 17], [300, 1, 33, 64, 15]])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "block_size", "head_dim"),
    [(9, 3, 16, 64), (4, 4, 32, 128), (8, 1, 8, 80), (40, 2, 64, 16), (7, 1, 16, 48)],
)
def test_decode_attention_agrees_with_the_reference(
    kernels: NativeKernels, seq_lens: list[int], num_heads: int, num_kv_heads: int, block_size: int, head_dim: int
) -> None:
    case = KvCase(seq_lens, num_heads, num_kv_heads, block_size, head_dim)
    expected = reference.paged_decode_attention(case.q, case.kv_layer, case.tables, case.seq_lens, 0.2)
    found = kernels.paged_decode_attention(case.q, case.kv_layer, case.tables, case.seq_lens, 0.2)
    torch.testing.assert_close(found, expected, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("seq_lens", "num_queries"), [([5], [5]), ([40], [7]), ([100, 16, 70, 33], [100, 1, 33, 17]), ([200], [199])]
)
def test_prefill_attention_agrees_with_the_reference(
    kernels: NativeKernels, seq_lens: list[int], num_queries: list[int], dtype: torch.dtype
) -> None:
    case = KvCase(seq_lens, 6, 2, 16, 64, num_queries, dtype)
    arguments = (case.q, case.kv_layer, case.tables, case.query_start, case.seq_lens, 0.125)
    expected = reference.paged_prefill_attention(*arguments)
    torch.testing.assert_close(kernels.paged_prefill_attention(*arguments), expected, rtol=3e-5, atol=3e-5)


def test_a_query_is_bitwise_the_same_in_decode_in_a_chunk_and_in_a_batch(kernels: NativeKernels) -> None:
    case = KvCase([130, 90], 9, 3, 16, 64, [130, 90])
    together = kernels.paged_prefill_attention(
        case.q, case.kv_layer, case.tables, case.query_start, case.seq_lens, 0.125
    )
    for row, seq, length in ((0, 0, 1), (17, 0, 18), (64, 0, 65), (129, 0, 130), (130 + 89, 1, 90)):
        alone = kernels.paged_decode_attention(
            case.q[row : row + 1], case.kv_layer, case.tables[seq : seq + 1], torch.tensor([length]), 0.125
        )
        assert torch.equal(alone[0], together[row])


def test_large_scores_neither_overflow_nor_vanish(kernels: NativeKernels) -> None:
    case = KvCase([40], 2, 1, 16, 16)
    case.q *= 1e4
    expected = reference.paged_decode_attention(case.q, case.kv_layer, case.tables, case.seq_lens, 0.2)
    found = kernels.paged_decode_attention(case.q, case.kv_layer, case.tables, case.seq_lens, 0.2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_the_cache_is_refused(kernels: NativeKernels) -> None:
    case = KvCase([20], 2, 1, 16, 16)
    outside = case.tables.clone()
    outside[0, 1] = case.kv_layer.shape[0]
    with pytest.raises(ValueError, match="outside the KV cache"):
        kernels.paged_decode_attention(case.q, case.kv_layer, outside, case.seq_lens, 0.2)
    with pytest.raises(ValueError, match="longer than its block table"):
        kernels.paged_decode_attention(case.q, case.kv_layer, case.tables, torch.tensor([49]), 0.2)
    k = torch.randn(1, 1, 16)
    with pytest.raises(ValueError, match="outside the KV cache"):
        kernels.store_kv(k, k, case.kv_layer, torch.tensor([case.kv_layer.shape[0] * 16]))


@pytest.mark.parametrize("shape", [(1, 16), (5, 64), (3, 7, 576)])
def test_rms_norm_agrees_with_the_reference(kernels: NativeKernels, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape) * 5, torch.randn(shape[-1])
    expected = reference.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-5), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 32), (5, 96), (3, 3072)])
def test_silu_mul_agrees_with_the_reference(kernels: NativeKernels, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape) * 20
    x[0, :4] = torch.tensor([-200.0, -88.0, 88.0, 200.0])
    torch.testing.assert_close(kernels.silu_mul(x), reference.silu_mul(x), rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (1, 1, 16), (4, 2, 80)])
def test_rope_agrees_with_the_reference(
    kernels: NativeKernels, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    q, k = torch.randn(7, num_heads, head_dim), torch.randn(7, num_kv_heads, head_dim)
    angles = torch.rand(50, head_dim // 2) * 6
    positions = torch.tensor([0, 49, 3, 3, 7, 20, 1])
    expected = reference.rope(q, k, positions, angles.cos(), angles.sin())
    found = kernels.rope(q, k, positions, angles.cos(), angles.sin())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="rotary tables"):
        kernels.rope(q, k, positions + 1, angles.cos(), angles.sin())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_store_kv_writes_what_the_reference_writes(kernels: NativeKernels, dtype: torch.dtype) -> None:
    scales = torch.tensor([1.0, 1e-6, 3e4, 1e-8, 7e4]).view(5, 1, 1)
    k, v = torch.randn(5, 3, 32) * scales, torch.randn(5, 3, 32)
    k[0, 0, :2] = torch.tensor([torch.nan, torch.inf])
    slots = torch.tensor([17, -1, 3, 40, 16])
    ours, theirs = torch.zeros(4, 3, 2, 3, 16, 32, dtype=dtype), torch.zeros(4, 3, 2, 3, 16, 32, dtype=dtype)
    kernels.store_kv(k, v, ours[:, 1], slots)
    reference.store_kv(k, v, theirs[:, 1], slots)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_a_processor_without_an_instruction_set_says_so() -> None:
    library = kernels_for().library
    with pytest.raises(NativeUnavailableError, match="has no altivec"):
        NativeKernels(library, 1, "altivec")


def test_a_library_that_is_none_says_so(tmp_path: Path) -> None:
    broken = tmp_path / "kernels.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(NativeUnavailableError, match="does not load"):
        native.load(broken)


def test_the_library_is_built_where_there_is_a_compiler() -> None:
    assert native.find_library() is not None or shutil.which("c++") is None


@pytest.mark.slow
def test_without_a_compiler_the_build_succeeds_and_builds_nothing(tmp_path: Path) -> None:
    """What pip runs at installation, on a machine whose compiler cannot be started."""
    environment = {**os.environ, "CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "out", "--build-temp", "temp"]
    build = [word if word not in ("out", "temp") else str(tmp_path / word) for word in command]
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("*.so")) == []
