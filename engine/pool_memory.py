"""The memory of a KV pool on a CPU, and the thread that backs it ahead of its use.

    made, lazily zeroed ──► populating, block 0 first ──► whole
                                 ├── no more memory can be spared on this machine ──► left as it is
                                 └── the pool is gone, or the process ends ──► ended

A page that is touched first by a step, a transfer or a prompt makes it wait until the page has been zeroed. So a thread
of the lowest priority touches them all, in the order in which a pool gives its blocks out: it takes what the core has
left, and keeps ahead of prompts on a busy one too. Nothing waits for it, start-up neither. A quarter of the memory is
left free for whoever comes next: a pool that is never used may not starve another server, or what else runs here.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kernels.cpu.huge_pages import HUGE_PAGE_BYTES, huge_bytes, populate

log = logging.getLogger(__name__)

# Left free for everybody else on the machine, or in the container: a share of its memory, and at least so much.
KEPT_SHARE = 0.25
LEAST_KEPT_BYTES = 1 << 30
_LOOK_EVERY_BYTES = 64 << 20
# Not SCHED_IDLE: on a core that is never idle such a thread would fall behind the prompts.
_NICENESS = 19


def new_pool_memory(num_bytes: int) -> NDArray[np.uint8]:
    """Return `[num_bytes]` zeroed uint8 on huge pages, which a thread begins to back with memory.

    Keep the array itself, not only views of it: the thread ends by itself soon after the array is gone.
    """
    memory = huge_bytes(num_bytes)
    keep_ahead(memory)
    return memory


def keep_ahead(memory: NDArray[np.uint8], spare_bytes: Callable[[], int] | None = None) -> threading.Thread:
    """Return a started thread that backs `memory`, `[num_bytes]` uint8, page after page.

    Args:
        memory: only a weak reference is kept.
        spare_bytes: how much memory may be taken now; None looks at the machine and its container.
    """
    work = _Populating(weakref.ref(memory), memory.nbytes, spare_bytes or spare_memory)
    work.thread.start()
    return work.thread


class _Populating:
    def __init__(self, memory: weakref.ref[NDArray[np.uint8]], num_bytes: int, spare: Callable[[], int]) -> None:
        self._memory = memory
        self._num_bytes = num_bytes
        self._spare = spare
        self._is_over = False
        self.thread = threading.Thread(target=self._run, name="populate", daemon=True)

    def _run(self) -> None:
        # A thread that is in native code while the interpreter is torn down takes the process with it.
        atexit.register(self._stop)
        try:
            self._populate()
        finally:
            atexit.unregister(self._stop)

    def _stop(self) -> None:
        self._is_over = True
        self.thread.join()

    def _populate(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        for start in range(0, self._num_bytes, HUGE_PAGE_BYTES):
            if self._is_over:
                return
            if start % _LOOK_EVERY_BYTES == 0 and self._spare() < _LOOK_EVERY_BYTES:
                done_mib, all_mib = start >> 20, self._num_bytes >> 20
                log.info("%d of %d MiB of the KV pool are touched ahead of use: memory is short", done_mib, all_mib)
                return
            if not self._back(start):
                return

    def _back(self, start: int) -> bool:
        """Back one huge page; False if there is nothing more to do. Holds the memory no longer than that."""
        memory = self._memory()
        if memory is None:
            return False
        try:
            populate(memory[start : start + HUGE_PAGE_BYTES])
        except OSError as error:
            log.info("the KV pool is touched by its first use: %s", error)
            return False
        return True


def spare_memory(root: Path = Path("/")) -> int:
    """Return the bytes that may be backed ahead of use: of the machine, or of its control group where that is less.

    Args:
        root: where `proc` and `sys` are.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    total, available = (
        next((int(line.split()[1]) << 10 for line in lines if line.startswith(name)), 0)
        for name in ("MemTotal:", "MemAvailable:")
    )
    return min([_spare(total, available), *(room for room in _rooms_in_groups(root) if room is not None)])


def _spare(limit: int, left: int) -> int:
    return max(0, left - max(LEAST_KEPT_BYTES, int(KEPT_SHARE * limit)))


def _rooms_in_groups(root: Path) -> Iterator[int | None]:
    """Yield what each memory control group of this process can spare, of either version; None for one without limit."""
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    cgroups = root / "sys/fs/cgroup"
    for number, controllers, path in groups:
        # Inside a container the path is often the host's, and the group is mounted at the top.
        if number == "0" and not controllers:
            for folder in (cgroups / path.strip("/"), cgroups):
                yield _room(folder, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            for folder in (cgroups / "memory" / path.strip("/"), cgroups / "memory"):
                yield _room(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _room(folder: Path, limit: str, used: str, reclaimable: str) -> int | None:
    """Return what a group can spare: its limit less what it uses and the system could not take back at once."""
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        most = int((folder / limit).read_text())
        return _spare(most, most - int((folder / used).read_text()) + int(stat.get(reclaimable, 0)))
    except (OSError, ValueError):  # no such group, or "max"
        return None
