"""Soak: many short requests, a random fault every few seconds, and what it does to the memory of who lives through it.

1. A closed loop asks from a pool whose oracles are known; every stream is judged by the ledger.
2. Every `FAULT_EVERY_S` a fault of any kind, drawn from the seed: workers killed, both at once, stopped and continued,
   clients that leave.
3. Router, supervisor and the first worker of each role are spared, so that they live through all: their memory,
   descriptors, threads and tasks must not grow (`footprints.py`), nor those of others that live for half of it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tests.faults.campaign import KILL_KINDS, STOP_KINDS, Striker
from tests.faults.footprints import Watch
from tests.faults.ledger import Ledger, Record, Request
from tests.faults.load import ClosedLoop, bound
from tests.faults.phases import Cluster

WIDTH = 4
FAULT_EVERY_S = 5.0
LEASE_TTL_S = 3.0
NUM_LEAVING = 5
KINDS = (*KILL_KINDS, *STOP_KINDS, "disconnects")
SPARED = frozenset({"decode-0", "prefill-0"})
LASTING = ("router", "supervisor", *sorted(SPARED))


@dataclass(slots=True)
class SoakReport:
    """What a soak showed.

    Attributes:
        kinds: faults sent, by kind.
        watch: what the processes took.
    """

    num_requests: int = 0
    num_explicit: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    watch: Watch = field(default_factory=Watch)
    took_s: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def num_sent(self) -> int:
        """Faults of any kind."""
        return sum(self.kinds.values())

    def summary(self) -> str:
        """Say it in a paragraph."""
        kinds = ", ".join(f"{num} {kind}" for kind, num in self.kinds.items())
        return (
            f"soak: {self.num_requests} requests under {self.num_sent} faults ({kinds}), {self.num_explicit} "
            f"ended with one explicit error; wrong: {bound(len(self.faults), self.num_requests)}; memory: "
            f"{self.watch.summary()}; {self.took_s:.0f} s"
        )


class Nemesis:
    """Draws and sends faults until told to stop.

    Attributes:
        kinds: faults sent, by kind.
        faults: what it could not do, in words.
    """

    def __init__(self, cluster: Cluster, loop: ClosedLoop, ledger: Ledger, seed: int) -> None:
        self.kinds: dict[str, int] = {}
        self.faults: list[str] = []
        self._dice = random.Random(f"nemesis {seed}")
        self._striker = Striker(cluster, loop, self._dice, SPARED)
        self._loop = loop
        self._ledger = ledger
        self._pool = loop.pool
        self.is_ending = False

    async def run(self) -> None:
        """Send a fault every few seconds."""
        while not self.is_ending:
            kind = self._dice.choice(KINDS)
            try:
                await (self._leave() if kind == "disconnects" else self._striker.strike(kind))
                self.kinds[kind] = self.kinds.get(kind, 0) + 1
            except TimeoutError:
                if not self.is_ending:
                    self.faults.append(f"nothing to strike for {kind}")
            self._loop.forget_ended(time.monotonic())
            self._striker.hits.clear()
            await asyncio.sleep(self._dice.uniform(0.5, 1.5) * FAULT_EVERY_S)

    async def settle(self) -> None:
        """Wait until every stopped worker was told to go on, and what it held when it was given up has run out."""
        await self._striker.settle()
        await asyncio.sleep(LEASE_TTL_S)

    async def _leave(self) -> None:
        """A few clients come and leave in the middle."""
        tasks = [asyncio.create_task(self._ledger.stream(self._dice.choice(self._pool))) for _ in range(NUM_LEAVING)]
        for task in tasks:
            await asyncio.sleep(self._dice.uniform(0.0, 0.3))
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def run(
    cluster: Cluster,
    ledger: Ledger,
    oracles: Mapping[Request, Sequence[int]],
    seed: int,
    num_requests: int,
    tell: Callable[[str], None],
) -> SoakReport:
    """Ask `num_requests` under random faults, and judge streams, census and memory."""
    begin_s, report = time.monotonic(), SoakReport()
    report.faults += await cluster.aftermath()
    every = max(1, num_requests // 20)

    def note(record: Record) -> None:
        if loop.tally.num_streams % every == 0:
            tell(f"{loop.tally.num_streams} requests, {report.num_sent} faults, {len(loop.tally.faults)} wrong")

    # A kill of everybody may end a stream with one explicit error.
    loop = ClosedLoop(ledger, oracles, random.Random(f"soak {seed}"), width=WIDTH, may_fail=True, on_done=note)
    nemesis = Nemesis(cluster, loop, ledger, seed)
    report.kinds = nemesis.kinds
    striking = asyncio.create_task(nemesis.run())
    sampling = asyncio.create_task(report.watch.run(cluster, lambda: loop.tally.num_streams))
    tally = await loop.run(num_requests)
    nemesis.is_ending = True
    sampling.cancel()
    striking.cancel()
    for ended in await asyncio.gather(sampling, striking, return_exceptions=True):
        if ended is not None and not isinstance(ended, asyncio.CancelledError):
            report.faults.append(f"the soak's own fault: {ended!r}")
    await nemesis.settle()
    report.num_requests, report.num_explicit = tally.num_streams, tally.num_explicit
    report.faults += nemesis.faults + tally.faults + await cluster.aftermath()
    report.watch.weigh(report.num_requests, LASTING)
    report.faults += report.watch.faults
    report.took_s = time.monotonic() - begin_s
    return report
