"""What a comparison leaves behind, and the ratios that follow from it.

    round 1:  A  B  C      round 2:  C  B  A      round 3:  A  B  C
              └──┴──┴─ ratio of round 1 ...        ─► median over rounds, with the least and the greatest

A machine's speed drifts, so that only turns of one round are divided by each other. A round without one of the two, or
with one that others on the machine disturbed, gives no ratio.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from bench.figures import figures
from bench.records import Record, Run
from bench.spreads import Spread, spread

FORMAT: Final = 1


class Turn(msgspec.Struct, frozen=True):
    """One server's go at one workload.

    Attributes:
        scenario: which comparison it belongs to.
        round: turns of one round are compared with each other.
        recipe: the server's label.
        runs: one for each phase of the workload; empty where only the start was measured.
        start_s: how long this server took to start.
        server_cpu_s: CPU time of the server's processes over the whole turn, warm-up included.
        router_cpu_s: of Baton's router during the turn; None for others.
        idle_cpu_s: CPU time of all other servers that stood ready meanwhile.
        foreign_cores: processors kept busy, on average, by anything else.
        memory_bytes: of the server's processes at the end of the turn.
        is_disturbed: others took more than was allowed.
    """

    scenario: str
    round: int
    recipe: str
    runs: tuple[Run, ...]
    start_s: float
    server_cpu_s: float = 0.0
    router_cpu_s: float | None = None
    idle_cpu_s: float = 0.0
    foreign_cores: float = 0.0
    memory_bytes: int = 0
    is_disturbed: bool = False

    def run(self, phase: str | None) -> Run | None:
        """Return the run of a phase; without one, the only run."""
        if phase is None:
            return self.runs[0] if len(self.runs) == 1 else None
        return next((run for run in self.runs if run.parameters.get("phase") == phase), None)

    @property
    def num_errors(self) -> int:
        """Requests that failed, warm-up included."""
        return sum(record.error is not None for run in self.runs for record in run.records)


class Comparison(msgspec.Struct, frozen=True):
    """What is written to disk: every turn of one call, how each server was started, and where.

    Attributes:
        commands: whole command line of each recipe by its label.
        niceness: of servers and client.
    """

    turns: tuple[Turn, ...]
    commands: dict[str, str]
    machine: str
    made_at: str
    niceness: int = 0
    format: int = FORMAT


def save(path: Path, comparison: Comparison) -> None:
    """Write a comparison as JSON; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.encode(comparison) + b"\n")


