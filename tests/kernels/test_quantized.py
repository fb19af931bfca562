"""Quantised weights: their meaning, packing, and products against the torch reference."""

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from kernels.cpu.native import NativeKernels
from kernels.cpu.packed import FloatRows, pack
from kernels.quantized import BLOCK_BYTES, QuantizedRows, quantize_activations, quantized_linear
from tests.kernels.native_cases import INSTRUCTION_SETS, kernels_for

KINDS = {
    "q8_0": GGMLQuantizationType.Q8_0,
    "q4_0": GGMLQuantizationType.Q4_0,
    "q4_1": GGMLQuantizationType.Q4_1,
}


@pytest.fixture(params=INSTRUCTION_SETS)
def kernels(request: pytest.FixtureRequest) -> NativeKernels:
    """Each instruction set that this processor has, with two threads."""
    return kernels_for(request.param, num_threads=2)


def stored(format_name: str, num_rows: int, cols: int, *, is_permuted: bool = False) -> QuantizedRows:
    """Quantise random rows as GGUF's own tools do."""
    values = np.random.default_rng(num_rows * cols).normal(size=(num_rows, cols)).astype(np.float32)
    order = np.random.default_rng(1).permutation(num_rows) if is_permuted else None
    return QuantizedRows(format_name, quantize(values, KINDS[format_name]), order)


@pytest.mark.parametrize("format_name", BLOCK_BYTES)
def test_dequantised_rows_are_those_of_the_gguf_package(format_name: str) -> None:
    rows = stored(format_name, 6, 96, is_permuted=True)
    assert rows.cols == 96
    expected = dequantize(rows.blocks, KINDS[format_name])[rows.order]
    torch.testing.assert_close(rows.dequantize(), torch.from_numpy(expected), rtol=0, atol=0)


@pytest.mark.parametrize("format_name", BLOCK_BYTES)
@pytest.mark.parametrize(("num_rows", "cols"), [(16, 32), (40, 96), (5, 800), (33, 1536)])
@pytest.mark.parametrize("num_inputs", [1, 3, 4, 11, 30])
def test_a_product_with_stored_rows_agrees_with_the_reference(
    kernels: NativeKernels, format_name: str, num_rows: int, cols: int, num_inputs: int
) -> None:
    rows = stored(format_name, num_rows, cols, is_permuted=True)
    x = torch.randn(num_inputs, cols) * torch.rand(num_inputs, 1) * 10
    x[0, :32] = 0.0
    found = kernels.linear(x, pack(kernels.library, [rows], format_name))
    expected = quantized_linear(x, rows.dequantize())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(("num_rows", "cols"), [(16, 16), (40, 100), (5, 800)])
@pytest.mark.parametrize("num_inputs", [1, 2, 7, 12])
def test_a_float_product_agrees_with_torch(kernels: NativeKernels, num_rows: int, cols: int, num_inputs: int) -> None:
    x, weights = torch.randn(num_inputs, cols), torch.randn(num_rows, cols)
    found = kernels.linear(x, pack(kernels.library, [FloatRows(weights.numpy())], "f32"))
    torch.testing.assert_close(found, x @ weights.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("format_name", ["f32", *BLOCK_BYTES])
@pytest.mark.parametrize("num_inputs", [2, 5, 64, 131])
def test_a_row_times_a_matrix_is_bitwise_the_same_in_every_batch(
    kernels: NativeKernels, format_name: str, num_inputs: int
) -> None:
    weights, x = torch.randn(37, 96), torch.randn(num_inputs, 96)
    matrix = pack(kernels.library, [FloatRows(weights.numpy())], format_name)
    together = kernels.linear(x, matrix)
    for row in (0, 1, num_inputs // 2, num_inputs - 1):
        assert torch.equal(kernels.linear(x[row : row + 1], matrix)[0], together[row])


@pytest.mark.parametrize("format_name", BLOCK_BYTES)
def test_rows_quantised_while_packing_are_those_of_the_gguf_package(kernels: NativeKernels, format_name: str) -> None:
    values = np.random.default_rng(3).normal(size=(24, 64)).astype(np.float32)
    ours = pack(kernels.library, [FloatRows(values)], format_name)
    theirs = pack(kernels.library, [QuantizedRows(format_name, quantize(values, KINDS[format_name]))], format_name)
    # Ties of rounding may fall the other way; one step of one weight in a thousand at most.
    assert np.mean(ours.data != theirs.data) < 2e-3


def test_stacked_parts_stand_under_each_other(kernels: NativeKernels) -> None:
    parts = [stored("q4_1", 20, 64), stored("q4_1", 7, 64, is_permuted=True), stored("q4_1", 9, 64)]
    x = torch.randn(3, 64)
    found = kernels.linear(x, pack(kernels.library, parts, "q4_1"))
    expected = torch.cat([kernels.linear(x, pack(kernels.library, [part], "q4_1")) for part in parts], dim=1)
    assert torch.equal(found, expected)


def test_activations_keep_their_size_and_sign() -> None:
    x = torch.randn(5, 64) * 100
    codes, scales = quantize_activations(x)
    rounded = codes.float().view(5, 2, 32) * scales.unsqueeze(-1)
    assert codes.abs().max() <= 127
    assert (rounded.view(5, 64) - x).abs().max() <= float(scales.max()) * 0.5001


def test_widths_that_do_not_divide_into_groups_are_refused(kernels: NativeKernels) -> None:
    with pytest.raises(ValueError, match="do not divide"):
        pack(kernels.library, [FloatRows(np.zeros((16, 48), np.float32))], "q8_0")
