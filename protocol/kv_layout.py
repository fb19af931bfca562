"""Geometry of a KV block, the fingerprint that two workers compare, and how transfers reach the memory.

One block of all layers is contiguous:

    block b:  [layer 0: K heads | V heads][layer 1: K | V] ... [layer L-1: K | V]
    K heads:  [kv_head][offset in block][head_dim]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from protocol.errors import FingerprintMismatch

LAYOUT = "block-layer-kv-head-offset-dim"

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class KVFingerprint(msgspec.Struct, frozen=True):
    """What must be equal at both ends before a single block moves.

    Attributes:
        dtype: of keys and values.
        arithmetic: names the numbers that the worker computes with: a stream goes on token for token only where
            another worker computes as the first one did.
    """

    model_hash: str
    dtype: str
    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    arithmetic: str = "float32"
    layout: str = LAYOUT

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer of one block, keys and values."""
        return 2 * self.num_kv_heads * self.block_size * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all layers."""
        return self.num_layers * self.layer_bytes

    def require_equal(self, other: KVFingerprint, who: str) -> None:
        """Raise FingerprintMismatch, naming each differing field, unless `other` is equal."""
        names = self.__struct_fields__
        differing = [f"{n}: {getattr(self, n)} here, {getattr(other, n)} there" for n in names]
        differing = [d for n, d in zip(names, differing, strict=True) if getattr(self, n) != getattr(other, n)]
        if differing:
            raise FingerprintMismatch(f"{who} holds a different model or KV layout ({'; '.join(differing)})")


class KVRegion(Protocol):
    """The KV memory of one worker as transfers see it: gather from blocks, scatter into blocks.

    Both calls copy synchronously on the calling thread: when they return, `out` is filled or `source` may be reused.
    The caller guarantees that nobody else writes these layers of these blocks meanwhile.
    """

    @property
    def fingerprint(self) -> KVFingerprint:
        """Geometry and model of this memory."""
        ...

    def gather(self, block_ids: Sequence[int], first_layer: int, num_layers: int, out: NDArray[np.uint8]) -> None:
        """Copy layers of blocks into `out`, block by block: len(block_ids) * num_layers * layer_bytes bytes."""
        ...

    def scatter(self, block_ids: Sequence[int], first_layer: int, num_layers: int, source: NDArray[np.uint8]) -> None:
        """Copy `source`, ordered as `gather` leaves it, into layers of blocks."""
        ...
