"""Runs as tables for a terminal 120 columns wide.

runs ─► groups ─► runs_table: one row per server, phase and kind of request
     └► cases ──► compare_table: one row per measure, one column per server, ratios to the first

Only the first column wraps: columns of figures are kept narrow by breaking their headings and long ranges here, so that
no number is ever broken or cut.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from bench.numerals import MISSING, extent, number, times, times_extent
from bench.records import Run
from bench.spreads import (
    ALONE,
    ARRIVALS,
    ITL_P99,
    ITL_P99_BY_TIME,
    MEASURES,
    Case,
    Group,
    Ledger,
    Measure,
    Spread,
    alone_of,
    cases,
    group_runs,
    is_measured,
    kinds_of,
    num_unpaired,
    pairs,
    server_names,
    variant,
    varying,
)

# What fits beside each other; compare_table and the report show the rest.
_SHORT = (
    "TTFT p50",
    "TTFT p99",
    "TPOT p50",
    "ITL p99",
    "worst gap p50",
    "E2E p95",
    "output tokens",
    "SLO met",
    "goodput",
)
# Two such columns of ratios fit beside three servers; of more servers, each has its ratio in its own column.
_MAX_SERVERS_WITH_RATIO_COLUMNS = 3
_NAME_CHARS, _RANGE_CHARS = 12, 9
_DIM, _STRONG, _BAD = "dim", "bold", "bold red"


def runs_table(runs: Sequence[Run]) -> Table:
    """Return what each server did: medians over repeated runs, with the range below where there are several."""
    ledger, groups = Ledger(), group_runs(runs)
    measures = [m for m in MEASURES if m.label in _SHORT and is_measured(ledger, groups, m)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption_justify="left")
    table.add_column("" if groups else "No runs.", overflow="fold")
    for measure in measures:
        table.add_column(_heading(measure), justify="right", no_wrap=True)
    for workload in dict.fromkeys(g.workload for g in groups):
        members = [g for g in groups if g.workload == workload]
        names = varying(members)
        for server in server_names(runs):
            table.add_section()
            of_server = sorted((g for g in members if g.server == server), key=lambda g: g.phase or "")
            for group in of_server:
                _add_group(table, ledger, group, variant(group.phase, group.parameters, names), measures)
                _add_phase_ratios(table, ledger, group, alone_of(group, of_server), measures)
    table.caption = Text(_runs_caption(groups), style=_DIM)
    return table


def compare_table(runs: Sequence[Run]) -> Table:
    """Return one row per measure and one column per server, with the ratio to the first server, pair by pair."""
    ledger, servers, all_cases = Ledger(), server_names(runs), cases(runs)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), caption_justify="left")
    table.add_column("" if servers else "No runs.", overflow="fold")
    for position, server in enumerate(servers):
        table.add_column(Text(textwrap.fill(server, _NAME_CHARS)), justify="right", no_wrap=True)
        if position and _has_ratio_columns(servers):
            table.add_column(Text("ratio", style=_DIM), no_wrap=True)
    for case in all_cases:
        names = varying([g for c in all_cases if c.workload == case.workload for g in c.groups])
        words = variant(case.phase, case.parameters, names)
        table.add_section()
        table.add_row(Text(f"{case.workload}: {words}" if words else case.workload, style=_STRONG))
        for kind in kinds_of(case.groups):
            for measure in MEASURES:
                if measure.reads(kind) and is_measured(ledger, case.groups, measure, kind):
                    _add_measure(table, ledger, case, servers, measure, kind)
        if case.phase == ARRIVALS:
            for measure in (ITL_P99, ITL_P99_BY_TIME):
                _add_interference(table, ledger, case, all_cases, servers, measure)
    table.caption = Text(_compare_caption(servers, all_cases), style=_DIM)
    return table


def _add_group(table: Table, ledger: Ledger, group: Group, words: str, measures: Sequence[Measure]) -> None:
    for position, kind in enumerate(kinds_of([group])):
        each = [ledger.figures(run, kind) for run in group.runs]
        num_sent, num_failed = sum(f.num_requests for f in each), sum(f.num_errors for f in each)
        counted = f"{num_sent} {kind}" if kind == "steady" else f"{num_sent} {kind}s"
        head = Text(f"{group.server}\n") if position == 0 else Text()
        head.append(f"{words}, {counted}" if words and position == 0 else counted, style=_DIM)
        if num_failed:
            head.append(f"\n{num_failed} failed", style=_BAD)
        cells = [_cell(ledger.spread(group.runs, m, kind), m.unit) if m.reads(kind) else Text() for m in measures]
        table.add_row(head, *cells)


def _add_phase_ratios(
    table: Table, ledger: Ledger, group: Group, alone: Group | None, measures: Sequence[Measure]
) -> None:
    if alone is None:
        return
    paired = pairs(alone.runs, group.runs)
    ratios = [ledger.ratio(paired, m, "steady") if m.has_ratio and m.reads("steady") else None for m in measures]
    if any(ratios):
        cells = [_ratio_cell(ratio, _STRONG if m is ITL_P99 else "") for m, ratio in zip(measures, ratios, strict=True)]
        table.add_row(Text(f"{ARRIVALS} / {ALONE}\nof steady", style=_STRONG), *cells)


def _add_measure(table: Table, ledger: Ledger, case: Case, servers: list[str], measure: Measure, kind: str) -> None:
    by_server = {g.server: g for g in case.groups}
    first = by_server.get(servers[0])
    cells = []
    for position, server in enumerate(servers):
        group = by_server.get(server)
        spread = ledger.spread(group.runs, measure, kind) if group else None
        cells.append(Text(number(spread.median, measure.unit) if spread else MISSING))
        if position:
            has_ratio = group is not None and first is not None and measure.has_ratio
            ratio = (
                ledger.ratio(pairs(first.runs, group.runs), measure, kind) if has_ratio and first and group else None
            )
            _add_ratio(cells, ratio, _verdict(ratio, measure), servers)
    arrow = "↓" if measure.is_lower_better else "↑"
    of_kind = "" if kind == "request" else f"{kind} "
    unit = f" {measure.unit}" if measure.unit in ("ms", "/s") else ""
    table.add_row(Text(f"  {of_kind}{measure.label}{unit} {arrow}"), *cells)


def _add_interference(
    table: Table, ledger: Ledger, case: Case, all_cases: Sequence[Case], servers: list[str], measure: Measure
) -> None:
    everything = [g for c in all_cases for g in c.groups]
    by_server = {g.server: g for g in case.groups}
    cells = []
    for position, server in enumerate(servers):
        group = by_server.get(server)
        alone = alone_of(group, everything) if group else None
        ratio = ledger.ratio(pairs(alone.runs, group.runs), measure, "steady") if alone and group else None
        cells.append(_ratio_cell(ratio, _STRONG) if ratio else Text(MISSING))
        if position and _has_ratio_columns(servers):
            cells.append(Text())
    table.add_row(Text(f"  steady {measure.label} ↓\n  {ARRIVALS} / {ALONE}", style=_STRONG), *cells)


def _verdict(ratio: Spread | None, measure: Measure) -> str:
    if ratio is None or ratio.median == 1:
        return ""
    return "green" if (ratio.median < 1) == measure.is_lower_better else "yellow"


def _has_ratio_columns(servers: Sequence[str]) -> bool:
    return len(servers) <= _MAX_SERVERS_WITH_RATIO_COLUMNS


def _add_ratio(cells: list[Text], ratio: Spread | None, style: str, servers: Sequence[str]) -> None:
    """Put a ratio into a column of its own, or into its server's last cell with the range below."""
    words = times_extent(ratio)
    if _has_ratio_columns(servers):
        cells.append(
            Text.assemble((times(ratio.median) if ratio else "", style), (f" ({words})" if words else "", _DIM))
        )
    elif ratio is not None:
        cells[-1].append(f" {times(ratio.median)}", style=style)
        cells[-1].append(f"\n({words})" if words else "", style=_DIM)


