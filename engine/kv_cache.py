"""The KV memory of one worker: one tensor, block-major, and the region that transfers read and write.

    tensor: [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]

All layers of a block are contiguous, so a transfer of whole blocks is one copy per block, and a range of layers of a
block is contiguous too. Between blocks and slots, on a GPU:

    blocks ──gather kernel──► device slot                            device slot ──scatter kernel──► blocks
    blocks ──gather kernel──► slab ──copy──► pinned host slot ──copy──► slab ──scatter kernel──► blocks

on a queue that nothing else uses. Each call enqueues there, marks the end and waits for the mark. So it runs beside the
compute thread's kernels and not behind them, and order is kept by those who give the word: cells are handed to a
transfer when their kernel is done, and a sequence joins a batch when its scatters are (`protocol.kv_layout`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.device_queue import DeviceQueue, open_queue
from engine.pool_memory import new_pool_memory
from kernels.checksum import checksum
from kernels.reference import gather_blocks, scatter_blocks
from protocol.errors import TransferError
from protocol.kv_layout import HostSlots, KVFingerprint, SlotBuffer, SlotKind, host_bytes

log = logging.getLogger(__name__)

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHECKSUMS = ("xxh3", "words64")
_SLOT_ALIGNMENT_BYTES = 512  # of what CUDA allocates, so that every slot of a slab is aligned as the first one is


@dataclass(frozen=True, slots=True)
class BlockKernels:
    """What moves blocks on a device. They may only enqueue, and need not wait.

    Attributes:
        gather, scatter: as `kernels.reference.gather_blocks` and `scatter_blocks`.
        words64: gives `kernels.checksum` of a flat uint8 tensor as an int64 tensor of one element.
    """

    gather: Callable[[Tensor, Tensor, int, int, Tensor], None]
    scatter: Callable[[Tensor, Tensor, int, int, Tensor], None]
    words64: Callable[[Tensor], Tensor]


class DeviceSlot:
    """A slot in GPU memory, or the leading part of one. UCX finds the memory by `__cuda_array_interface__`."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        assert tensor.dtype == torch.uint8 and tensor.dim() == 1 and tensor.is_contiguous()
        self.tensor = tensor

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.tensor.numel()

    def __getitem__(self, prefix: slice, /) -> DeviceSlot:
        return DeviceSlot(self.tensor[prefix])

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        interface: dict[str, Any] = self.tensor.__cuda_array_interface__
        return interface


class KVCache:
    """Owns the KV tensor; also its `protocol.kv_layout.KVRegion`.

    Args:
        fingerprint: geometry and dtype.
        num_blocks: size of the pool.
        device: where the tensor lives. On a CPU a thread touches its pages ahead of their use.
        kernels: what copies blocks on a GPU; None is Triton's. Unused on a CPU.

    The region's calls run on the event loop's thread beside the compute thread. On a GPU each of them waits until the
    device is done with it, other Python threads running meanwhile. On a GPU the constructor compiles the kernels.
    """

    def __init__(
        self,
        fingerprint: KVFingerprint,
        num_blocks: int,
        device: torch.device,
        kernels: BlockKernels | None = None,
    ) -> None:
        self._fingerprint = fingerprint
        f = fingerprint
        shape = (num_blocks, f.num_layers, 2, f.num_kv_heads, f.block_size, f.head_dim)
        self._blocks: HostBlocks | DeviceBlocks
        if device.type == "cpu":
            self._memory = new_pool_memory(num_blocks * f.block_bytes)  # kept: it is backed while it lives
            memory = self._memory.reshape(num_blocks, f.num_layers, f.layer_bytes)
            self.tensor = torch.from_numpy(memory).view(TORCH_DTYPES[f.dtype]).view(shape)
            self._blocks = HostBlocks(memory)
        else:
            queue = open_queue(device)
            with queue.active():
                self.tensor = torch.zeros(shape, dtype=TORCH_DTYPES[f.dtype], device=device)
            self._blocks = DeviceBlocks(self.tensor, queue, kernels or triton_kernels())

    @property
    def fingerprint(self) -> KVFingerprint:
        """Geometry and model of this memory."""
        return self._fingerprint

    @property
    def slot_kind(self) -> SlotKind:
        """The memory that the blocks are in."""
        return self._blocks.slot_kind

    @property
    def checksums(self) -> tuple[str, ...]:
        """All of them; over device slots only words64."""
        return CHECKSUMS

    def new_slots(self, num_slots: int, num_bytes: int, kind: SlotKind) -> list[SlotBuffer]:
        """Make slots; for a GPU those of the host are pinned, and those of the device lie in one piece of memory."""
        return self._blocks.new_slots(num_slots, num_bytes, kind)

    def write(self, slot: SlotBuffer, source: SlotBuffer) -> None:
        """Copy into a slot."""
        self._blocks.write(slot, source)

    def read(self, slot: SlotBuffer) -> NDArray[np.uint8]:
        """Return a slot's bytes, in host memory."""
        return self._blocks.read(slot)

    def checksum(self, payload: SlotBuffer, algorithm: str) -> int:
        """Return the checksum of a payload."""
        return self._blocks.checksum(payload, algorithm)

    def gather(self, block_ids: Sequence[int], first_layer: int, num_layers: int, out: SlotBuffer) -> None:
        """Copy layers of blocks into `out`, block by block."""
        self._blocks.gather(block_ids, first_layer, num_layers, out)

    def scatter(self, block_ids: Sequence[int], first_layer: int, num_layers: int, source: SlotBuffer) -> None:
        """Copy `source`, ordered as `gather` leaves it, into layers of blocks."""
        self._blocks.scatter(block_ids, first_layer, num_layers, source)


