"""Rolling restarts: every worker is asked to end, in turn and again and again, while requests go on.

1. A closed loop asks from a pool whose oracles are known.
2. Meanwhile SIGTERM goes to one worker after the other; the next follows when its successor has registered.
3. Nothing may be seen of it: no error, no differing token; at the end nothing is leased.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tests.faults.ledger import Ledger, Record, Request
from tests.faults.load import ClosedLoop, bound, percentile
from tests.faults.phases import Cluster

WIDTH = 6
SUCCESSOR_BUDGET_S = 90.0


@dataclass(slots=True)
class RollingReport:
    """What rolling restarts showed.

    Attributes:
        num_restarts: workers ended and succeeded; `successions_s` are from SIGTERM to the successor's registration.
        gaps_s: the longest wait between two tokens of each stream.
    """

    num_requests: int = 0
    num_restarts: int = 0
    successions_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    took_s: float = 0.0
    faults: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Say it in a paragraph."""
        took, gaps = self.successions_s, self.gaps_s
        return (
            f"rolling: {self.num_restarts} workers ended in turn under {self.num_requests} requests; wrong: "
            f"{bound(len(self.faults), self.num_requests)}; SIGTERM to successor median {percentile(took, 0.5):.1f} s, "
            f"longest {max(took, default=0):.1f} s; longest gap of a stream p50 {percentile(gaps, 0.5):.2f} s, "
            f"p99 {percentile(gaps, 0.99):.2f} s; {self.took_s:.0f} s"
        )


class _Roller:
    def __init__(self, cluster: Cluster, report: RollingReport, tell: Callable[[str], None]) -> None:
        self._cluster = cluster
        self._report = report
        self._tell = tell

    async def run(self) -> None:
        """End one worker after the other until cancelled."""
        while True:
            names = sorted(worker["worker_id"] for worker in await self._cluster.workers())
            for name in names:
                await self._succeed(name)

    async def _succeed(self, worker_id: str) -> None:
        begin_s = time.monotonic()
        old = next((w for w in await self._cluster.workers() if w["worker_id"] == worker_id), None)
        if old is None:
            self._report.faults.append(f"{worker_id} went by itself")
            return
        os.kill(old["pid"], signal.SIGTERM)
        while not any(
            w["worker_id"] == worker_id and w["instance"] != old["instance"] for w in await self._cluster.workers()
        ):
            if time.monotonic() - begin_s > SUCCESSOR_BUDGET_S:
                self._report.faults.append(f"{worker_id} has no successor within {SUCCESSOR_BUDGET_S} s")
                return
            await asyncio.sleep(0.05)
        self._report.num_restarts += 1
        self._report.successions_s.append(time.monotonic() - begin_s)
        self._tell(f"{worker_id}: succeeded after {time.monotonic() - begin_s:.1f} s")


async def run(
    cluster: Cluster,
    ledger: Ledger,
    oracles: Mapping[Request, Sequence[int]],
    seed: int,
    num_requests: int,
    tell: Callable[[str], None],
) -> RollingReport:
    """Ask `num_requests` while workers are replaced in turn."""
    begin_s, report = time.monotonic(), RollingReport()
    report.faults += await cluster.aftermath()

    def note(record: Record) -> None:
        report.gaps_s.append(record.longest_gap_s)

    loop = ClosedLoop(ledger, oracles, random.Random(f"rolling {seed}"), width=WIDTH, on_done=note)
    rolling = asyncio.create_task(_Roller(cluster, report, tell).run())
    tally = await loop.run(num_requests)
    rolling.cancel()
    ended = (await asyncio.gather(rolling, return_exceptions=True))[0]
    if not isinstance(ended, asyncio.CancelledError):
        report.faults.append(f"the restarts stopped: {ended!r}")
    report.num_requests = tally.num_streams
    report.faults += tally.faults + await cluster.aftermath()
    report.took_s = time.monotonic() - begin_s
    return report
