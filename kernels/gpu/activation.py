"""SiLU times multiply, in Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels.gpu.interpreted  # noqa: F401  mends the interpreter

_TILE = 1024


@triton.jit
def _silu_mul_kernel(gate_up, out, size: tl.constexpr, tile: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = column < size
    gate = tl.load(gate_up + row * (2 * size) + column, mask=inside, other=0.0)
    up = tl.load(gate_up + row * (2 * size) + size + column, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    # Rounded between the two, as the reference does.
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out + row * size + column, (silu * up.to(tl.float32)).to(gate.dtype), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `kernels.reference.silu_mul`; gate_up `[T, 2n]`. Enqueued, not synchronised."""
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.is_contiguous()
    out = torch.empty((num_rows, size), dtype=gate_up.dtype, device=gate_up.device)
    if num_rows:
        launch: Any = _silu_mul_kernel[(num_rows, -(-size // _TILE))]
        launch(gate_up, out, size=size, tile=_TILE, num_warps=4)
    return out