def load(path: Path) -> Comparison:
    """Read what `save` wrote; raises ValueError for another format or a damaged file."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Comparison)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path.name}: not a comparison ({error})") from error
    if found.format != FORMAT:
        raise ValueError(f"{path.name}: format {found.format}, this reads {FORMAT}")
    return found


def overlap_tokens_per_s(records: Iterable[Record]) -> float | None:
    """Return output tokens a second while every one of these streams was running: no prompt is computed meanwhile.

    None where there was no such time.
    """
    streams = [record for record in records if record.error is None and len(record.chunk_s) > 1]
    if not streams:
        return None
    begin_s, end_s = max(r.chunk_s[0] for r in streams), min(r.chunk_s[-1] for r in streams)
    if end_s <= begin_s:
        return None
    count = sum(
        n for r in streams for at_s, n in zip(r.chunk_s, r.chunk_tokens, strict=True) if begin_s < at_s <= end_s
    )
    return count / (end_s - begin_s)


def _tpot_ms(turn: Turn, phase: str | None) -> float | None:
    run = turn.run(phase)
    return None if run is None else figures(run).tpot.p50_ms


def _overlap_rate(turn: Turn, phase: str | None) -> float | None:
    run = turn.run(phase)
    return None if run is None else overlap_tokens_per_s(run.measured())


def _ttft_ms(turn: Turn, phase: str | None) -> float | None:
    run = turn.run(phase)
    return None if run is None else figures(run).ttft.p50_ms


def _prefill_rate(turn: Turn, phase: str | None) -> float | None:
    run = turn.run(phase)
    rates = [
        (r.num_prompt_tokens or r.planned_prompt_tokens) / r.ttft_s
        for r in (run.measured() if run is not None else ())
        if r.error is None and r.ttft_s
    ]
    return statistics.median(rates) if rates else None


def _steady_itl_p99_ms(turn: Turn, phase: str | None) -> float | None:
    run = turn.run(phase)
    return None if run is None else figures(run, "steady").itl.p99_ms


def _steady_itl_p50_ms(turn: Turn, phase: str | None) -> float | None:
    run = turn.run(phase)
    return None if run is None else figures(run, "steady").itl.p50_ms


def _steady_itl_max_ms(turn: Turn, phase: str | None) -> float | None:
    run = turn.run(phase)
    return None if run is None else figures(run, "steady").itl.max_ms


def _steady_rate(turn: Turn, phase: str | None) -> float | None:
    run = turn.run(phase)
    return None if run is None else figures(run, "steady").output_tokens_per_s


def _long_ttft_ms(turn: Turn, phase: str | None) -> float | None:
    run = turn.run(phase)
    return None if run is None else figures(run, "arrival").ttft.p50_ms


def _router_us_per_token(turn: Turn, _: str | None) -> float | None:
    num_tokens = sum(record.num_output_tokens for run in turn.runs for record in run.records)
    return turn.router_cpu_s / num_tokens * 1e6 if turn.router_cpu_s is not None and num_tokens else None


def _start_s(turn: Turn, _: str | None) -> float | None:
    return turn.start_s


FIGURES: Final[dict[str, Callable[[Turn, str | None], float | None]]] = {
    "TPOT ms": _tpot_ms,
    "decode tokens/s": _overlap_rate,
    "prefill tokens/s": _prefill_rate,
    "TTFT ms": _ttft_ms,
    "steady ITL p50 ms": _steady_itl_p50_ms,
    "steady ITL p99 ms": _steady_itl_p99_ms,
    "steady ITL max ms": _steady_itl_max_ms,
    "steady tokens/s": _steady_rate,
    "long TTFT ms": _long_ttft_ms,
    "router us/token": _router_us_per_token,
    "start s": _start_s,
}


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure of one server in one scenario; `figure` is a key of FIGURES."""

    scenario: str
    recipe: str
    figure: str
    phase: str | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on a figure, or on its ratio to another.

    Attributes:
        below: what the figure is divided by; None bounds the figure itself.
        is_at_most: the bound is from above.
    """

    what: str
    above: Measure
    below: Measure | None
    bound: float
    is_at_most: bool = True

    def is_met(self, value: float) -> bool:
        """Whether a value keeps the bound."""
        return value <= self.bound if self.is_at_most else value >= self.bound


def values_by_round(turns: Iterable[Turn], measure: Measure) -> dict[int, float]:
    """Return a figure of each round that has it; disturbed turns, and those with failed requests, have none.

    Where a turn was repeated, the latest good one counts.
    """
    found: dict[int, float] = {}
    for turn in turns:
        if (turn.scenario, turn.recipe) != (measure.scenario, measure.recipe) or turn.is_disturbed or turn.num_errors:
            continue
        value = FIGURES[measure.figure](turn, measure.phase)
        if value is not None:
            found[turn.round] = value
    return found


def spread_of(turns: Iterable[Turn], measure: Measure) -> Spread | None:
    """Return a figure over all rounds."""
    return spread(values_by_round(turns, measure).values())


def outcome(turns: Sequence[Turn], target: Target) -> Spread | None:
    """Return a target's value over all rounds: the figure, or its ratio within each round; None if not measured."""
    above = values_by_round(turns, target.above)
    if target.below is None:
        return spread(above.values())
    below = values_by_round(turns, target.below)
    return spread([above[n] / below[n] for n in sorted(above.keys() & below.keys()) if below[n] > 0])
