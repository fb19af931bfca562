"""Configuration of block transfers."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Final

from kvtransfer.devices import require_private
from protocol.errors import ConfigError
from protocol.kv_layout import Staging

DEVICE_SLOT_BYTES: Final = 4 << 20
# On a CPU whoever takes in a piece takes it out of a step's time: some 0.7 ms for so much, 3 ms for four times that.
HOST_SLOT_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class TransferConfig:
    """How KV blocks travel.

    Attributes:
        transport: "ucx" between processes, "inproc" inside one.
        host: address that a prefill worker's peer port binds to and that decode workers dial.
        device: network device that payload between hosts goes through; None is the one that the address is of.
        allow_public: a public address is meant, and what SECURITY.md says of it is known.
        kv_staging: where slots lie. "auto" is GPU memory if both ends have it and it passes the self-test, else host
            memory; "device" insists on GPU memory; "host" never uses it.
        slot_bytes: size of one staging slot, the largest piece; pages are touched once at start. None is
            DEVICE_SLOT_BYTES where the blocks are a GPU's, else HOST_SLOT_BYTES, or one layer of a block if that is
            more.
        num_slots: receive slots per connection (decode) and send slots per worker (prefill).
        connect_s: budget for connecting and self-testing one peer.
        progress_s: a transfer whose piece makes no progress for this long is broken.
        grant_wait_s: how long a GRANT waits for a PREFILL that has not come, and a finished prompt for its GRANT.
        tombstone_s: how long an ended transfer is remembered to refuse late messages.
    """

    transport: str = "ucx"
    host: str = "127.0.0.1"
    device: str | None = None
    allow_public: bool = False
    kv_staging: Staging = "auto"
    slot_bytes: int | None = None
    num_slots: int = 8
    connect_s: float = 5.0
    progress_s: float = 5.0
    grant_wait_s: float = 30.0
    tombstone_s: float = 60.0

    def __post_init__(self) -> None:
        if self.transport not in ("ucx", "inproc"):
            raise ConfigError(f"transport must be ucx or inproc, got {self.transport!r}")
        if self.kv_staging not in ("auto", "device", "host"):
            raise ConfigError(f"kv_staging must be auto, device or host, got {self.kv_staging!r}")
        if _is_address(self.host):
            require_private(self.host, allow_public=self.allow_public)
        if (self.slot_bytes is not None and self.slot_bytes < 4096) or self.num_slots < 2:
            raise ConfigError("slot_bytes must be at least 4096 and num_slots at least 2")
        for name in ("connect_s", "progress_s", "grant_wait_s", "tombstone_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
