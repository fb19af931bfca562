"""Work on the event loop that is too long for one go: it is done in slices, one at a time, and streams go on between.

    run, each ─► takes its turn ─► works for SLICE_S ─► lets the loop run ─┐
                     ▲                                                     │
                     └───────────────────── more is left ◄─────────────────┘

A thread would not do: it shares the interpreter with the loop, and whoever waits for that waits longer than a slice.
However many answers are shaped at once, the loop is held by one slice between two of its rounds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import Final, TypeVar

# About what a step of 64 streams takes here.
SLICE_S: Final = 0.001

Part = TypeVar("Part")


class Slices:
    """The turns of one event loop."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self.num_slices = 0

    async def each(self, steps: Iterable[Part]) -> AsyncIterator[list[Part]]:
        """Give what the steps yield, a slice at a time; none is empty. Cancel-safe.

        Args:
            steps: does its work as it is asked for more; no step takes longer than a slice.
        """
        left = iter(steps)
        is_over = False
        while not is_over:
            found: list[Part] = []
            async with self._turn:
                self.num_slices += 1
                end_s = time.perf_counter() + SLICE_S
                is_over = True
                for part in left:
                    found.append(part)
                    if time.perf_counter() > end_s:
                        is_over = False
                        break
                if not is_over:
                    # Within the turn: nobody else's slice comes before the loop has run.
                    await asyncio.sleep(0)
            if found:
                yield found

    async def run(self, steps: Iterable[Part]) -> list[Part]:
        """Return everything that the steps yield; as `each`."""
        found: list[Part] = []
        async for parts in self.each(steps):
            found += parts
        return found
