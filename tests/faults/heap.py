"""Where a router's memory grows: snapshots of its heap while a campaign runs, and their differences by line.

    written_to(folder) ── with MUTATION, the router of a server started inside traces its heap
    Heap.look ── SIGUSR1 ──► the router writes N.heap ──► `report`: growth between the first look and each later one

What is traced is what Python allocates. Memory of native code (the tokenizer's cache of words) is not in it; `Watch`
sees that as well, beside the memory of the tracing itself.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MUTATION = "heap-profile"
LOOK_BUDGET_S = 60.0
NUM_LINES = 12
MIN_BYTES = 512
NUM_FRAMES = 4
_FOLDER = "BATON_TEST_HEAP"


@contextmanager
def written_to(folder: Path | None) -> Iterator[None]:
    """Let routers that are started inside, with the mutation, write their snapshots into a folder."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[_FOLDER] = str(folder.resolve())
    try:
        yield
    finally:
        os.environ.pop(_FOLDER, None)


class Heap:
    """The heap of one router, looked at now and then.

    Args:
        folder: where it writes its snapshots.
        pid: of the router.
    """

    def __init__(self, folder: Path, pid: int) -> None:
        self._folder = folder
        self._pid = pid
        self._looks: list[tuple[int, Path]] = []

    async def look(self, num_requests: int) -> None:
        """Let it write what it holds after so many requests.

        Raises:
            TimeoutError: it did not.
        """
        path = self._folder / f"{len(self._looks)}.heap"
        path.unlink(missing_ok=True)
        os.kill(self._pid, signal.SIGUSR1)
        deadline_s = time.monotonic() + LOOK_BUDGET_S
        while not path.exists():  # noqa: ASYNC110  (another process makes it)
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the router wrote no snapshot within {LOOK_BUDGET_S:g} s")
            await asyncio.sleep(0.1)
        self._looks.append((num_requests, path))

    def report(self) -> str:
        """Say what grew between the first look and each later one, and by which lines at the end."""
        (begin, first), *later = self._looks
        before = tracemalloc.Snapshot.load(str(first))
        lines = [f"heap of the router after {begin} requests: {_size(before)} bytes"]
        for num_requests, path in later:
            after = tracemalloc.Snapshot.load(str(path))
            lines.append(f"after {num_requests}: {_size(after) - _size(before):+} bytes")
        return "\n".join([*lines, *grown_lines(before, after)])


def grown_lines(before: tracemalloc.Snapshot, after: tracemalloc.Snapshot) -> list[str]:
    """Return a line for each place that holds more than before, the largest first."""
    grown = [d for d in after.compare_to(before, "traceback") if d.size_diff >= MIN_BYTES]
    grown.sort(key=lambda d: -d.size_diff)
    return [f"{d.size_diff:+} bytes in {d.count_diff:+} pieces: {_place(d.traceback)}" for d in grown[:NUM_LINES]]


def _place(traceback: tracemalloc.Traceback) -> str:
    frames = [f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}" for frame in traceback]
    return " < ".join(frames[::-1][:NUM_FRAMES])


def _size(snapshot: tracemalloc.Snapshot) -> int:
    return sum(trace.size for trace in snapshot.traces)
