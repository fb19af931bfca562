"""A number that one process writes and others read while a benchmark of the router runs: tokens that have arrived.

A file of eight bytes that all of them map. It costs the reader nothing and the writer no system call, so that looking
at it does not move what is measured.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Final, Self

_U64: Final = struct.Struct("=Q")


class Counter:
    """A shared number; one process writes it. Aligned, so that a reader never sees half of a write."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _U64.size)

    @classmethod
    def create(cls, path: Path) -> Self:
        """Make the file, holding zero, and open it."""
        path.write_bytes(_U64.pack(0))
        return cls(path)

    @property
    def value(self) -> int:
        """What was written last."""
        found: int = _U64.unpack_from(self._memory)[0]
        return found

    def add(self, amount: int) -> None:
        """Add to it."""
        _U64.pack_into(self._memory, 0, self.value + amount)

    def close(self) -> None:
        """Let the memory go; the file is the caller's."""
        self._memory.close()
