"""Which of this host's network devices UCX may use, and so where its ports are.

    127.x.y.z ──────────► lo, which nobody else reaches
    another address ────► the device named, or the one whose address it is ──► none, several, or unknown: refused
    a public address ───► refused, unless the operator says that it is meant

UCX itself would take every device there is. Its wire asks nobody who he is, so each port it has is a port less for
everybody else's packets to be kept away from; see SECURITY.md.
"""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import socket
import struct
from dataclasses import dataclass

from protocol.errors import ConfigError

LOOPBACK = "lo"
_SIOCGIFADDR = 0x8915


@dataclass(frozen=True, slots=True)
class Device:
    """One network device.

    Attributes:
        name: as UCX knows it.
        address: IPv4 address that UCX listens on there and that its connections come from.
    """

    name: str
    address: str


def device_of(own_address: str, named: str | None, *, allow_public: bool, is_users_choice: bool) -> Device:
    """Return the device that payload to or from one of our own addresses goes through.

    Args:
        own_address: IPv4 address of this host.
        named: device that the operator wants; None for the one that has the address.
        allow_public: a public address is meant.
        is_users_choice: UCX_TLS is set; `named` may be one that only UCX knows, as mlx5_0:1.

    Raises:
        ConfigError: it is none, or not one, or may not be listened on.
    """
    known = addresses()
    if named is not None:
        if "," in named or named == "all":
            raise ConfigError(f"transfer-device: names one network device, not {named!r}")
        if named not in known and not is_users_choice:
            there = ", ".join(f"{name} ({address})" for name, address in known.items())
            raise ConfigError(f"transfer-device: no device {named!r} with an IPv4 address here; there are {there}")
        found = Device(named, known.get(named, own_address))
    elif ipaddress.ip_address(own_address).is_loopback:
        found = Device(LOOPBACK, own_address)
    else:
        names = [name for name, address in known.items() if address == own_address]
        if len(names) != 1:
            whose = f"devices {', '.join(names)} have" if names else "no network device has"
            raise ConfigError(f"{whose} {own_address} as first address: name one with transfer-device")
        found = Device(names[0], own_address)
    require_private(found.address, allow_public=allow_public)
    return found


def require_private(address: str, *, allow_public: bool) -> None:
    """Refuse an address that anybody can send to.

    Raises:
        ConfigError: it is public and nobody said that this is meant, or it is every address.
    """
    ip = ipaddress.ip_address(address)
    if ip.is_unspecified:
        raise ConfigError(f"transfer-host: must be one address, that decode workers can dial, not {address}")
    if ip.is_global and not allow_public:
        raise ConfigError(
            f"{address} is a public address, and who reaches UCX's ports there owns the worker (SECURITY.md): "
            "give transfer-host or transfer-device of a private network, or say allow-public-transfer"
        )


def addresses() -> dict[str, str]:
    """Return the first IPv4 address of each network device that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def address_towards(peer_address: str) -> str:
    """Return our own address, as a peer sees it. Nothing is sent.

    Raises:
        OSError: there is no way to it.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unsent:
        unsent.connect((peer_address, 9))
        return str(unsent.getsockname()[0])


async def resolve(host: str) -> list[str]:
    """Return the IPv4 addresses of a name or address; UCX's devices are looked for by no other kind.

    Raises:
        OSError: it has none.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, None, family=socket.AF_INET, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))
