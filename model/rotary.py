"""Rotary position tables: cosine and sine of every position, with the model's frequency scaling applied."""

import math

import torch
from torch import Tensor

from model.config import ModelConfig, RopeScaling


def rotary_tables(
    config: ModelConfig, num_positions: int, device: torch.device, factors: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Build the tables for positions `0 .. num_positions - 1`: two `[num_positions, head_dim / 2]` float32 tensors.

    `factors` `[head_dim / 2]` divides the frequencies where the weights carry them. Computed in float32 throughout,
    as the reference implementation does.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = _scaled(1.0 / config.rope_theta**exponents, config.rope_scaling)
    if factors is not None:
        frequencies = frequencies / factors.cpu()
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    return angles.cos().to(device), angles.sin().to(device)


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind != "llama3":
        return frequencies
    # Llama 3.1: wavelengths beyond the trained context are stretched by the factor, short ones kept, and those
    # between are blended.
    wavelengths = 2 * math.pi / frequencies
    low = scaling.original_max_position / scaling.low_freq_factor
    high = scaling.original_max_position / scaling.high_freq_factor
    blend = (scaling.original_max_position / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    stretched = torch.where(wavelengths > low, frequencies / scaling.factor, frequencies)
    return torch.where((wavelengths <= low) & (wavelengths >= high), blended, stretched)
