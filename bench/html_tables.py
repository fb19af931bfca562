"""The report's tables: medians with their range, all percentiles, ratios between servers, and what to trust them by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bench.figures import Figures, Quantiles, bounds
from bench.html_charts import Look
from bench.html_markup import Markup, details, element, join, table, text
from bench.numerals import MISSING, duration, extent, number, times, times_extent
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
    is_measured,
    kinds_of,
    pairs,
    spread,
    variant,
    varying,
)

_LEFT_OUT_OF_SUMMARY = frozenset({"TTFT p95", "TPOT p99", "failed requests"})
_LATENCIES: tuple[tuple[str, str], ...] = (
    ("TTFT", "ttft"),
    ("TPOT", "tpot"),
    ("ITL", "itl"),
    ("ITL by time", "itl_by_time"),
    ("worst gap", "worst_gap"),
    ("E2E", "e2e"),
)
_BOUND_WORDS = {"ttft": "TTFT", "tpot": "TPOT", "itl_p99": "p99 of its own gaps", "e2e": "E2E"}
_MAX_MESSAGES = 50
# Above these the load generator may have bent what it measured.
_BUSY_SHARE, _LATE_MS = 0.5, 5.0


@dataclass(frozen=True, slots=True)
class Shown:
    """A group and how the section shows it."""

    group: Group
    look: Look

    @property
    def chip(self) -> Markup:
        """Colour and label, for the first cell of a row."""
        square = element("span", class_=f"chip-text c{self.look.colour}")
        return element("td", square, self.look.label, class_="words")


def summaries(ledger: Ledger, section: Sequence[Shown]) -> list[Markup]:
    """Return a table for each kind of request: medians with their range, and what arrivals do to steady streams."""
    groups = [s.group for s in section]
    tables = []
    for kind in kinds_of(groups):
        measures = [
            m
            for m in MEASURES
            if m.label not in _LEFT_OUT_OF_SUMMARY and m.reads(kind) and is_measured(ledger, groups, m, kind)
        ]
        head = [element("th", "" if kind == "request" else kind, class_="words"), "sent", "failed"]
        body: list[list[str]] = []
        for shown in section:
            if kind in kinds_of([shown.group]):
                body.append(_summary_row(ledger, shown, kind, measures))
            alone = alone_of(shown.group, groups) if kind == "steady" else None
            if alone is not None:
                body.append(_phase_row(ledger, pairs(alone.runs, shown.group.runs), measures))
        tables.append(table([[*head, *(_heading(m) for m in measures)]], body))
    return tables


def percentiles(ledger: Ledger, section: Sequence[Shown]) -> Markup:
    """Return every latency's percentiles, folded: medians over runs, with the number of values of all runs."""
    head = ["", *(element("th", words, class_="words") for words in ("kind", "latency, ms"))]
    head += ["values", "p50", "p90", "p95", "p99", "max"]
    body: list[list[str]] = []
    for shown in section:
        for kind in kinds_of([shown.group]):
            each = [ledger.figures(run, kind) for run in shown.group.runs]
            for words, name in _LATENCIES:
                cells = _percentile_cells([getattr(f, name) for f in each])
                body.append([shown.chip, _words(kind), _words(words), *cells])
    return details("All percentiles", table([head], body))


def comparison(ledger: Ledger, cases: Sequence[Case], servers: Sequence[str]) -> Markup:
    """Return ratios to the first server, case by case, from pairs of runs made in turns."""
    head = ["", *servers[:1]]
    for server in servers[1:]:
        head += [server, element("th", "ratio", class_="words")]
    body: list[list[str]] = []
    names = varying([g for case in cases for g in case.groups])
    for case in cases:
        if len(case.groups) > 1:
            words = variant(case.phase, case.parameters, names) or case.workload
            body.append([element("td", element("b", words), class_="words", colspan=len(head))])
            for kind in kinds_of(case.groups):
                for measure in MEASURES:
                    if measure.reads(kind) and is_measured(ledger, case.groups, measure, kind):
                        body.append(_comparison_row(ledger, case, servers, measure, kind))
    if not body:
        return element("p", "No two servers ran with equal parameters.", class_="note")
    return table([head], body, class_="compact")


