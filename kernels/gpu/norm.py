"""RMSNorm in Triton, one program a row, alone and together with the sum of the residual stream."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels.gpu.interpreted  # noqa: F401  mends the interpreter


@triton.jit
def _norm_kernel(
    x,
    residual,
    weight,
    out,
    total,
    eps,
    x_stride,
    size: tl.constexpr,
    width: tl.constexpr,
    adds: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, width)
    inside = column < size
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    dtype = value.dtype
    wide = value.to(tl.float32)
    if adds:
        wide += tl.load(residual + row * size + column, mask=inside, other=0.0).to(tl.float32)
        rounded = wide.to(dtype)
        tl.store(total + row * size + column, rounded, mask=inside)
        wide = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide) / size + eps)
    # Rounded before the weight comes in, as the models were trained with.
    normed = (wide * scale).to(dtype).to(tl.float32)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, (normed * factor).to(dtype), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `kernels.reference.rms_norm`; x `[T, d]`. Enqueued, not synchronised."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, x, weight, out, out, eps, adds=False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `kernels.reference.add_rms_norm`; x and residual `[T, d]`. Enqueued, not synchronised."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, residual.contiguous(), weight, out, total, eps, adds=True)
    return out, total


def _launch(x: Tensor, residual: Tensor, weight: Tensor, out: Tensor, total: Tensor, eps: float, *, adds: bool) -> None:
    num_rows, size = x.shape
    assert x.stride(1) == 1 and weight.is_contiguous()
    if num_rows == 0:
        return
    width = triton.next_power_of_2(size)
    launch: Any = _norm_kernel[(num_rows,)]
    launch(
        x, residual, weight, out, total, eps, x.stride(0), size=size, width=width, adds=adds,
        num_warps=min(8, max(1, width // 512)),
    )  # fmt: skip
