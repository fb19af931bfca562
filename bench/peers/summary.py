"""A comparison as tables: what each server did in each scenario, and the targets.

A "~" marks figures of a server all of whose turns were disturbed; no ratio is made of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from rich import box
from rich.table import Table

from bench.numerals import MISSING, extent, number
from bench.peers.results import Comparison, Measure, Target, Turn, outcome, spread_of
from bench.peers.scenarios import Scenario


def figures_tables(comparison: Comparison, scenarios: Sequence[Scenario]) -> list[Table]:
    """Return one table for each scenario that was measured: a row for each server, medians over its rounds."""
    tables = []
    for scenario in scenarios:
        turns = [turn for turn in comparison.turns if turn.scenario == scenario.name]
        if turns:
            tables.append(_figures_table(scenario, turns))
    return tables


def _figures_table(scenario: Scenario, turns: Sequence[Turn]) -> Table:
    headings = [f"{name}{f' {phase}' if phase else ''}" for name, phase in scenario.figures]
    table = Table("server", *headings, "turns", "MiB", "client", "others", title=scenario.name, box=box.SIMPLE)
    table.title_justify = "left"
    for column in table.columns[1:]:
        column.justify = "right"
    for label in dict.fromkeys(turn.recipe for turn in turns):
        own = [turn for turn in turns if turn.recipe == label]
        cells = [_cell(own, Measure(scenario.name, label, name, phase)) for name, phase in scenario.figures]
        table.add_row(label, *cells, *_circumstances(own))
    return table


def _circumstances(turns: Sequence[Turn]) -> list[str]:
    """Return how many turns there were, the most memory, the client's share of a core and that of others."""
    num_bad = sum(turn.is_disturbed or turn.num_errors > 0 for turn in turns)
    shares = [run.client_cpu_s / run.duration_s for turn in turns for run in turn.runs if run.duration_s > 0]
    return [
        f"{len(turns)}, {num_bad} left out" if num_bad else str(len(turns)),
        str(max(turn.memory_bytes for turn in turns) // 2**20 or MISSING),
        f"{max(shares) * 100:.1f} %" if shares else MISSING,
        f"{max(turn.foreign_cores for turn in turns):.2f}",
    ]


def targets_table(comparison: Comparison, targets: Sequence[Target]) -> Table:
    """Return the targets of what was measured, with what was reached: medians of ratios within rounds, and ranges."""
    table = Table("what", "target", "reached", "range", "rounds", "met", box=box.SIMPLE, title="targets")
    table.title_justify = "left"
    measured = {turn.scenario for turn in comparison.turns}
    for target in (target for target in targets if target.above.scenario in measured):
        found = outcome(comparison.turns, target)
        bound = f"{'<=' if target.is_at_most else '>='} {target.bound:g}"
        if found is None:
            table.add_row(target.what, bound, MISSING, "", "", "not measured")
        else:
            met = "yes" if target.is_met(found.median) else "NO"
            table.add_row(target.what, bound, number(found.median), extent(found), str(found.n), met)
    return table


def _cell(turns: Sequence[Turn], measure: Measure) -> str:
    """Return median and range; figures of disturbed turns only where there are no others, marked as such."""
    found, mark = spread_of(turns, measure), ""
    if found is None:
        found, mark = spread_of([msgspec.structs.replace(turn, is_disturbed=False) for turn in turns], measure), "~"
    if found is None:
        return MISSING
    between = extent(found)
    return f"{mark}{number(found.median)}" + (f" ({between})" if between else "")
