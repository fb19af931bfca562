"""Weights in 8-bit floats (e4m3), one scale per output channel; the activations keep their type."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST = 448.0


@dataclass(frozen=True, slots=True)
class Fp8Matrix:
    """A matrix `[N, K]`: data float8_e4m3fn `[N, K]`, scales float32 `[N]`; row n is `data[n] * scales[n]`."""

    data: Tensor
    scales: Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes that one product reads."""
        return self.data.numel() + self.scales.numel() * 4


def quantize_fp8(weight: Tensor) -> Fp8Matrix:
    """Round each row of a float matrix `[N, K]` to e4m3 under its own scale, so that its largest value is 448."""
    wide = weight.float()
    scales = wide.abs().amax(dim=1) / _LARGEST
    safe = torch.where(scales > 0, scales, torch.ones_like(scales))
    # A scale next to zero is itself rounded, and what then exceeds the range becomes NaN in some versions of torch.
    codes = (wide / safe.unsqueeze(1)).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return Fp8Matrix(codes, safe)


def dequantize(matrix: Fp8Matrix) -> Tensor:
    """Give the matrix in float32."""
    return matrix.data.float() * matrix.scales.unsqueeze(1)


def fp8_linear(x: Tensor, matrix: Fp8Matrix, bias: Tensor | None = None) -> Tensor:
    """Multiply rows by the matrix: products of x's type summed in float32, then scaled; returned in x's dtype."""
    product = (x.float() @ matrix.data.float().T) * matrix.scales
    if bias is not None:
        product = product + bias.float()
    return product.to(x.dtype)
