"""Products in Triton: the reference's values, and bits of a row that know nothing of its company."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.fp8 import quantize_fp8
from kernels.gpu import linear as triton_linear
from kernels.gpu.interpreted import IS_INTERPRETED
from kernels.gpu.linear import (
    LinearScratch,
    decode_linear,
    decode_linear_silu,
    decode_split,
    decode_tile,
    linear,
    linear_silu,
)

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
    [(0, torch.float16), (1, torch.bfloat16), (17, torch.float16), (40, torch.bfloat16), (66, torch.float32)],
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


@pytest.mark.parametrize(("num_splits", "num_rows"), [(1, 5), (2, 5), (5, 5), (3, 20)])
def test_splits_are_added_in_order_and_leave_the_counters_at_zero(
    num_splits: int, num_rows: int, device: torch.device
) -> None:
    x, weight = _random(device, torch.float32, num_rows, 600), _random(device, torch.float32, 70, 600)
    scratch = LinearScratch.on(device)
    first = decode_linear(x, weight, None, scratch, num_splits)
    gated = decode_linear_silu(x, weight, scratch, num_splits)
    _close(first, reference.linear(x, weight))
    _close(gated, reference.linear_silu(x, weight))
    # Stale sums and whoever arrived last leave nothing behind.
    scratch.partials.fill_(float("nan"))
    assert torch.equal(decode_linear(x, weight, None, scratch, num_splits), first)
    assert torch.equal(decode_linear_silu(x, weight, scratch, num_splits), gated)
    assert not scratch.counters.any()
    assert (scratch.counters.numel() > 0) == (num_splits > 1)


def test_what_the_largest_batch_reserved_is_enough_for_every_smaller_one(device: torch.device) -> None:
    """A recorded graph keeps the addresses, so a smaller batch must not make the scratch move."""
    weight, scratch = _random(device, torch.float32, 190, 140), LinearScratch.on(device)
    decode_linear(_random(device, torch.float32, 64, 140), weight, None, scratch, 2)
    places = scratch.partials.data_ptr(), scratch.counters.data_ptr()
    for num_rows in (33, 32, 16):
        decode_linear(_random(device, torch.float32, num_rows, 140), weight, None, scratch, 2)
        assert (scratch.partials.data_ptr(), scratch.counters.data_ptr()) == places, num_rows


def test_a_row_has_the_same_bits_alone_and_in_any_batch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    _multiply_exactly(device, monkeypatch)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    x, weight = _random(device, dtype, 66, 520), _random(device, dtype, 70, 520)
    # Tiles of 16, 32 and 64 columns, and two groups of them.
    for function in (linear, decode_linear, decode_linear_silu):
        alone = torch.cat([function(x[row : row + 1], weight) for row in (0, 17, 65)])
        for num_rows in (18, 40, 66):
            together = function(x[:num_rows], weight)
            for i, row in enumerate((0, 17, 65)):
                if row < num_rows:
                    assert torch.equal(together[row], alone[i]), (function.__name__, num_rows, row)


@pytest.mark.skipif(not IS_INTERPRETED, reason="a GPU orders programs as it likes")
def test_the_order_of_arrival_does_not_show(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    # Two tiles of two groups of rows and three splits of the depth.
    x, weight = _random(device, torch.float32, 66, 330), _random(device, torch.float32, 130, 330)
    scratch = LinearScratch.on(device)
    functions: tuple[Any, ...] = (decode_linear, decode_linear_silu)
    results = [function(x, weight, scratch=scratch, num_splits=3) for function in functions]
    place: Any = interpreter.InterpreterBuilder.set_grid_idx

    def anywhere(self: Any, *index: int) -> None:
        size = self.grid_dim
        order = torch.randperm(math.prod(size), generator=torch.Generator().manual_seed(1)).view(size)
        spot = int(order[index])
        place(self, spot // size[2] // size[1], spot // size[2] % size[1], spot % size[2])

    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", anywhere)
    for function, expected in zip(functions, results, strict=True):
        assert torch.equal(function(x, weight, scratch=scratch, num_splits=3), expected)
    assert scratch.counters.numel() > 0 and not scratch.counters.any()


# Outputs (a half of them, if gated) and depth of the weights of Llama-3.1-8B, Qwen3-1.7B and SmolLM2-135M.
WEIGHTS = [
    (6144, 4096, False), (4096, 4096, False), (14336, 4096, True), (4096, 14336, False), (128256, 4096, False),
    (4096, 2048, False), (2048, 2048, False), (6144, 2048, True), (2048, 6144, False), (151936, 2048, False),
    (960, 576, False), (576, 576, False), (1536, 576, True), (576, 1536, False), (49152, 576, False),
]  # fmt: skip


@pytest.mark.parametrize("weight_itemsize", [1, 2])
@pytest.mark.parametrize("num_rows", [1, 16, 17, 32, 64])
def test_all_programs_of_a_step_run_at_once(num_rows: int, weight_itemsize: int) -> None:
    for outputs, depth, is_gated in WEIGHTS:
        split = decode_split(outputs, depth)
        tile = decode_tile(num_rows, 2, weight_itemsize, is_gated=is_gated)
        assert tile.columns >= num_rows and split.depth % tile.depth == 0 and tile.num_stages >= 3
        assert (split.num_splits - 1) * split.depth < depth <= split.num_splits * split.depth, "no split is empty"
        num_programs = -(-outputs // tile.outputs) * split.num_splits
        room = triton_linear.MULTIPROCESSORS * tile.num_resident
        is_vocabulary = outputs > 40_000  # many waves of short programs, which even out
        assert num_programs <= room or is_vocabulary, (outputs, depth)
        if outputs * depth > 4e6:
            assert num_programs >= 0.9 * triton_linear.MULTIPROCESSORS, (outputs, depth)


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
