"""Soak: many short requests, a random fault every few seconds, and what it does to the memory of who lives through it.

1. A closed loop asks from a pool whose oracles are known; every stream is judged by the ledger.
2. Every `FAULT_EVERY_S` a fault of any kind, drawn from the seed: workers killed, both at once, stopped and continued,
   clients that leave.
3. Each process is sampled. Of those that live long (the router and the supervisor must live through all) the slope of
   resident memory per request is estimated by Theil and Sen's median of slopes, with Sen's interval from Kendall's
   statistic; the first part, in which caches fill, is not counted.
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from tests.faults.campaign import KILL_KINDS, STOP_KINDS, Striker
from tests.faults.disconnects import MAX_DESCRIPTOR_GROWTH, Footprint, footprint, process_ids
from tests.faults.ledger import Ledger, Record, Request
from tests.faults.load import ClosedLoop, bound
from tests.faults.phases import Cluster

WIDTH = 4
FAULT_EVERY_S = 5.0
SAMPLE_EVERY_S = 1.0
WARM_SHARE = 0.3
MAX_POINTS = 150
MIN_POINTS = 8
LIFE_SHARE = 0.5
# Over fewer requests growth is told but not judged: caches still fill.
JUDGED_FROM = 2000
NUM_LEAVING = 5
KINDS = (*KILL_KINDS, *STOP_KINDS, "disconnects")
# Processes that a soak kills nobody of.
LASTING = ("router", "supervisor")


@dataclass(frozen=True, slots=True)
class Sample:
    """A process's footprint after so many requests."""

    num_requests: int
    footprint: Footprint


@dataclass(frozen=True, slots=True)
class Slope:
    """Growth of resident memory in bytes per request, with its 95 % interval."""

    median: float
    low: float
    high: float

    @property
    def is_flat(self) -> bool:
        """Whether growth cannot be told from none: the interval does not lie above zero."""
        return self.low <= 0.0