def _cell(spread: Spread | None, unit: str) -> Text:
    if spread is None:
        return Text(MISSING, style=_DIM)
    return Text.assemble(number(spread.median, unit), (_below(extent(spread, unit)), _DIM))


def _ratio_cell(ratio: Spread | None, style: str) -> Text:
    return Text.assemble((times(ratio.median), style), (_below(times_extent(ratio)), _DIM)) if ratio else Text()


def _below(words: str) -> str:
    """Put a range on the next line, and a long one on two."""
    if len(words) > _RANGE_CHARS:
        words = words.replace("–", "–\n")
    return f"\n{words}" if words else ""


def _heading(measure: Measure) -> str:
    """Break a label over three lines, so that a column is as wide as its figures and all headings end level."""
    if measure.label == "output tokens":
        return "\noutput\ntok/s"
    head, _, tail = measure.label.rpartition(" ")
    unit = measure.unit if measure.unit in ("ms", "/s") else ""
    return "\n".join(sorted((head, tail, unit), key=bool))


def _runs_caption(groups: Sequence[Group]) -> str:
    if not groups:
        return ""
    num_runs = max(len(g.runs) for g in groups)
    lines = ["Latencies in ms: lower is better. Output, SLO met, goodput: higher is better."]
    if num_runs > 1:
        lines.append(f"Medians over {num_runs} runs, with lowest–highest below where they differ.")
    if any(g.phase == ARRIVALS for g in groups):
        lines.append(f"{ARRIVALS} / {ALONE}: the same server with and without long prompts, run by run; ×1 is ideal.")
    return "\n".join(lines)


def _compare_caption(servers: Sequence[str], all_cases: Sequence[Case]) -> str:
    if not servers:
        return ""
    lines = ["↓ lower is better, ↑ higher is better."]
    if len(servers) > 1:
        lines.append(
            f"Ratio to {servers[0]}: median over pairs of runs of equal seed and turn, (lowest–highest); "
            "green where better than it, yellow where worse."
        )
    if unpaired := num_unpaired(all_cases, servers[0]):
        lines.append(f"{unpaired} runs have no partner of {servers[0]} with equal parameters, seed and turn: no ratio.")
    return "\n".join(lines)
