"""Geometry of a KV block, the fingerprint that two workers compare, and how transfers reach the memory.

One block of all layers is contiguous:

    block b:  [layer 0: K heads | V heads][layer 1: K | V] ... [layer L-1: K | V]
    K heads:  [kv_head][offset in block][head_dim]

A transfer never touches the blocks themselves: the region gathers cells into a slot, the slot travels, and the region
at the other end scatters it. Whose memory the slots lie in is the region's business:

    blocks ──gather──► slot ──transport──► slot ──scatter──► blocks
    └───── one region ────┘                └──── another one ────┘
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from protocol.errors import FingerprintMismatch

LAYOUT = "block-layer-kv-head-offset-dim"

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# The memory that a slot lies in, and where an end of a connection is willing to have its slots.
SlotKind = Literal["host", "cuda"]
Staging = Literal["host", "auto", "device"]


class KVFingerprint(msgspec.Struct, frozen=True):
    """What two workers tell each other about their KV before a single block moves.

    Attributes:
        dtype: of keys and values.
        arithmetic: names the numbers that the worker computes with: a stream goes on token for token only where
            another worker computes as the first one did.
        device: where the blocks lie, "cpu" or "cuda". It is told and shown; all else must be equal at both ends.
    """

    model_hash: str
    dtype: str
    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    arithmetic: str = "float32"
    layout: str = LAYOUT
    device: str = "cpu"

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer of one block, keys and values."""
        return 2 * self.num_kv_heads * self.block_size * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all layers."""
        return self.num_layers * self.layer_bytes

    def require_equal(self, other: KVFingerprint, who: str) -> None:
        """Raise FingerprintMismatch, naming each differing field, unless all but the devices agree."""
        names = [name for name in self.__struct_fields__ if getattr(self, name) != getattr(other, name)]
        if not set(names) - {"device"}:
            return
        differing = "; ".join(f"{name}: {getattr(self, name)} here, {getattr(other, name)} there" for name in names)
        raise FingerprintMismatch(f"{who} holds a different model or KV layout ({differing})")


class SlotBuffer(Protocol):
    """Staging memory of one piece, or the leading part of it. A numpy array of bytes is one."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        ...

    def __getitem__(self, prefix: slice, /) -> Any:
        """Return the leading bytes as a SlotBuffer over the same memory."""
        ...


class SlotMemory(Protocol):
    """Makes slots and is the only one that touches their bytes, besides the transport that moves them.

    Every call is synchronous: when it returns, what it wrote can be sent, and what it read may be overwritten. Called
    on the event loop's thread only; once device slots were made there, that thread has a CUDA context.

    Raises (every method): TransferError where device memory cannot be had or used. Host memory never fails.
    """

    @property
    def slot_kind(self) -> SlotKind:
        """The memory that is nearest to the blocks. Slots of "host" memory can be had from everyone."""
        ...

    @property
    def checksums(self) -> tuple[str, ...]:
        """Names of the checksums that `checksum` computes; "xxh3" only over host slots."""
        ...

    def new_slots(self, num_slots: int, num_bytes: int, kind: SlotKind) -> list[SlotBuffer]:
        """Make slots of `num_bytes` each, every page touched once; their memory goes with the last reference."""
        ...

    def write(self, slot: SlotBuffer, source: SlotBuffer) -> None:
        """Copy `source`, a host array or a buffer of this memory's own kind, into a slot of the same size."""
        ...

    def read(self, slot: SlotBuffer) -> NDArray[np.uint8]:
        """Return the bytes of a slot, in host memory."""
        ...

    def checksum(self, payload: SlotBuffer, algorithm: str) -> int:
        """Return the checksum of a payload, in 64 bits without sign."""
        ...


class KVRegion(SlotMemory, Protocol):
    """The KV memory of one worker as transfers see it: gather from blocks, scatter into blocks.

    Both calls copy synchronously: when they return, `out` is filled or `source` may be reused, and what was scattered
    is seen by every kernel launched afterwards, on any stream. In turn

    - cells are gathered only once they are computed. On a GPU that means more than "launched": whoever hands cells to a
      transfer has waited for an event recorded behind the kernel that wrote them;
    - the caller guarantees that nobody else writes these layers of these blocks meanwhile.
    """

    @property
    def fingerprint(self) -> KVFingerprint:
        """Geometry and model of this memory."""
        ...

    def gather(self, block_ids: Sequence[int], first_layer: int, num_layers: int, out: SlotBuffer) -> None:
        """Copy layers of blocks into `out`, block by block: len(block_ids) * num_layers * layer_bytes bytes."""
        ...

    def scatter(self, block_ids: Sequence[int], first_layer: int, num_layers: int, source: SlotBuffer) -> None:
        """Copy `source`, ordered as `gather` leaves it, into layers of blocks; the ids do not repeat."""
        ...


class HostSlots:
    """`SlotMemory` of plain numpy arrays: the whole of it for a CPU, the host half of it for a GPU."""

    @property
    def slot_kind(self) -> SlotKind:
        """Host memory."""
        return "host"

    @property
    def checksums(self) -> tuple[str, ...]:
        """The one that needs no kernels."""
        return ("xxh3",)

    def new_slots(self, num_slots: int, num_bytes: int, kind: SlotKind) -> list[SlotBuffer]:
        """Make arrays of bytes."""
        assert kind == "host", kind
        return [np.ones(num_bytes, np.uint8) for _ in range(num_slots)]

    def write(self, slot: SlotBuffer, source: SlotBuffer) -> None:
        """Copy one array into another."""
        host_bytes(slot)[:] = host_bytes(source)

    def read(self, slot: SlotBuffer) -> NDArray[np.uint8]:
        """Return the array itself."""
        return host_bytes(slot)

    def checksum(self, payload: SlotBuffer, algorithm: str) -> int:
        """Return the xxh3-64."""
        assert algorithm == "xxh3", algorithm
        return xxhash.xxh3_64_intdigest(host_bytes(payload).data)


def host_bytes(slot: SlotBuffer) -> NDArray[np.uint8]:
    """Return a host slot as the array that it is."""
    assert isinstance(slot, np.ndarray), type(slot)
    return slot