class HostBlocks(HostSlots):
    """Blocks in host memory.

    Args:
        memory: `[num_blocks, num_layers, layer_bytes]` uint8.
    """

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self._memory = memory

    def checksum(self, payload: SlotBuffer, algorithm: str) -> int:
        """Return xxh3 or words64."""
        return host_checksum(host_bytes(payload), algorithm)

    def gather(self, block_ids: Sequence[int], first_layer: int, num_layers: int, out: SlotBuffer) -> None:
        """Copy block by block."""
        rows = host_bytes(out).reshape(len(block_ids), num_layers, self._memory.shape[2])
        for row, block_id in zip(rows, block_ids, strict=True):
            row[:] = self._memory[block_id, first_layer : first_layer + num_layers]

    def scatter(self, block_ids: Sequence[int], first_layer: int, num_layers: int, source: SlotBuffer) -> None:
        """Copy block by block."""
        rows = host_bytes(source).reshape(len(block_ids), num_layers, self._memory.shape[2])
        for row, block_id in zip(rows, block_ids, strict=True):
            self._memory[block_id, first_layer : first_layer + num_layers] = row


class DeviceBlocks(HostSlots):
    """Blocks in GPU memory, and slots there and in pinned host memory.

    Args:
        tensor: the KV tensor. What the queue was told before may still be filling it.
        queue: for these copies alone.
        kernels: run once here, so that none of them is compiled while a request waits.
    """

    def __init__(self, tensor: Tensor, queue: DeviceQueue, kernels: BlockKernels) -> None:
        self._tensor = tensor
        self._queue = queue
        self._kernels = kernels
        self._slab = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        layer_bytes = tensor[0, 0].numel() * tensor.element_size()
        (slot,) = self.new_slots(1, layer_bytes, "cuda")
        self.gather([0], 0, 1, slot)
        self.scatter([0], 0, 1, slot)  # nobody's block yet: it gets back the zeros that it holds
        self.checksum(slot, "words64")

    @property
    def slot_kind(self) -> SlotKind:
        """GPU memory."""
        return "cuda"

    def new_slots(self, num_slots: int, num_bytes: int, kind: SlotKind) -> list[SlotBuffer]:
        """Make slots; those of the device are cut from one piece of memory, which a peer maps once."""
        if kind == "host":
            return [self._pinned(num_bytes) for _ in range(num_slots)]
        stride = -(-num_bytes // _SLOT_ALIGNMENT_BYTES) * _SLOT_ALIGNMENT_BYTES
        with self._copying("no memory for slots"):
            slab = torch.full((num_slots * stride,), 1, dtype=torch.uint8, device=self._tensor.device)
        return [DeviceSlot(slab[start : start + num_bytes]) for start in range(0, num_slots * stride, stride)]

    def write(self, slot: SlotBuffer, source: SlotBuffer) -> None:
        """Copy a host array, or another slot of the device, into a slot."""
        if not isinstance(slot, DeviceSlot):
            return super().write(slot, source)
        with self._copying("slot not written"):
            slot.tensor.copy_(source.tensor if isinstance(source, DeviceSlot) else torch.from_numpy(source))

    def read(self, slot: SlotBuffer) -> NDArray[np.uint8]:
        """Return the bytes: of a host slot itself, of a device slot a copy."""
        if not isinstance(slot, DeviceSlot):
            return super().read(slot)
        with self._copying("slot not read"):
            copy: NDArray[np.uint8] = slot.tensor.cpu().numpy()
        return copy

    def checksum(self, payload: SlotBuffer, algorithm: str) -> int:
        """Return the checksum, computed where the payload lies."""
        if not isinstance(payload, DeviceSlot):
            return host_checksum(host_bytes(payload), algorithm)
        assert algorithm == "words64", algorithm
        with self._copying("checksum not computed"):
            total = self._kernels.words64(payload.tensor)
            return int(total.item()) & (1 << 64) - 1

    def gather(self, block_ids: Sequence[int], first_layer: int, num_layers: int, out: SlotBuffer) -> None:
        """Gather on the device, then copy if the slot is the host's."""
        with self._copying("blocks not gathered"):
            slab = self._on_device(out)
            self._kernels.gather(self._tensor, self._ids(block_ids), first_layer, num_layers, slab)
            if not isinstance(out, DeviceSlot):
                torch.from_numpy(host_bytes(out)).copy_(slab, non_blocking=True)

    def scatter(self, block_ids: Sequence[int], first_layer: int, num_layers: int, source: SlotBuffer) -> None:
        """Copy if the slot is the host's, then scatter on the device."""
        with self._copying("blocks not scattered"):
            slab = self._on_device(source)
            if not isinstance(source, DeviceSlot):
                slab.copy_(torch.from_numpy(host_bytes(source)), non_blocking=True)
            self._kernels.scatter(self._tensor, self._ids(block_ids), first_layer, num_layers, slab)

    @contextmanager
    def _copying(self, failure: str) -> Iterator[None]:
        """Enqueue here within, and wait for it on leaving."""
        try:
            with self._queue.active():
                yield
            self._queue.mark().wait()
        except RuntimeError as error:  # torch's, for anything that CUDA says
            raise TransferError(f"{failure}: {error}") from error

    def _ids(self, block_ids: Sequence[int]) -> Tensor:
        return self._queue.upload(np.array(block_ids, np.int64))

    def _on_device(self, slot: SlotBuffer) -> Tensor:
        """Return the device memory that stands for a slot: its own, or as much of the slab."""
        if isinstance(slot, DeviceSlot):
            return slot.tensor
        if self._slab.numel() < slot.nbytes:
            self._slab = torch.empty(slot.nbytes, dtype=torch.uint8, device=self._tensor.device)
        return self._slab[: slot.nbytes]

    def _pinned(self, num_bytes: int) -> NDArray[np.uint8]:
        try:
            slot: NDArray[np.uint8] = self._queue.host_tensor((num_bytes,), torch.uint8).numpy()
        except RuntimeError as error:
            log.warning("a KV slot could not be pinned, copies to the host are slower: %s", error)
            return np.ones(num_bytes, np.uint8)
        return slot


def torch_kernels() -> BlockKernels:
    """Return plain torch's, for any device and slowly: words64 is computed on the host."""

    def words64(payload: Tensor) -> Tensor:
        return torch.tensor([host_checksum(payload.cpu().numpy(), "words64")], dtype=torch.uint64).view(torch.int64)

    return BlockKernels(gather_blocks, scatter_blocks, words64)


def triton_kernels() -> BlockKernels:
    """Return Triton's, for a GPU."""
    from kernels.gpu import blocks
    from kernels.gpu.checksum import checksum as words64

    return BlockKernels(blocks.gather_blocks, blocks.scatter_blocks, words64)


def host_checksum(payload: NDArray[np.uint8], algorithm: str) -> int:
    """Return the checksum of host memory."""
    return checksum(payload) if algorithm == "words64" else HostSlots().checksum(payload, algorithm)
