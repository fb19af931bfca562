"""Every socket of a process that others can send to, as the kernel tells it: /proc/PID/net and /proc/PID/fd.

TCP     state LISTEN
UDP     any that is bound and has no peer
unix    listening ones, and datagram sockets with a name, in the file system or abstract (@)
"""

from __future__ import annotations

import socket
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_LISTEN, _UNCONNECTED = "0A", "07"
_ACCEPTS, _DATAGRAM = 0x10000, "0002"
_MAPPED = bytes(10) + b"\xff\xff"  # an IPv4 address in an IPv6 socket
_NAMES = {"nursery", "router", "prefill", "decode", "colocated", "serve"}


@dataclass(frozen=True, slots=True, order=True)
class Socket:
    """One.

    Attributes:
        process: the role that the process has, by its command line.
        kind: tcp, udp or unix.
        where: an IP address, or "abstract" or "file".
        port: 0 for unix sockets.
    """

    process: str
    kind: str
    where: str
    port: int = 0


def listening(root: int) -> Counter[Socket]:
    """Return what a process and its descendants listen on, each socket once for each process that holds it."""
    found: Counter[Socket] = Counter()
    for pid in descendants(root):
        process, own = Path(f"/proc/{pid}"), set[str]()
        try:
            for fd in (process / "fd").iterdir():
                if (target := _target(fd)).startswith("socket:["):
                    own.add(target[8:-1])
            for kind in ("tcp", "tcp6", "udp", "udp6"):
                found.update(_internet(process, kind, own))
            found.update(_unix(process, own))
        except FileNotFoundError:
            continue  # it has ended
    return found


def descendants(root: int) -> list[int]:
    """Return a process and all that it or its children started and that still run."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    family = [root]
    for pid in family:
        family += [child for child, parent in parents.items() if parent == pid]
    return family


def role_of(process: Path) -> str:
    """Return what a process of ours does, from its command line; of a child without one of ours, that it is one."""
    words = (process / "cmdline").read_bytes().replace(b" ", b"\0").decode(errors="replace").split("\0")
    return next((word for word in words if word in _NAMES), "child")


def _target(fd: Path) -> str:
    try:
        return str(fd.readlink())
    except OSError:
        return ""


def _internet(process: Path, kind: str, own: set[str]) -> list[Socket]:
    found, protocol = [], kind.removesuffix("6")
    for line in (process / "net" / kind).read_text().splitlines()[1:]:
        fields = line.split()
        if fields[9] in own and fields[3] == (_LISTEN if protocol == "tcp" else _UNCONNECTED):
            address, port = fields[1].split(":")
            found.append(Socket(role_of(process), protocol, _address(address), int(port, 16)))
    return found


def _address(text: str) -> str:
    """Decode an address of /proc/net: words of 32 bits, each in the machine's order of bytes."""
    raw = b"".join(bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8))
    if raw.startswith(_MAPPED):
        raw = raw.removeprefix(_MAPPED)
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)


def _unix(process: Path, own: set[str]) -> list[Socket]:
    found = []
    for line in (process / "net" / "unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        name = fields[7] if len(fields) > 7 else ""
        is_reachable = int(fields[3], 16) & _ACCEPTS or (fields[4] == _DATAGRAM and name)
        if fields[6] in own and is_reachable:
            found.append(Socket(role_of(process), "unix", "abstract" if name.startswith("@") else "file"))
    return found