def attainment(ledger: Ledger, section: Sequence[Shown]) -> Markup:
    """Return the share of requests that met each bound."""
    asked = {id(s): {n: b for n, b in bounds(s.group.runs[0].slo).items() if b is not None} for s in section}
    names = [name for name in _BOUND_WORDS if any(name in each for each in asked.values())]
    if not names:
        return element("p", "This workload ran without SLO.", class_="note")
    head = ["", *(element("th", words, class_="words") for words in ("kind", "asked for"))]
    head += [*(_BOUND_WORDS[name] for name in names), "all of them"]
    body: list[list[str]] = []
    for shown in section:
        limits = [f"{_BOUND_WORDS[name]} ≤ {duration(b * 1e3)}" for name, b in asked[id(shown)].items()]
        for kind in kinds_of([shown.group]):
            each = [ledger.figures(run, kind).attainment for run in shown.group.runs]
            shares = [spread(getattr(a, name) for a in each) for name in (*names, "every")]
            body.append([shown.chip, _words(kind), _words(", ".join(limits)), *(_cell(s, "%") for s in shares)])
    return table([head], body)


def trust(ledger: Ledger, section: Sequence[Shown]) -> Markup:
    """Return what the measuring cost and whether the server saw what was meant, worst run first of each."""
    head = ["", "runs", "seeds", "client CPU", "its lag p99", "sent late p99", "prompts off plan", "worst, tokens"]
    body: list[list[str]] = []
    for shown in section:
        runs = shown.group.runs
        each = [ledger.figures(run) for run in runs]
        late = [f.client.sent_late_p99_ms for f in each if f.client.sent_late_p99_ms is not None]
        cpu_share, lag_ms = max(f.client.cpu_share for f in each), max(f.client.lag_p99_ms for f in each)
        num_off, num_told = sum(f.prompts.num_mismatched for f in each), sum(f.prompts.num_compared for f in each)
        worst = max((f.prompts.worst_tokens for f in each), key=abs)
        body.append(
            [
                shown.chip,
                str(len(runs)),
                ", ".join(str(seed) for seed in sorted({run.seed for run in runs})),
                _warned(f"{100 * cpu_share:.0f} %", cpu_share > _BUSY_SHARE),
                _warned(duration(lag_ms), lag_ms > _LATE_MS),
                _warned(duration(max(late)), max(late) > _LATE_MS) if late else MISSING,
                _warned(f"{num_off} of {num_told}", num_off > 0) if num_told else "not told",
                f"{worst:+d}" if num_off else MISSING,
            ]
        )
    return table([head], body)


def errors(runs: Sequence[Run]) -> Markup:
    """Return each reason for failure once with its count, the most frequent first."""
    counted = Counter((r.error, run.server, r.kind) for run in runs for r in run.measured() if r.error is not None)
    if not counted:
        return element("p", "No request failed.", class_="note")
    head = ["reason", element("th", "server", class_="words"), element("th", "kind", class_="words"), "requests"]
    body = [
        [element("td", text(str(reason), 300), class_="words"), _words(server), _words(kind), str(count)]
        for (reason, server, kind), count in counted.most_common(_MAX_MESSAGES)
    ]
    left_out = len(counted) - len(body)
    note = element("p", f"{left_out} rarer reasons are left out.", class_="note") if left_out else Markup()
    return join([table([head], body), note])


def parameters(section: Sequence[Shown]) -> Markup:
    """Return each group's parameters, one row per parameter, a column per group where they differ."""
    names = list(dict.fromkeys(name for s in section for name in s.group.parameters))
    values = {name: [_setting(s.group.parameters.get(name)) for s in section] for name in names}
    equal = [name for name, each in values.items() if len(set(each)) == 1]
    parts = [table([["for all", ""]], [[name, values[name][0]] for name in equal], class_="narrow")] if equal else []
    if len(equal) < len(names):
        head = ["", *(element("th", s.look.label) for s in section)]
        parts.append(table([head], [[name, *values[name]] for name in names if name not in equal]))
    return join(parts)


def tile(ledger: Ledger, shown: Shown, alone: Group | None) -> Markup:
    """Return a group's headline: what arrivals do to steady streams, or how a request fares."""
    runs, kinds = shown.group.runs, kinds_of([shown.group])
    lead = next(iter(kinds))
    by_label = {m.label: m for m in MEASURES}
    wanted = [(label, lead) for label in ("ITL p99", "ITL p99 by time", "TPOT p50", "output tokens")]
    wanted += [(label, kinds[-1]) for label in ("TTFT p50", "E2E p95", "SLO met", "goodput")]
    big, under = _headline(ledger, runs, alone, lead)
    facts = []
    for label, kind in wanted:
        measure = by_label[label]
        found = ledger.spread(runs, measure, kind) if measure.reads(kind) and label != under else None
        if found is not None:
            unit = "" if measure.unit == "%" else f" {measure.unit}"
            of_kind = "" if kind == "request" else f" of {kind}"
            facts += [element("dt", f"{label}{of_kind}"), element("dd", number(found.median, measure.unit) + unit)]
    return element(
        "div",
        element("b", shown.look.label),
        element("div", big, class_="big"),
        element("div", under, class_="quiet"),
        element("dl", *facts),
        class_=f"tile c{shown.look.colour}",
    )


