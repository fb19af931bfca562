"""What processes take, sampled while they serve, and whether it grows.

1. `Watch.run` notes memory, shared segments, descriptors, threads and asyncio tasks of every process once a second,
   beside the number of requests so far.
2. Memory: what is left of a process's life is cut into `NUM_WINDOWS` windows, each of which gives a growth per request.
   Their median is the slope, with the interval that the binomial distribution gives for a median. It grows if the
   whole interval lies above zero: a leak grows in most windows, while a new peak that the allocator keeps is one step.
   Steps must not add up to more than `MAX_STEPS_BYTES` either.
3. It is the anonymous memory of the process. What it shares is told beside it: UCX makes a segment of 4 MiB for each
   worker and touches its pages one after the other, at two messages a second for hours; so segments are counted like
   descriptors.
4. Counts: the median of the last quarter of the samples against that of the first.
5. The first part of a process's life, in which caches fill, is not counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from tests.faults.phases import Cluster

SAMPLE_EVERY_S = 1.0
WARM_SHARE = 0.3
NUM_WINDOWS = 20
MIN_WINDOWS = 6
MIN_POINTS = 8
MAX_STEPS_BYTES = 4 << 20
LIFE_SHARE = 0.5
# Over fewer requests growth of memory is told but not judged: caches still fill.
JUDGED_FROM = 2000
MAX_GROWTH = {"num_descriptors": 8, "num_threads": 2, "num_tasks": 8, "num_segments": 2}
_WORDS = {
    "num_descriptors": "descriptors",
    "num_threads": "threads",
    "num_tasks": "tasks",
    "num_segments": "shared segments",
}


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a process takes.

    Attributes:
        own_bytes: resident and anonymous.
        shared_bytes: resident, of memory that it shares with others; files are not among it.
        num_segments: of shared memory, that it maps.
        num_tasks: None where its census does not tell.
    """

    own_bytes: int
    shared_bytes: int
    num_descriptors: int
    num_threads: int
    num_segments: int
    num_tasks: int | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """A process's footprint after so many requests."""

    num_requests: int
    footprint: Footprint


@dataclass(frozen=True, slots=True)
class Slope:
    """Growth of memory in bytes per request, with its 95 % interval."""

    median: float
    low: float
    high: float

    @property
    def is_flat(self) -> bool:
        """Whether growth cannot be told from none: the interval does not lie above zero."""
        return self.low <= 0.0


