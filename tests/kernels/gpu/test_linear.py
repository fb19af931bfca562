"""Products in Triton: the reference's values, and bits of a row that know nothing of its company."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.fp8 import quantize_fp8
from kernels.gpu import linear as triton_linear
from kernels.gpu.linear import LinearScratch, decode_linear, decode_linear_silu, decode_shape, linear, linear_silu

# Results are rounded up to three times: bfloat16 keeps 8 bits (the interpreter cuts off), float16 11;
# float32 only differs by the order of summation.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHAPES = [(130, 200), (33, 320)]


def _random(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    values: Tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return values.div(shape[-1] ** 0.25).to(device, dtype)


def _close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.float(), expected.float(), rtol=TOLERANCE[got.dtype], atol=TOLERANCE[got.dtype])


@pytest.mark.parametrize(
    ("num_rows", "dtype"),
    [(0, torch.float16), (1, torch.bfloat16), (17, torch.float16), (17, torch.bfloat16), (66, torch.float32)],
    ids=str,
)
def test_both_ways_give_the_reference(num_rows: int, dtype: torch.dtype, device: torch.device) -> None:
    for outputs, depth in SHAPES:
        x, weight = _random(device, dtype, num_rows, depth), _random(device, dtype, outputs, depth)
        bias = _random(device, dtype, outputs)
        for function in (linear, decode_linear):
            _close(function(x, weight, bias), reference.linear(x, weight, bias))
        if outputs % 2 == 0:
            for gated in (linear_silu, decode_linear_silu):
                _close(gated(x, weight), reference.linear_silu(x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_eight_bit_weights_are_widened_and_scaled(dtype: torch.dtype, device: torch.device) -> None:
    x, weight = _random(device, dtype, 5, 200), quantize_fp8(_random(device, torch.float32, 96, 200, seed=1))
    bias = _random(device, dtype, 96)
    for function in (linear, decode_linear):
        _close(function(x, weight, bias), reference.linear(x, weight, bias))
    for gated in (linear_silu, decode_linear_silu):
        _close(gated(x, weight), reference.linear_silu(x, weight))


def test_a_strided_row_is_read_where_it_lies(device: torch.device) -> None:
    wide = _random(device, torch.float32, 6, 300)
    x, weight = wide[:, :200], _random(device, torch.float32, 40, 200)
    for function in (linear, decode_linear):
        _close(function(x, weight), reference.linear(x, weight))


@pytest.mark.parametrize("num_splits", [1, 2, 3, 5])
def test_splits_are_added_in_order_and_leave_the_counters_at_zero(num_splits: int, device: torch.device) -> None:
    """In the interpreter programs run in one order; on a GPU in any, which the repetition gives a chance to show."""
    x, weight = _random(device, torch.float32, 20, 320), _random(device, torch.float32, 130, 320)
    scratch = LinearScratch.on(device)
    first = decode_linear(x, weight, None, scratch, num_splits)
    gated = decode_linear_silu(x, weight, scratch, num_splits)
    _close(first, reference.linear(x, weight))
    _close(gated, reference.linear_silu(x, weight))
    for _ in range(3):
        assert torch.equal(decode_linear(x, weight, None, scratch, num_splits), first)
        assert torch.equal(decode_linear_silu(x, weight, scratch, num_splits), gated)
        assert not scratch.counters.any()
    assert (scratch.counters.numel() > 0) == (num_splits > 1)


def test_a_row_has_the_same_bits_alone_and_in_any_batch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    _multiply_exactly(device, monkeypatch)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    x, weight = _random(device, dtype, 66, 256), _random(device, dtype, 70, 256)
    for function in (linear, decode_linear, linear_silu, decode_linear_silu):
        alone = torch.cat([function(x[row : row + 1], weight) for row in (0, 3, 40, 65)])
        for num_rows in (4, 18, 41, 66):
            together = function(x[:num_rows], weight)
            for i, row in enumerate((0, 3, 40, 65)):
                if row < num_rows:
                    assert torch.equal(together[row], alone[i]), (function.__name__, num_rows, row)


def test_the_cut_of_a_weight_fills_the_machine_and_knows_no_batch() -> None:
    for outputs, depth in ((6144, 4096), (4096, 4096), (4096, 14336), (2048, 2048), (2048, 6144)):
        shape = decode_shape(outputs, depth, 2, is_gated=False)
        assert shape.num_tiles * shape.num_splits >= 0.8 * triton_linear.TARGET_PROGRAMS, (outputs, depth)
        assert shape.num_splits * shape.steps_per_split * shape.tile_depth >= depth
        assert (shape.num_splits - 1) * shape.steps_per_split * shape.tile_depth < depth, "no stretch is empty"
    assert decode_shape(128256, 4096, 2, is_gated=False).num_splits == 1
    assert decode_shape(64, 64, 2, is_gated=False).num_splits == 1


def _multiply_exactly(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter let products be summed element by element in one order: numpy's library has several."""
    if device.type != "cpu":
        return
    from triton.runtime import interpreter

    def multiply(self: object, a: object, b: object, d: object, *rest: object) -> object:
        left, right, total = (handle.data for handle in (a, b, d))  # type: ignore[attr-defined]
        result = total.copy()
        for place in range(left.shape[1]):
            result += left[:, place, None] * right[None, place, :]
        return interpreter.TensorHandle(result, d.dtype.scalar)  # type: ignore[attr-defined]

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", multiply)
