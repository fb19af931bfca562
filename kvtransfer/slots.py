"""Staging memory that payload is sent from and received into.

    SlotStore ── pool("host") ──► Slots       what every connection can use
              └─ pool("cuda") ──► Slots       made only where the region has device memory

The region makes the buffers and nobody here looks into them.
"""

from __future__ import annotations

import logging

from kvtransfer.config import DEVICE_SLOT_BYTES, HOST_SLOT_BYTES, TransferConfig
from kvtransfer.pieces import require_slot_holds_layer
from protocol.errors import ConfigError, TransferError
from protocol.kv_layout import SlotBuffer, SlotKind, SlotMemory, Staging

log = logging.getLogger(__name__)


class Slots:
    """A fixed set of equal buffers in one kind of memory.

    A slot is given back by the completion of the transfer that used it, never by a cancelled waiter. Having none free
    is the backpressure: whoever needs one goes on when one returns.
    """

    def __init__(self, memory: SlotMemory, kind: SlotKind, slot_bytes: int, num_slots: int = 0) -> None:
        self.slot_bytes = slot_bytes
        self.num_total = 0
        self._memory = memory
        self._kind = kind
        self._free: list[SlotBuffer] = []
        self.resize(num_slots)

    @property
    def num_free(self) -> int:
        """Slots nobody uses."""
        return len(self._free)

    def take(self) -> SlotBuffer | None:
        """Return a free slot, the most recently used first (warm in cache), or None."""
        return self._free.pop() if self._free else None

    def borrow(self, num_slots: int) -> list[SlotBuffer]:
        """Return this many slots, free ones where there are any and new ones for the rest."""
        if (num_missing := num_slots - self.num_free) > 0:
            self.resize(self.num_total + num_missing)
        return [self._free.pop() for _ in range(num_slots)]

    def give(self, slot: SlotBuffer) -> None:
        """Take a slot back."""
        assert slot.nbytes == self.slot_bytes and self.num_free < self.num_total
        self._free.append(slot)

    def resize(self, num_slots: int) -> None:
        """Grow to `num_slots`, or shrink towards it by dropping free slots; used ones stay until a later call."""
        if (num_missing := num_slots - self.num_total) > 0:
            # In one call: what lies in one piece of device memory needs to be mapped by a peer only once.
            self._free += self._memory.new_slots(num_missing, self.slot_bytes, self._kind)
            self.num_total = num_slots
        while self.num_total > num_slots and self._free:
            self._free.pop()
            self.num_total -= 1


class SlotStore:
    """The slots of one side of transfers, by the memory they lie in.

    At least the device slots of one self-test are made at once: whether there are any is known from the start, and the
    calling thread has a CUDA context before UCX is asked to take device memory, as UCX needs it.

    Args:
        memory: makes them.
        config: their size, and whether device memory may be used, must be used, or not.
        num_slots: slots of the preferred kind to begin with.
        layer_bytes: of one layer of one block, the smallest piece.

    Raises:
        ConfigError: device memory must be used and cannot be had, or the smallest piece does not fit a slot.
    """

    def __init__(self, memory: SlotMemory, config: TransferConfig, num_slots: int = 0, layer_bytes: int = 0) -> None:
        if config.kv_staging == "device" and memory.slot_kind == "host":
            raise ConfigError("kv_staging: device was asked for, but the KV blocks are in host memory")
        self.memory = memory
        default_bytes = HOST_SLOT_BYTES if memory.slot_kind == "host" else DEVICE_SLOT_BYTES
        self.slot_bytes = config.slot_bytes or max(default_bytes, layer_bytes)
        require_slot_holds_layer(self.slot_bytes, layer_bytes)
        self.staging: Staging = config.kv_staging if memory.slot_kind != "host" else "host"
        self._pools: dict[SlotKind, Slots] = {}
        try:
            self.pool(self.preferred_kind).resize(num_slots if self.staging == "host" else max(2, num_slots))
        except TransferError as error:
            if self.staging == "device":
                raise ConfigError(f"kv_staging: no slots in device memory: {error}") from error
            log.warning("KV slots stay in host memory: %s", error)
            self.staging = "host"
            self.pool("host").resize(num_slots)

    @property
    def counts(self) -> tuple[int, int]:
        """Free and total slots of every kind."""
        pools = self._pools.values()
        return sum(pool.num_free for pool in pools), sum(pool.num_total for pool in pools)

    @property
    def preferred_kind(self) -> SlotKind:
        """The memory that slots lie in where a connection allows it."""
        return "host" if self.staging == "host" else self.memory.slot_kind

    def pool(self, kind: SlotKind) -> Slots:
        """Return the slots of one kind; none of them are made before they are needed."""
        if kind not in self._pools:
            self._pools[kind] = Slots(self.memory, kind, self.slot_bytes)
        return self._pools[kind]
