"""Timing cases side by side.

1. Start: each case builds what it needs and is called once, untimed.
2. Round: ceilings, then every case once, each beside its torch counterpart; a sample repeats the call until the clock
   can tell.
3. Rounds go on until there are enough of them, or until the next one would not end in time.
4. Medians and ranges over rounds; each time is divided by the floor of its own round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from bench.kernels.ceilings import Ceilings, event_s, median_of
from bench.kernels.shape import Work
from bench.spreads import Spread, spread

Call = Callable[[], object]
_MOST_CALLS: Final = 4096


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel under one load.

    Attributes:
        group: the heading it stands under.
        work: the least that one call has to do.
        start: builds inputs and returns the call; calls after each other work on different memory where that matters.
        plain: the name of the torch case that does the same, or None.
    """

    group: str
    name: str
    work: Work
    start: Callable[[], Call]
    plain: str | None = None

    @property
    def title(self) -> str:
        """Group and name, what --only looks at."""
        return f"{self.group}: {self.name}"


@dataclass(frozen=True, slots=True)
class Sample:
    """One call's time: on the device's own clock (thread CPU time, CUDA events), and on the wall."""

    busy_s: float
    wall_s: float


class Stopwatch(Protocol):
    """Times calls on one kind of device."""

    def sample(self, call: Call, count: int) -> Sample:
        """Return the mean time of `count` calls."""


class ThreadStopwatch:
    """CPU time of this thread beside wall time: the two part where the core was taken away."""

    def sample(self, call: Call, count: int) -> Sample:
        """Return the mean time of `count` calls."""
        busy_s, wall_s = time.thread_time(), time.perf_counter()
        for _ in range(count):
            call()
        return Sample((time.thread_time() - busy_s) / count, (time.perf_counter() - wall_s) / count)


class CudaStopwatch:
    """Time between two events around the calls, beside wall time to the end of the last; synchronises."""

    def sample(self, call: Call, count: int) -> Sample:
        """Return the mean time of `count` calls."""
        wall_s = time.perf_counter()
        busy_s = event_s(call, count)
        return Sample(busy_s, (time.perf_counter() - wall_s) / count)


@dataclass(frozen=True, slots=True)
class Timing:
    """What became of one case.

    Attributes:
        busy_s: on the device's clock.
        floor_s, bound: the median floor, and the ceiling that sets it.
        over_floor: time over the floor of the same round; 1 is as fast as memory or arithmetic allow.
        plain_s: torch's time, on the device's clock.
        plain_over: torch's time over this one, in the same round.
    """

    group: str
    name: str
    work: Work
    busy_s: Spread
    wall_s: Spread
    floor_s: float
    bound: str
    over_floor: Spread
    plain_s: Spread | None
    plain_over: Spread | None


@dataclass(frozen=True, slots=True)
class Plan:
    """How long to measure.

    Attributes:
        rounds: at most so many.
        budget_s: no further round begins that would, at the pace of the last one, end later than this after the start.
        sample_s: a sample repeats short calls for about so long.
    """

    rounds: int = 7
    budget_s: float = 240.0
    sample_s: float = 5e-3


class Bench:
    """Cases made ready, with the torch cases they are compared with.

    Args:
        cases: measured in this order.
        plain: torch cases by name, of which only those that `cases` name are built.
        tell: gets a line of progress.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        plain: Mapping[str, Case],
        stopwatch: Stopwatch,
        plan: Plan,
        tell: Callable[[str], None],
    ) -> None:
        self._begin_s = time.perf_counter()
        self._cases, self._stopwatch, self._plan, self._tell = tuple(cases), stopwatch, plan, tell
        self._calls: list[tuple[Call, int]] = []
        self._plain_calls: dict[str, tuple[Call, int]] = {}
        self._samples: list[list[Sample]] = [[] for _ in cases]
        self._plain_samples: dict[str, list[Sample]] = {}
        for number, case in enumerate(cases):
            tell(f"building {number + 1} of {len(cases)}: {case.title}")
            self._calls.append(self._warm(case))
            if case.plain is not None and case.plain not in self._plain_calls:
                self._plain_calls[case.plain] = self._warm(plain[case.plain])
                self._plain_samples[case.plain] = []

    def run(self, ceilings: Callable[[], Ceilings]) -> tuple[list[Timing], list[Ceilings]]:
        """Measure round after round; return the timings, and the ceilings of each round."""
        found: list[Ceilings] = []
        for number in range(self._plan.rounds):
            round_s = time.perf_counter()
            self._tell(f"round {number + 1} of {self._plan.rounds}")
            found.append(ceilings())
            self._round()
            now_s = time.perf_counter()
            if 2 * now_s - round_s - self._begin_s > self._plan.budget_s:
                break
        return [self._timing(index, found) for index in range(len(self._cases))], found

    def _warm(self, case: Case) -> tuple[Call, int]:
        call = case.start()
        first = self._stopwatch.sample(call, 1)
        if first.busy_s < self._plan.sample_s:
            # The first call also touches new memory: count by another one.
            first = self._stopwatch.sample(call, 1)
        return call, max(1, min(_MOST_CALLS, round(self._plan.sample_s / max(first.busy_s, 1e-7))))

    def _round(self) -> None:
        done: set[str] = set()
        for case, (call, count), samples in zip(self._cases, self._calls, self._samples, strict=True):
            samples.append(self._stopwatch.sample(call, count))
            if case.plain is not None and case.plain not in done:
                done.add(case.plain)
                self._plain_samples[case.plain].append(self._stopwatch.sample(*self._plain_calls[case.plain]))

    def _timing(self, index: int, rounds: Sequence[Ceilings]) -> Timing:
        case, samples = self._cases[index], self._samples[index]
        busy = [sample.busy_s for sample in samples]
        floors = [one.floor(case.work).seconds for one in rounds]
        plain = [sample.busy_s for sample in self._plain_samples[case.plain]] if case.plain is not None else []
        return Timing(
            case.group,
            case.name,
            case.work,
            _sure(spread(busy)),
            _sure(spread(sample.wall_s for sample in samples)),
            _sure(spread(floors)).median,
            median_of(rounds).floor(case.work).bound,
            _sure(spread(time_s / floor_s for time_s, floor_s in zip(busy, floors, strict=True))),
            spread(plain),
            spread(other / time_s for other, time_s in zip(plain, busy, strict=False)),
        )


def _sure(found: Spread | None) -> Spread:
    assert found is not None, "every case has a sample of each round"
    return found
