"""Random weights for any config: for benchmarks and tests, where speed matters and text does not."""

import hashlib

import torch
from torch import Tensor


class DummyWeights:
    """Seeded normal tensors, scaled by fan-in so that activations keep their size.

    A tensor is a pure function of (seed, name, shape): every worker gets the same ones, in any order of asking.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Give one float32 tensor: normal(0, 1/sqrt(fan_in)) for a matrix, near 1 for a norm, near 0 for a bias."""
        digest = hashlib.sha256(f"{self._seed} {name} {shape}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        values = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            return values.mul_(shape[-1] ** -0.5)
        return values.mul_(0.02) if name.endswith(".bias") else values.mul_(0.02).add_(1.0)

    def quantized(self, name: str, shape: tuple[int, int]) -> None:
        """Give nothing: a generator holds floats only."""
        return None

    def is_float(self, name: str) -> bool:
        """Say yes."""
        return True

    def unused(self) -> list[str]:
        """Name nothing: a generator holds no tensors."""
        return []
