"""The ports that UCX opens by itself, one per worker and device of TCP: who may connect to them, and until when.

    worker made ──► only the peer's address ──► linked and tested: nobody, for good

UCX takes every connection and acts on what comes over it. It cannot be told to close the port, but the kernel can be
told to drop what arrives there: a filter on the listening socket sees each packet of a connection that is being made.
Connections that exist are not touched by it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import socket
import stat
import struct
from typing import Final

log = logging.getLogger(__name__)

_SO_ATTACH_FILTER: Final = 26
# Classic BPF: load the word at 12 of the network header, the source address; all of the packet if it is this one,
# else nothing of it.
_LOAD_SOURCE: Final = (0x20, 0, 0, 0xFFF00000 + 12)
_JUMP_UNLESS: Final = 0x15
_TAKE: Final = (0x06, 0, 0, 0xFFFFFFFF)
_DROP: Final = (0x06, 0, 0, 0)


def descriptors() -> set[int]:
    """Return the numbers of this process's open file descriptors."""
    return {fd for fd in map(int, os.listdir("/proc/self/fd")) if _is_open(fd)}  # less the one that listed them


class Ports:
    """The listening sockets among descriptors that UCX has just opened. Until `admit` nobody is kept away."""

    def __init__(self, opened: set[int]) -> None:
        self._names = {fd: name for fd in opened if (name := _listens_on(fd)) is not None}

    def admit(self, address: str) -> None:
        """Let nobody but this IPv4 address connect."""
        self._filter((_LOAD_SOURCE, (_JUMP_UNLESS, 0, 1, struct.unpack("!I", socket.inet_aton(address))[0])))

    def shut(self) -> None:
        """Let nobody connect any more."""
        self._filter(())

    def _filter(self, conditions: tuple[tuple[int, int, int, int], ...]) -> None:
        program = [*conditions, *([_TAKE] if conditions else []), _DROP]
        code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
        value = struct.pack("HL", len(program), ctypes.addressof(code))
        for fd, name in self._names.items():
            if _listens_on(fd) != name:
                continue  # UCX gave it up, and the number is another's
            with socket.socket(fileno=os.dup(fd)) as port:
                try:
                    port.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, value)
                except OSError as error:
                    log.warning("UCX's port on %s:%d stays open to everybody who reaches it: %s", *name, error)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _listens_on(fd: int) -> tuple[str, int] | None:
    """Return a listening socket's address and port; None for everything else."""
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return None
        with socket.socket(fileno=os.dup(fd)) as found:
            if found.family != socket.AF_INET or not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return None
            host, port = found.getsockname()
            return str(host), int(port)
    except OSError:
        return None
