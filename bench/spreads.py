"""Several runs seen together: groups of repeated runs, medians with their spread, ratios between runs in pairs.

    runs ─► Group: same server, workload and parameters ─► Spread of each Measure
         └► Case: groups that differ in the server only  ─► ratios, pair by pair

A machine drifts, so two medians taken at different times do not compare. Runs made in turns do: the n-th run of one
server with a seed is paired with the n-th of the other with that seed, each pair gives one ratio, and the median and
range of those ratios are what is quoted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from bench.figures import Figures, figures
from bench.records import Run

Parameters = dict[str, float | int | str | None]

ALONE, ARRIVALS = "alone", "arrivals"
# In the order they are shown; a kind not named here comes after these.
_KIND_ORDER = ("request", "steady", "arrival")
_ALL_KINDS = frozenset(_KIND_ORDER)
_ENDING = frozenset({"request", "arrival"})  # a steady stream lasts as long as its window: its end says nothing
_STREAMING = frozenset({"request", "steady"})  # a long prompt that arrives asks for a few tokens only


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and range of one figure over `n` runs."""

    median: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure that tables show.

    Attributes:
        unit: "ms", "/s", "%" (of a share from 0 to 1) or "" for a count.
        kinds: the kinds of request it says something about.
        has_ratio: whether dividing it by another server's is of use.
    """

    label: str
    unit: str
    is_lower_better: bool
    read: Callable[[Figures], float | None]
    kinds: frozenset[str] = _ALL_KINDS
    has_ratio: bool = True

    def reads(self, kind: str) -> bool:
        """Say whether it applies to a kind; kinds of workloads yet unknown get all measures."""
        return kind in self.kinds or kind not in _ALL_KINDS


ITL_P99 = Measure("ITL p99", "ms", True, lambda f: f.itl.p99_ms, _STREAMING)
ITL_P99_BY_TIME = Measure("ITL p99 by time", "ms", True, lambda f: f.itl_by_time.p99_ms, _STREAMING)
MEASURES: tuple[Measure, ...] = (
    Measure("TTFT p50", "ms", True, lambda f: f.ttft.p50_ms, _ENDING),
    Measure("TTFT p95", "ms", True, lambda f: f.ttft.p95_ms, _ENDING),
    Measure("TTFT p99", "ms", True, lambda f: f.ttft.p99_ms, _ENDING),
    Measure("TPOT p50", "ms", True, lambda f: f.tpot.p50_ms, _STREAMING),
    Measure("TPOT p99", "ms", True, lambda f: f.tpot.p99_ms, _STREAMING),
    Measure("ITL p50", "ms", True, lambda f: f.itl.p50_ms, _STREAMING),
    ITL_P99,
    ITL_P99_BY_TIME,
    Measure("ITL max", "ms", True, lambda f: f.itl.max_ms, _STREAMING),
    Measure("worst gap p50", "ms", True, lambda f: f.worst_gap.p50_ms, _STREAMING),
    Measure("E2E p50", "ms", True, lambda f: f.e2e.p50_ms, _ENDING),
    Measure("E2E p95", "ms", True, lambda f: f.e2e.p95_ms, _ENDING),
    Measure("output tokens", "/s", False, lambda f: f.output_tokens_per_s, _STREAMING),
    Measure("requests", "/s", False, lambda f: f.requests_per_s, _ENDING),
    Measure("SLO met", "%", False, lambda f: f.attainment.every, has_ratio=False),
    Measure("goodput", "/s", False, lambda f: f.goodput_per_s, _ENDING),
    Measure("failed requests", "", True, lambda f: float(f.num_errors), has_ratio=False),
)


class Ledger:
    """Figures of runs, each computed once; holds the runs it was asked about alive."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, str | None], tuple[Run, Figures]] = {}

    def figures(self, run: Run, kind: str | None = None) -> Figures:
        """Return the figures of a run, from memory where they were asked for before."""
        key = (id(run), kind)
        if key not in self._known:
            self._known[key] = (run, figures(run, kind))
        return self._known[key][1]

    def spread(self, runs: Iterable[Run], measure: Measure, kind: str | None = None) -> Spread | None:
        """Return the spread of a measure over runs."""
        return spread(measure.read(self.figures(run, kind)) for run in runs)

    def ratio(self, pairs: Iterable[tuple[Run, Run]], measure: Measure, kind: str | None = None) -> Spread | None:
        """Return the spread of second over first of each pair; a pair without two values, or with a 0, is left out."""
        ratios: list[float | None] = []
        for first, second in pairs:
            below, above = (measure.read(self.figures(run, kind)) for run in (first, second))
            ratios.append(above / below if below and above is not None else None)
        return spread(ratios)


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that repeat each other: same server, workload, parameters and SLO; seeds and turns differ.

    Attributes:
        phase: "alone" or "arrivals" for interference, or what the workload calls its phase, else None.
    """

    server: str
    workload: str
    phase: str | None
    parameters: Parameters
    runs: tuple[Run, ...]

    @property
    def kinds(self) -> list[str]:
        """Kinds of request that its runs measured, in the order they are shown."""
        present = {r.kind for run in self.runs for r in run.measured()}
        return sorted(present, key=_kind_rank)


@dataclass(frozen=True, slots=True)
class Case:
    """Groups that differ in the server only, the first server first."""

    workload: str
    phase: str | None
    parameters: Parameters
    groups: tuple[Group, ...]


def spread(values: Iterable[float | None]) -> Spread | None:
    """Return median, least and greatest of the values that are there; None without any."""
    present = [v for v in values if v is not None]
    return Spread(median(present), min(present), max(present), len(present)) if present else None


def phase_of(run: Run) -> str | None:
    """Return the phase that a run's parameters name, or for interference what its records show."""
    if (named := run.parameters.get("phase")) is not None:
        return str(named)
    if run.workload != "interference":
        return None
    return ARRIVALS if any(r.kind == "arrival" for r in run.records) else ALONE


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Put runs that repeat each other together, in the order in which each group's first run stands."""
    members: dict[object, list[Run]] = {}
    for run in runs:
        members.setdefault((run.server, *_case_key(run)), []).append(run)
    return [Group(g[0].server, g[0].workload, phase_of(g[0]), g[0].parameters, tuple(g)) for g in members.values()]


