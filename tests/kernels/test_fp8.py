"""Weights in 8-bit floats: how far rounding goes, and what a product with them means."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.fp8 import Fp8Matrix, dequantize, fp8_linear, quantize_fp8

LARGEST, SMALLEST_NORMAL, STEP_BELOW = 448.0, 2.0**-6, 2.0**-9


def _random(*shape: int, seed: int = 0) -> Tensor:
    values: Tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rounding_is_within_half_a_step(dtype: torch.dtype) -> None:
    # Rows of very different sizes, each with values down to a millionth of its largest.
    weight = _random(12, 300) * torch.logspace(-4, 3, 12)[:, None] * torch.logspace(0, -6, 300)
    weight = weight.to(dtype)
    matrix = quantize_fp8(weight)
    assert matrix.data.dtype == torch.float8_e4m3fn and matrix.scales.dtype == torch.float32
    error = (dequantize(matrix) - weight.float()).abs()
    # Three bits behind the first one: half a step is a sixteenth; below the normal range steps are of one size.
    half_step = torch.maximum(weight.float().abs() / 16, matrix.scales[:, None] * STEP_BELOW / 2)
    assert (error <= half_step * 1.00001).all()
    assert (error > 0).float().mean() > 0.5


def test_the_largest_value_of_a_row_takes_the_largest_number() -> None:
    weight = _random(9, 40)
    matrix = quantize_fp8(weight)
    assert (matrix.data.float().abs().amax(dim=1) == LARGEST).all()
    rows, places = torch.arange(9), weight.abs().argmax(dim=1)
    torch.testing.assert_close(dequantize(matrix)[rows, places], weight[rows, places], rtol=1e-6, atol=0)


def test_what_is_representable_is_kept() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    matrix = quantize_fp8(finite.float()[None] * 0.25)
    assert matrix.scales.tolist() == [0.25]
    assert torch.equal(matrix.data[0].view(torch.uint8), finite.view(torch.uint8)), "signs of zero and subnormals too"


def test_values_below_the_normal_range_are_rounded_to_its_steps_or_to_zero() -> None:
    small = torch.tensor([[LARGEST, SMALLEST_NORMAL, 5.4 * STEP_BELOW, -0.6 * STEP_BELOW, 0.4 * STEP_BELOW]])
    found = dequantize(quantize_fp8(small))
    assert found[0].tolist() == [LARGEST, SMALLEST_NORMAL, 5 * STEP_BELOW, -STEP_BELOW, 0.0]


@pytest.mark.parametrize("largest", [0.0, 1e-45, 1.57e-42, 1e-40, 1e-38])
def test_rows_of_nothing_or_next_to_nothing_stay_finite(largest: float) -> None:
    weight = _random(3, 16)
    weight[1] = torch.linspace(-largest, largest, 16)
    found = dequantize(quantize_fp8(weight))
    assert found.isfinite().all()
    assert (found[1].abs() <= largest).all()
    alone = dequantize(quantize_fp8(weight[[0, 2]]))
    assert torch.equal(found[[0, 2]], alone), "a row's scale is its own"


def test_a_broken_weight_shows() -> None:
    weight = _random(2, 8)
    weight[0, 3] = float("nan")
    found = fp8_linear(torch.ones(1, 8), quantize_fp8(weight))
    assert found[0].isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_one_hot_rows_read_the_matrix_out_exactly(dtype: torch.dtype) -> None:
    matrix = quantize_fp8(_random(20, 33))
    found = fp8_linear(torch.eye(33, dtype=dtype), matrix)
    assert found.dtype == dtype
    assert torch.equal(found, dequantize(matrix).T.to(dtype))


def test_a_product_is_summed_wide_then_scaled_and_given_its_bias() -> None:
    x, matrix, bias = _random(4, 64), quantize_fp8(_random(6, 64, seed=1)), _random(6, seed=2)
    expected = (x.double() @ dequantize(matrix).double().T + bias.double()).float()
    torch.testing.assert_close(fp8_linear(x, matrix, bias), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(reference.linear(x, matrix, bias), fp8_linear(x, matrix, bias))
    # A sum past float16's range comes back into it through its scale.
    large = Fp8Matrix(torch.full((1, 512), LARGEST).to(torch.float8_e4m3fn), torch.tensor([2.0**-10]))
    assert fp8_linear(torch.ones(1, 512, dtype=torch.float16), large).item() == 224.0


def test_its_bytes_are_counted() -> None:
    assert quantize_fp8(_random(7, 32)).num_bytes == 7 * 32 + 7 * 4