def slope_of(points: Sequence[tuple[int, int]]) -> Slope:
    """Return the median growth per request over `NUM_WINDOWS` windows, with its 95 % interval.

    Args:
        points: requests so far, bytes.
    """
    edges = [points[i * (len(points) - 1) // NUM_WINDOWS] for i in range(NUM_WINDOWS + 1)] if points else []
    slopes = sorted((d - b) / (c - a) for (a, b), (c, d) in pairwise(edges) if c > a)
    if len(slopes) < MIN_WINDOWS:
        return Slope(0.0, -math.inf, math.inf)
    # Of so many fair coins, at most `rank` show heads in less than 2.5 % of all throws.
    rank, chance = 0, 0.5 ** len(slopes)
    while chance + math.comb(len(slopes), rank + 1) * 0.5 ** len(slopes) < 0.025:
        rank += 1
        chance += math.comb(len(slopes), rank) * 0.5 ** len(slopes)
    return Slope(statistics.median(slopes), slopes[rank], slopes[-1 - rank])


def grown(values: Sequence[int]) -> int:
    """Return by how much the median of the last quarter exceeds that of the first."""
    quarter = max(1, len(values) // 4)
    return int(statistics.median(values[-quarter:]) - statistics.median(values[:quarter]))


def footprint(pid: int, num_tasks: int | None = None) -> Footprint | None:
    """Return what a process takes now, or None if it is gone."""
    try:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        num_descriptors = len(os.listdir(f"/proc/{pid}/fd"))
        num_segments = Path(f"/proc/{pid}/maps").read_text().count(" /dev/shm/")
    except OSError:
        return None
    if "RssAnon" not in fields:
        return None
    own, shared = (int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem"))
    return Footprint(own, shared, num_descriptors, int(fields["Threads"]), num_segments, num_tasks)


async def process_ids(cluster: Cluster) -> dict[str, int]:
    """Return the pids of a whole cluster by name: the supervisor, the router and every worker."""
    found = {str(worker["worker_id"]): int(worker["pid"]) for worker in await cluster.workers()}
    found["supervisor"] = cluster.server.process.pid
    # A process may vanish while /proc is read.
    with contextlib.suppress(OSError):
        found.update((role, pid) for role, pid in cluster.server.children().items() if role == "router")
    return found


@dataclass(slots=True)
class Watch:
    """Samples of every process, and what they show.

    Attributes:
        samples: of each process that lived, as "name pid".
        slopes, steps: of those that lived long enough: growth per request, and bytes more at the end than when warm.
        faults: what grew, in words.
        max_steps_bytes: what steps may add up to.
        counts_from: over fewer requests descriptors and the like are not judged.
    """

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    slopes: dict[str, Slope] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    max_steps_bytes: int = MAX_STEPS_BYTES
    counts_from: int = 0

    async def run(self, cluster: Cluster, num_requests: Callable[[], int]) -> None:
        """Note every process's footprint once a second, until cancelled."""
        while True:
            num_tasks = await cluster.num_tasks()
            for name, pid in (await process_ids(cluster)).items():
                if (found := footprint(pid, num_tasks.get(name))) is not None:
                    self.samples.setdefault(f"{name} {pid}", []).append(Sample(num_requests(), found))
            await asyncio.sleep(SAMPLE_EVERY_S)

    def weigh(self, num_requests: int, lasting: Sequence[str], warm_share: float = WARM_SHARE) -> None:
        """Estimate slopes, and say what grew, and who of those that nobody killed did not live through all."""
        for name in lasting:
            lives = [key for key in self.samples if key.split()[0] == name]
            if len(lives) != 1:
                self.faults.append(f"{name} did not live through all: {lives or 'never seen'}")
        for name, samples in self.samples.items():
            # A process that was born late warms up late.
            counted = [
                s for s in samples[int(warm_share * len(samples)) :] if s.num_requests >= warm_share * num_requests
            ]
            lived = counted[-1].num_requests - counted[0].num_requests if counted else 0
            if len(counted) >= MIN_POINTS and lived >= LIFE_SHARE * (1.0 - warm_share) * num_requests:
                self._judge(name, counted, lived)

    def _judge(self, name: str, counted: Sequence[Sample], lived: int) -> None:
        slope = self.slopes[name] = slope_of([(s.num_requests, s.footprint.own_bytes) for s in counted])
        steps = self.steps[name] = grown([s.footprint.own_bytes for s in counted])
        if lived >= JUDGED_FROM and not slope.is_flat:
            self.faults.append(f"{name} grows by {slope.median:.0f} bytes a request, at least {slope.low:.0f}")
        elif lived >= JUDGED_FROM and steps > self.max_steps_bytes:
            self.faults.append(f"{name} has {steps / 2**20:.1f} MiB more than when warm")
        for what, most in MAX_GROWTH.items():
            values = [value for s in counted if (value := getattr(s.footprint, what)) is not None]
            if values and lived >= self.counts_from and grown(values) > most:
                self.faults.append(f"{name} has {grown(values)} {_WORDS[what]} more than when warm")

    def summary(self) -> str:
        """Say of each process that was judged what it takes."""
        return "; ".join(self._line(name, slope) for name, slope in self.slopes.items()) or "nobody lived long enough"

    def _line(self, name: str, slope: Slope) -> str:
        first, last = self.samples[name][0].footprint, self.samples[name][-1].footprint
        counts = ", ".join(
            f"{words} {getattr(first, what)} -> {getattr(last, what)}"
            for what, words in _WORDS.items()
            if getattr(last, what) is not None
        )
        return (
            f"{name} {slope.median:+.0f} bytes/request [{slope.low:+.0f}, {slope.high:+.0f}], "
            f"{self.steps[name] / 1024:+.0f} KiB in all, "
            f"{last.own_bytes / 2**20:.0f} MiB and {last.shared_bytes / 2**20:.1f} shared, {counts}"
        )
