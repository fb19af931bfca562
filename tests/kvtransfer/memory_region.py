"""A KV region in plain numpy memory, and a record of every write to it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from protocol.kv_layout import KVFingerprint


def fingerprint(num_layers: int = 3, model_hash: str = "model", head_dim: int = 4) -> KVFingerprint:
    """Return a small layout: 128 * head_dim bytes per layer of a block."""
    return KVFingerprint(model_hash, "float32", 16, num_layers, 1, head_dim)


class MemoryRegion:
    """KVRegion over an array of shape [num_blocks, num_layers, layer_bytes].

    Args:
        seed: fills the memory with random bytes; None leaves zeros.
    """

    def __init__(self, layout: KVFingerprint, num_blocks: int, seed: int | None = None) -> None:
        self.layout = layout
        shape = (num_blocks, layout.num_layers, layout.layer_bytes)
        self.memory: NDArray[np.uint8] = np.zeros(shape, np.uint8)
        if seed is not None:
            self.memory = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        self.num_writes = 0

    @property
    def fingerprint(self) -> KVFingerprint:
        """Geometry of this memory."""
        return self.layout

    def gather(self, block_ids: Sequence[int], first_layer: int, num_layers: int, out: NDArray[np.uint8]) -> None:
        """Copy out of blocks."""
        shape = (len(block_ids), num_layers, self.layout.layer_bytes)
        out.reshape(shape)[:] = self.memory[list(block_ids), first_layer : first_layer + num_layers]

    def scatter(self, block_ids: Sequence[int], first_layer: int, num_layers: int, source: NDArray[np.uint8]) -> None:
        """Copy into blocks."""
        shape = (len(block_ids), num_layers, self.layout.layer_bytes)
        self.memory[list(block_ids), first_layer : first_layer + num_layers] = source.reshape(shape)
        self.num_writes += 1
