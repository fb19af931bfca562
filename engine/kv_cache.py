"""The KV memory of one worker: one tensor, block-major, and the region that transfers read and write.

    tensor: [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]

All layers of a block are contiguous, so a transfer of whole blocks is one copy per block, and a range of layers of a
block is contiguous too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from protocol.kv_layout import KVFingerprint

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class KVCache:
    """Owns the KV tensor; also its `protocol.kv_layout.KVRegion`.

    Args:
        fingerprint: geometry and dtype.
        num_blocks: size of the pool.
        device: where the tensor lives. On a CPU pages are touched by first use only.

    `gather` and `scatter` run on the caller's thread beside the compute thread: the hand-off guarantees that the cells
    they touch are not being computed. On a GPU both synchronise the calling thread with the copy.
    """

    def __init__(self, fingerprint: KVFingerprint, num_blocks: int, device: torch.device) -> None:
        self._fingerprint = fingerprint
        f = fingerprint
        shape = (num_blocks, f.num_layers, 2, f.num_kv_heads, f.block_size, f.head_dim)
        self._host: NDArray[np.uint8] | None = None
        if device.type == "cpu":
            # numpy takes zeroed pages from the system, which cost nothing until touched; torch.zeros writes them all.
            self._host = np.zeros((num_blocks, f.num_layers, f.layer_bytes), np.uint8)
            self._bytes = torch.from_numpy(self._host)
            self.tensor = self._bytes.view(TORCH_DTYPES[f.dtype]).view(shape)
        else:
            self.tensor = torch.zeros(shape, dtype=TORCH_DTYPES[f.dtype], device=device)
            self._bytes = self.tensor.view(torch.uint8).view(num_blocks, f.num_layers, f.layer_bytes)

    @property
    def fingerprint(self) -> KVFingerprint:
        """Geometry and model of this memory."""
        return self._fingerprint

    def gather(self, block_ids: Sequence[int], first_layer: int, num_layers: int, out: NDArray[np.uint8]) -> None:
        """Copy layers of blocks into `out`, block by block."""
        rows = out.reshape(len(block_ids), num_layers, self._fingerprint.layer_bytes)
        last_layer = first_layer + num_layers
        if self._host is not None:
            for row, block_id in zip(rows, block_ids, strict=True):
                row[:] = self._host[block_id, first_layer:last_layer]
            return
        ids = torch.tensor(block_ids, dtype=torch.int64, device=self.tensor.device)
        torch.from_numpy(rows).copy_(self._bytes[ids, first_layer:last_layer])

    def scatter(self, block_ids: Sequence[int], first_layer: int, num_layers: int, source: NDArray[np.uint8]) -> None:
        """Copy `source`, ordered as `gather` leaves it, into layers of blocks."""
        rows = source.reshape(len(block_ids), num_layers, self._fingerprint.layer_bytes)
        last_layer = first_layer + num_layers
        if self._host is not None:
            for row, block_id in zip(rows, block_ids, strict=True):
                self._host[block_id, first_layer:last_layer] = row
            return
        ids = torch.tensor(block_ids, dtype=torch.int64, device=self.tensor.device)
        self._bytes[ids, first_layer:last_layer] = torch.from_numpy(rows).to(self.tensor.device)
        torch.cuda.current_stream(self.tensor.device).synchronize()