def cases(runs: Sequence[Run]) -> list[Case]:
    """Put groups that differ in the server only together; servers stand as they first appear in `runs`."""
    servers = server_names(runs)
    members: dict[object, list[Group]] = {}
    for group in group_runs(runs):
        members.setdefault(_case_key(group.runs[0]), []).append(group)
    return [
        Case(
            g[0].workload, g[0].phase, g[0].parameters, tuple(sorted(g, key=lambda group: servers.index(group.server)))
        )
        for g in members.values()
    ]


def server_names(runs: Iterable[Run]) -> list[str]:
    """Return each server's label once, in order of appearance."""
    return list(dict.fromkeys(run.server for run in runs))


def pairs(first: Sequence[Run], second: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Pair the n-th run of each seed in `first` with the n-th of that seed in `second`; the rest is left out."""
    partners = dict(zip(_turns(second), second, strict=True))
    return [(run, partners[turn]) for turn, run in zip(_turns(first), first, strict=True) if turn in partners]


def alone_of(group: Group, groups: Iterable[Group]) -> Group | None:
    """Return the baseline of a group with arrivals: the same server alone, with the most parameters in common."""
    if group.phase != ARRIVALS:
        return None
    candidates = [g for g in groups if g.phase == ALONE and (g.server, g.workload) == (group.server, group.workload)]
    return max(candidates, key=lambda g: len(g.parameters.items() & group.parameters.items()), default=None)


def num_unpaired(all_cases: Iterable[Case], first: str) -> int:
    """Count the runs of other servers for which `first` has no run of equal parameters, seed and turn."""
    count = 0
    for case in all_cases:
        reference = next((g.runs for g in case.groups if g.server == first), ())
        count += sum(len(g.runs) - len(pairs(reference, g.runs)) for g in case.groups if g.server != first)
    return count


def kinds_of(groups: Iterable[Group]) -> list[str]:
    """Return the kinds that any of the groups measured; "request" where nothing was."""
    return sorted({kind for g in groups for kind in g.kinds}, key=_kind_rank) or ["request"]


def is_measured(ledger: Ledger, groups: Iterable[Group], measure: Measure, kind: str | None = None) -> bool:
    """Say whether any group has a value of a measure, for one kind or for any it applies to."""
    return any(
        ledger.spread(g.runs, measure, each) is not None
        for g in groups
        for each in ([kind] if kind is not None else kinds_of([g]))
        if measure.reads(each)
    )


def varying(groups: Sequence[Group]) -> list[str]:
    """Name the parameters that tell groups of one workload apart, less those that only follow the phase."""
    names = dict.fromkeys(name for g in groups for name in g.parameters if name != "phase")
    by_phase: dict[str | None, list[Group]] = {}
    for g in groups:
        by_phase.setdefault(g.phase, []).append(g)
    return [
        name
        for name in names
        if any(len({str(g.parameters.get(name)) for g in members}) > 1 for members in by_phase.values())
    ]


def variant(phase: str | None, parameters: Parameters, names: Iterable[str]) -> str:
    """Return words for one case among others, as "arrivals, every_s 10"; empty where nothing varies."""
    return ", ".join([*([phase] if phase else []), *(f"{name} {parameters.get(name)}" for name in names)])


def _case_key(run: Run) -> tuple[object, ...]:
    return run.workload, phase_of(run), run.slo, tuple(sorted(run.parameters.items(), key=lambda item: item[0]))


def _turns(runs: Sequence[Run]) -> list[tuple[int, int]]:
    seen: Counter[int] = Counter()
    turns = []
    for run in runs:
        turns.append((run.seed, seen[run.seed]))
        seen[run.seed] += 1
    return turns


def _kind_rank(kind: str) -> tuple[int, str]:
    return (_KIND_ORDER.index(kind) if kind in _KIND_ORDER else len(_KIND_ORDER)), kind
