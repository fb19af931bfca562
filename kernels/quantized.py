"""Quantised weights and activations in plain torch: what the native integer kernels mean.

Weights come in GGUF's blocks of 32 consecutive inputs of one output:

    q8_0: d fp16, 32 x int8            w = d * q
    q4_0: d fp16, 16 bytes of nibbles  w = d * (q - 8)
    q4_1: d fp16, m fp16, nibbles      w = d * q + m

(the low nibbles are inputs 0-15, the high ones 16-31). Activations are rounded to int8 with one scale per 32 inputs of
a row, so that a row's result depends on that row alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GROUP = 32
BLOCK_BYTES = {"q8_0": 34, "q4_0": 18, "q4_1": 20}


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Rows of a weight matrix as a GGUF file holds them.

    format: a key of `BLOCK_BYTES`.
    blocks: `[n, cols / 32 * block_bytes]` uint8, C-contiguous; may be a view of a memory-mapped file.
    order: `[n]` int64 or None: output i is row order[i] of `blocks`.
    """

    format: str
    blocks: NDArray[np.uint8]
    order: NDArray[np.int64] | None = None

    @property
    def cols(self) -> int:
        """Inputs of each output."""
        return int(self.blocks.shape[1]) // BLOCK_BYTES[self.format] * GROUP

    def dequantize(self) -> Tensor:
        """Return the weights `[n, cols]` as float32, in output order."""
        num_rows = self.blocks.shape[0]
        blocks = self.blocks.reshape(num_rows, -1, BLOCK_BYTES[self.format])
        halves = np.ascontiguousarray(blocks[..., : 4 if self.format == "q4_1" else 2]).view(np.float16)
        scales = halves[..., :1].astype(np.float32)
        if self.format == "q8_0":
            values = scales * np.ascontiguousarray(blocks[..., 2:]).view(np.int8)
        else:
            nibbles = blocks[..., 2 * halves.shape[-1] :]
            codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1).astype(np.float32)
            values = (
                scales * (codes - 8) if self.format == "q4_0" else scales * codes + halves[..., 1:].astype(np.float32)
            )
        rows = values.astype(np.float32).reshape(num_rows, -1)
        return torch.from_numpy(rows if self.order is None else rows[self.order])


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows to int8 with a scale per group of 32.

    x `[T, cols]` float32; returns codes `[T, cols]` int8 and scales `[T, cols / 32]` float32 with x ~ codes * scale.
    """
    groups = x.reshape(x.shape[0], -1, GROUP)
    extreme = groups.abs().amax(dim=-1, keepdim=True)
    # A true division: `127.0 / tensor` multiplies by a rounded reciprocal.
    inverse = torch.where(extreme > 0, torch.full_like(extreme, 127.0) / extreme, torch.zeros_like(extreme))
    codes = torch.round(groups * inverse).to(torch.int8)
    return codes.reshape(x.shape), (extreme / 127.0).squeeze(-1)


def quantized_linear(x: Tensor, weights: Tensor) -> Tensor:
    """Multiply rows, rounded as `quantize_activations` does, with weights `[out, cols]`; float32 `[T, out]`."""
    codes, scales = quantize_activations(x)
    rounded = codes.float().reshape(x.shape[0], -1, GROUP) * scales.unsqueeze(-1)
    return rounded.reshape(x.shape) @ weights.T
