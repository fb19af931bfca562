"""Large pieces of zeroed memory on huge pages, and backing them with memory ahead of their first use.

The system gives such memory lazily: whoever touches a page first waits until it has been zeroed, 0.5 to 2.5 ms for a
huge page on a virtual machine. `populate` pays that elsewhere, and earlier.
"""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
from numpy.typing import NDArray

HUGE_PAGE_BYTES = 2 << 20
# Of Linux 5.14 and later; Python's mmap does not name it yet.
_MADV_POPULATE_WRITE = 23

_LIBC = ctypes.CDLL(None, use_errno=True)


def huge_bytes(num_bytes: int) -> NDArray[np.uint8]:
    """Return `[num_bytes]` zeroed uint8 that begin on a huge page; none is touched. Freed with its last view."""
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    view = np.frombuffer(memory, np.uint8)
    start = -view.ctypes.data % HUGE_PAGE_BYTES
    return view[start : start + num_bytes]


def populate(memory: NDArray[np.uint8]) -> None:
    """Back a contiguous array with memory, changing no byte of it: others may read and write it meanwhile.

    Does not hold Python's lock while the system works.

    Raises:
        OSError: the system has no such call, or no memory.
    """
    start = memory.ctypes.data & -mmap.PAGESIZE
    num_bytes = memory.ctypes.data + memory.nbytes - start
    if _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(num_bytes), _MADV_POPULATE_WRITE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, "memory cannot be backed ahead of use")