def _headline(ledger: Ledger, runs: Sequence[Run], alone: Group | None, kind: str) -> tuple[str, str]:
    by_label = {m.label: m for m in MEASURES}
    if alone is not None:
        paired = pairs(alone.runs, runs)
        ratios = [ledger.ratio(paired, m, "steady") for m in (ITL_P99, ITL_P99_BY_TIME)]
        big, by_time = (times(r.median if r else None) for r in ratios)
        return big, f"steady ITL p99, {ARRIVALS} / {ALONE}; weighed by time {by_time}"
    # A bound on the whole answer is what such a workload is about.
    label = "TPOT p50" if runs[0].slo.e2e_s is None and ledger.spread(runs, by_label["TPOT p50"], kind) else "E2E p95"
    found = ledger.spread(runs, by_label[label], kind)
    return (f"{number(found.median)} ms" if found else MISSING), label


def _summary_row(ledger: Ledger, shown: Shown, kind: str, measures: Sequence[Measure]) -> list[str]:
    each: list[Figures] = [ledger.figures(run, kind) for run in shown.group.runs]
    num_sent, num_failed = sum(f.num_requests for f in each), sum(f.num_errors for f in each)
    cells = [_cell(ledger.spread(shown.group.runs, m, kind), m.unit) for m in measures]
    return [shown.chip, str(num_sent), _warned(str(num_failed), num_failed > 0), *cells]


def _phase_row(ledger: Ledger, paired: Sequence[tuple[Run, Run]], measures: Sequence[Measure]) -> list[str]:
    cells: list[str] = [element("td", element("b", f"{ARRIVALS} / {ALONE}"), class_="words"), "", ""]
    for measure in measures:
        ratio = ledger.ratio(paired, measure, "steady") if measure.has_ratio else None
        small = element("small", times_extent(ratio))
        cells.append(element("td", element("b", times(ratio.median)), small) if ratio else "")
    return cells


def _percentile_cells(each: Sequence[Quantiles]) -> list[str]:
    medians = [spread(getattr(q, name) for q in each) for name in ("p50_ms", "p90_ms", "p95_ms", "p99_ms", "max_ms")]
    return [f"{sum(q.num_values for q in each):,}", *(number(s.median) if s else MISSING for s in medians)]


def _comparison_row(ledger: Ledger, case: Case, servers: Sequence[str], measure: Measure, kind: str) -> list[str]:
    by_server = {g.server: g for g in case.groups}
    first = by_server.get(servers[0])
    arrow = "↓" if measure.is_lower_better else "↑"
    of_kind = "" if kind == "request" else f"{kind} "
    unit = f", {measure.unit}" if measure.unit in ("ms", "/s") else ""
    cells: list[str] = [f"{of_kind}{measure.label}{unit} {arrow}"]
    for position, server in enumerate(servers):
        group = by_server.get(server)
        cells.append(_cell(ledger.spread(group.runs, measure, kind), measure.unit) if group else MISSING)
        if position:
            ratio = None
            if group is not None and first is not None and measure.has_ratio:
                ratio = ledger.ratio(pairs(first.runs, group.runs), measure, kind)
            cells.append(_ratio_cell(ratio, measure))
    return cells


def _ratio_cell(ratio: Spread | None, measure: Measure) -> Markup:
    if ratio is None:
        return Markup("<td></td>")
    is_equal, is_better = ratio.median == 1, (ratio.median < 1) == measure.is_lower_better
    verdict = "equal" if is_equal else "better" if is_better else "worse"
    class_ = None if is_equal else "good" if is_better else "bad"
    words = element("span", f"{times(ratio.median)} {verdict}", class_=class_)
    return element("td", words, element("small", times_extent(ratio)), class_="words")


def _heading(measure: Measure) -> Markup:
    arrow = "↓" if measure.is_lower_better else "↑"
    unit = measure.unit if measure.unit in ("ms", "/s") else ""
    return element("th", measure.label, element("small", f"{unit} {arrow}".strip()))


def _cell(found: Spread | None, unit: str) -> Markup:
    if found is None:
        return element("td", MISSING)
    return element("td", number(found.median, unit), element("small", extent(found, unit)))


def _setting(value: float | int | str | None) -> str:
    return MISSING if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _words(words: str) -> Markup:
    return element("td", words, class_="words")


def _warned(words: str, is_bad: bool) -> Markup:
    return element("td", words, class_="bad" if is_bad else None)