def theil_sen(points: Sequence[tuple[float, float]]) -> Slope:
    """Return the median of all pairs' slopes and Sen's 95 % interval; thinned to `MAX_POINTS` points first."""
    step = max(1, len(points) // MAX_POINTS)
    kept = points[::step]
    slopes = sorted((d - b) / (c - a) for (a, b), (c, d) in combinations(kept, 2) if c != a)
    if len(kept) < 3 or not slopes:
        return Slope(0.0, -math.inf, math.inf)
    half = 1.96 * math.sqrt(len(kept) * (len(kept) - 1) * (2 * len(kept) + 5) / 18)
    low, high = int((len(slopes) - half) / 2), int((len(slopes) + half) / 2) + 1
    return Slope(statistics.median(slopes), slopes[max(0, low)], slopes[min(len(slopes) - 1, high)])


@dataclass(slots=True)
class SoakReport:
    """What a soak showed.

    Attributes:
        kinds: faults sent, by kind.
        samples: of each process that lived, as "name pid".
        slopes: of those that lived long enough.
    """

    num_requests: int = 0
    num_explicit: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    slopes: dict[str, Slope] = field(default_factory=dict)
    took_s: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def num_sent(self) -> int:
        """Faults of any kind."""
        return sum(self.kinds.values())

    def summary(self) -> str:
        """Say it in a paragraph."""
        slopes = []
        for name, slope in self.slopes.items():
            first, last = self.samples[name][0].footprint, self.samples[name][-1].footprint
            slopes.append(
                f"{name} {slope.median:+.0f} bytes/request [{slope.low:+.0f}, {slope.high:+.0f}], "
                f"{last.rss_bytes / 2**20:.0f} MiB, fds {first.num_descriptors} -> {last.num_descriptors}, "
                f"threads {first.num_threads} -> {last.num_threads}"
            )
        kinds = ", ".join(f"{num} {kind}" for kind, num in self.kinds.items())
        return (
            f"soak: {self.num_requests} requests under {self.num_sent} faults ({kinds}), {self.num_explicit} "
            f"ended with one explicit error; wrong: {bound(len(self.faults), self.num_requests)}; memory: "
            f"{'; '.join(slopes)}; {self.took_s:.0f} s"
        )


class _Nemesis:
    """Draws and sends faults until told to stop."""

    def __init__(self, cluster: Cluster, loop: ClosedLoop, ledger: Ledger, seed: int, report: SoakReport) -> None:
        self._dice = random.Random(f"nemesis {seed}")
        self._striker = Striker(cluster, loop, self._dice)
        self._loop = loop
        self._ledger = ledger
        self._pool = loop.pool
        self._report = report
        self.is_ending = False

    async def run(self) -> None:
        """Send a fault every few seconds."""
        while not self.is_ending:
            kind = self._dice.choice(KINDS)
            try:
                await (self._leave() if kind == "disconnects" else self._striker.strike(kind))
                self._report.kinds[kind] = self._report.kinds.get(kind, 0) + 1
            except TimeoutError:
                if not self.is_ending:
                    self._report.faults.append(f"nothing to strike for {kind}")
            self._loop.forget_ended(time.monotonic())
            self._striker.hits.clear()
            await asyncio.sleep(self._dice.uniform(0.5, 1.5) * FAULT_EVERY_S)

    async def settle(self) -> None:
        """Wait until every stopped worker was told to go on."""
        await self._striker.settle()

    async def _leave(self) -> None:
        """A few clients come and leave in the middle."""
        tasks = [asyncio.create_task(self._ledger.stream(self._dice.choice(self._pool))) for _ in range(NUM_LEAVING)]
        for task in tasks:
            await asyncio.sleep(self._dice.uniform(0.0, 0.3))
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _sample(cluster: Cluster, loop: ClosedLoop, report: SoakReport) -> None:
    """Note the footprint of every process, until cancelled."""
    while True:
        for name, pid in (await process_ids(cluster)).items():
            if (found := footprint(pid)) is not None:
                report.samples.setdefault(f"{name} {pid}", []).append(Sample(loop.tally.num_streams, found))
        await asyncio.sleep(SAMPLE_EVERY_S)


def _weigh(report: SoakReport) -> None:
    """Estimate slopes, and say what grew."""
    warm = WARM_SHARE * report.num_requests
    for name in [n for n in report.samples if n.split()[0] in LASTING]:
        if sum(other.split()[0] == name.split()[0] for other in report.samples) > 1:
            report.faults.append(f"{name} did not live through all")
    for name, samples in report.samples.items():
        # A process that was born late warms up late.
        counted = [sample for sample in samples[int(WARM_SHARE * len(samples)) :] if sample.num_requests >= warm]
        lived = counted[-1].num_requests - counted[0].num_requests if counted else 0
        if len(counted) < MIN_POINTS or lived < LIFE_SHARE * (report.num_requests - warm):
            continue
        slope = theil_sen([(s.num_requests, s.footprint.rss_bytes) for s in counted])
        report.slopes[name] = slope
        if not slope.is_flat and lived >= JUDGED_FROM:
            report.faults.append(f"{name} grows by {slope.median:.0f} bytes a request, at least {slope.low:.0f}")
        grown = counted[-1].footprint.num_descriptors - counted[0].footprint.num_descriptors
        if grown > MAX_DESCRIPTOR_GROWTH:
            report.faults.append(f"{name} has {grown} descriptors more than when warm")


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
    nemesis = _Nemesis(cluster, loop, ledger, seed, report)
    striking, sampling = asyncio.create_task(nemesis.run()), asyncio.create_task(_sample(cluster, loop, report))
    tally = await loop.run(num_requests)
    nemesis.is_ending = True
    sampling.cancel()
    striking.cancel()
    for ended in await asyncio.gather(sampling, striking, return_exceptions=True):
        if ended is not None and not isinstance(ended, asyncio.CancelledError):
            report.faults.append(f"the soak's own fault: {ended!r}")
    await nemesis.settle()
    report.num_requests, report.num_explicit = tally.num_streams, tally.num_explicit
    report.faults += tally.faults + await cluster.aftermath()
    _weigh(report)
    report.took_s = time.monotonic() - begin_s
    return report
