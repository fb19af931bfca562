"""The ways in which payload can go to a peer over UCX, best first.

    one host:       GPU memory over CUDA IPC ──► host memory over shared memory ──► host memory over TCP
    between hosts:  host memory over TCP
    UCX_TLS set:    GPU memory ──► host memory, both over what the user names

Shared memory is all that the second way has: no port is opened for it. There the receiver fetches what it was told of
(get_zcopy), so nobody writes into its memory but itself. Over TCP payload is sent as rendezvous messages (am), in
segments so large that it costs no more than UCX's remote writes would. put_zcopy is not for endpoints that are made of
an address: they fall back to plain fragments, and a receive that is half filled when the sender dies never ends.

Between hosts GPU memory is not tried unasked: the UCX of ucxx's wheel has no RDMA, and GPU memory over TCP would pass
through UCX's own bounce buffers instead of our pinned slots. With a UCX that has RDMA the user names the transports:
RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY=true UCX_TLS=rc,cuda_copy,cuda_ipc,tcp,self.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Final

from protocol.kv_layout import Staging

TCP_ONLY: Final = {
    "TLS": "tcp,self",
    "RNDV_SCHEME": "am",
    "TCP_TX_SEG_SIZE": "512K",
    "TCP_RX_SEG_SIZE": "512K",
}
SHARED_MEMORY: Final = {"TLS": "posix,cma,self", "RNDV_SCHEME": "get_zcopy"}
CUDA_IPC: Final = {"TLS": "posix,cma,cuda_copy,cuda_ipc,tcp,self", "RNDV_SCHEME": "auto"}
CUDA_OVER_TCP: Final = {"TLS": "cuda_copy,tcp,self", "RNDV_SCHEME": "auto"}


@dataclass(frozen=True, slots=True)
class Way:
    """One way.

    Attributes:
        staging: where our slots may lie on it.
        options: of UCX; empty where the user set UCX_TLS.
    """

    staging: Staging
    options: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The transports, which tell two UCX contexts of one process apart."""
        return self.options.get("TLS", "UCX_TLS")

    def __str__(self) -> str:
        return f"{'host' if self.staging == 'host' else 'GPU'} memory over {self.name}"


def ways_to(host: str, staging: Staging, *, is_users_choice: bool) -> list[Way]:
    """Return the ways to a host, ours or a peer's, for slots that may lie where `staging` says; at least one.

    Args:
        host: name or address.
        staging: "auto" ends with ways in host memory, "device" has none of them.
        is_users_choice: UCX_TLS is set.
    """
    if is_users_choice:
        on_device, on_host = [Way(staging)], [Way("host")]
    elif is_loopback(host):
        on_device, on_host = [Way(staging, CUDA_IPC)], [Way("host", SHARED_MEMORY), Way("host", TCP_ONLY)]
    else:
        on_device = [Way(staging, CUDA_OVER_TCP)] if staging == "device" else []
        on_host = [Way("host", TCP_ONLY)]
    return {"host": on_host, "device": on_device, "auto": on_device + on_host}[staging]


def is_loopback(host: str) -> bool:
    """Tell whether an address is this host's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
