"""A KV region in plain memory, one in memory that only the region itself can touch, and a record of every write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol.errors import TransferError
from protocol.kv_layout import HostSlots, KVFingerprint, SlotBuffer, SlotKind, host_bytes


def fingerprint(
    num_layers: int = 3, model_hash: str = "model", head_dim: int = 4, device: str = "cpu"
) -> KVFingerprint:
    """Return a small layout: 128 * head_dim bytes per layer of a block."""
    return KVFingerprint(model_hash, "float32", 16, num_layers, 1, head_dim, device=device)


class MemoryRegion(HostSlots):
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
        self.algorithms: set[str] = set()  # of checksums, as they were asked for

    @property
    def fingerprint(self) -> KVFingerprint:
        """Geometry of this memory."""
        return self.layout

    @property
    def checksums(self) -> tuple[str, ...]:
        """Both."""
        return ("xxh3", "words64")

    def checksum(self, payload: SlotBuffer, algorithm: str) -> int:
        """Return either one."""
        self.algorithms.add(algorithm)
        return words64(host_bytes(payload)) if algorithm == "words64" else super().checksum(payload, algorithm)

    def gather(self, block_ids: Sequence[int], first_layer: int, num_layers: int, out: SlotBuffer) -> None:
        """Copy out of blocks."""
        shape = (len(block_ids), num_layers, self.layout.layer_bytes)
        host_bytes(out).reshape(shape)[:] = self.memory[list(block_ids), first_layer : first_layer + num_layers]

    def scatter(self, block_ids: Sequence[int], first_layer: int, num_layers: int, source: SlotBuffer) -> None:
        """Copy into blocks."""
        shape = (len(block_ids), num_layers, self.layout.layer_bytes)
        self.memory[list(block_ids), first_layer : first_layer + num_layers] = host_bytes(source).reshape(shape)
        self.num_writes += 1


class OpaqueSlot:
    """What a slot in GPU memory is to everyone but its region: a size, leading parts, and a pointer for UCX.

    No byte of it can be read or written through it: it is no sequence, no array and no buffer.
    """

    __slots__ = ("_hidden",)

    def __init__(self, hidden: NDArray[np.uint8]) -> None:
        self._hidden = hidden

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self._hidden.nbytes

    def __getitem__(self, prefix: slice, /) -> OpaqueSlot:
        assert isinstance(prefix, slice) and not prefix.start and prefix.step is None, "only the leading part"
        return OpaqueSlot(self._hidden[prefix])

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        pointer = self._hidden.__array_interface__["data"][0]
        return {"shape": self._hidden.shape, "typestr": "|u1", "data": (pointer, False), "strides": None, "version": 3}


class DeviceRegion(MemoryRegion):
    """A MemoryRegion that plays a GPU: its own slots are opaque and have no xxh3; it makes host slots too.

    `broken` names a method that fails on opaque slots, as one on a device may.
    """

    broken = ""

    @property
    def slot_kind(self) -> SlotKind:
        """The part it plays."""
        return "cuda"

    def new_slots(self, num_slots: int, num_bytes: int, kind: SlotKind) -> list[SlotBuffer]:
        """Make opaque slots, or plain ones for the host."""
        if kind == "host":
            return super().new_slots(num_slots, num_bytes, kind)
        self._check("new_slots")
        slab = np.ones((num_slots, num_bytes), np.uint8)
        return [OpaqueSlot(row) for row in slab]

    def write(self, slot: SlotBuffer, source: SlotBuffer) -> None:
        """Copy a host array or an opaque slot."""
        self._bytes(slot, "write")[:] = self._bytes(source)

    def read(self, slot: SlotBuffer) -> NDArray[np.uint8]:
        """Return a copy."""
        return self._bytes(slot, "read").copy()

    def checksum(self, payload: SlotBuffer, algorithm: str) -> int:
        """Return words64 of opaque slots, either one of host slots."""
        assert algorithm == "words64" or not isinstance(payload, OpaqueSlot), "xxh3 over device memory"
        return super().checksum(self._bytes(payload, "checksum"), algorithm)

    def gather(self, block_ids: Sequence[int], first_layer: int, num_layers: int, out: SlotBuffer) -> None:
        """Copy out of blocks."""
        super().gather(block_ids, first_layer, num_layers, self._bytes(out, "gather"))

    def scatter(self, block_ids: Sequence[int], first_layer: int, num_layers: int, source: SlotBuffer) -> None:
        """Copy into blocks."""
        super().scatter(block_ids, first_layer, num_layers, self._bytes(source, "scatter"))

    def _bytes(self, slot: SlotBuffer, what: str = "") -> NDArray[np.uint8]:
        if not isinstance(slot, OpaqueSlot):
            return host_bytes(slot)
        self._check(what)
        return slot._hidden

    def _check(self, what: str) -> None:
        if what and what == self.broken:
            raise TransferError(f"the device cannot {what}")


def words64(payload: NDArray[np.uint8]) -> int:
    """Return a sum over 64-bit words, each times an odd number of its own. Both ends of a test use this one."""
    words = np.pad(payload, (0, -payload.nbytes % 8)).view(np.uint64)
    return int((words * (2 * np.arange(words.size, dtype=np.uint64) + 1)).sum(dtype=np.uint64))
