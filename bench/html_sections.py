"""One workload's part of the report: what is shown in which order, with the words that say how to read it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench.figures import Floats, gaps_in_window
from bench.html_charts import Curve, Look, distribution
from bench.html_markup import Markup, element
from bench.html_requests import requests
from bench.html_style import NUM_COLOURS, NUM_DASHES
from bench.html_tables import Shown, attainment, comparison, errors, parameters, percentiles, summaries, tile, trust
from bench.html_timeline import Arrival, Panel, timeline
from bench.records import Run
from bench.spreads import ALONE, ARRIVALS, Ledger, alone_of, cases, group_runs, variant, varying

_MAX_PANELS = 12
# Of a prompt that arrives beside steady streams the first token counts, of a steady stream its gaps.
_WITHOUT_TTFT, _WITHOUT_GAPS = "steady", "arrival"


def section(ledger: Ledger, workload: str, runs: Sequence[Run], servers: Sequence[str], num_runs: int) -> Markup:
    """Return the part of one workload.

    Args:
        ledger: computes the figures.
        workload: its name.
        runs: its runs, at least one.
        servers: all servers of the report, in the order that gives them their colours.
        num_runs: runs of the whole report, which share the room for single requests.
    """
    shown = show(runs, servers)
    groups = [s.group for s in shown]
    present = [server for server in servers if any(g.server == server for g in groups)]
    # A group alone is the baseline of the one with arrivals: it has no headline of its own then.
    leads = [s for s in shown if s.group.phase != ALONE] or shown
    tiles = [tile(ledger, s, alone_of(s.group, groups)) for s in leads]
    against: list[Markup] = []
    if len(present) > 1:
        against = [_title(f"Ratios to {present[0]}"), comparison(ledger, cases(runs), present), _note(_RATIO_WORDS)]
    return element(
        "section",
        element("h2", workload),
        element("div", *tiles, class_="tiles"),
        *_charts(ledger, shown),
        _title("Medians"),
        *summaries(ledger, shown),
        _note(_MEDIAN_WORDS),
        percentiles(ledger, shown),
        *against,
        _title("Service level"),
        attainment(ledger, shown),
        _title("How far to trust this"),
        trust(ledger, shown),
        _note(_TRUST_WORDS),
        _title("Failures"),
        errors(runs),
        _title("Parameters"),
        parameters(shown),
        requests(shown, num_runs),
    )


def show(runs: Sequence[Run], servers: Sequence[str]) -> list[Shown]:
    """Return the groups of one workload, server by server, each with a label, a colour and a dash of its own."""
    groups = sorted(group_runs(runs), key=lambda g: (servers.index(g.server), g.phase or ""))
    names = varying(groups)
    words = [variant(g.phase, g.parameters, names) for g in groups]
    # Solid is what the workload is about: with arrivals, where there is such a phase.
    dashes = {w: n for n, w in enumerate(sorted(dict.fromkeys(words), key=lambda w: not w.startswith(ARRIVALS)))}
    shown = []
    for group, variant_words in zip(groups, words, strict=True):
        turn, colour = divmod(servers.index(group.server), NUM_COLOURS)
        label = f"{group.server}, {variant_words}" if variant_words else group.server
        shown.append(Shown(group, Look(label, colour, (dashes[variant_words] + turn) % NUM_DASHES)))
    return shown


def _charts(ledger: Ledger, shown: Sequence[Shown]) -> list[Markup]:
    bounds = {s.group.runs[0].slo for s in shown}
    slo = bounds.pop() if len(bounds) == 1 else None
    ttft = [Curve(s.look, v) for s in shown if len(v := _ttfts_s(s.group.runs))]
    gaps = [Curve(s.look, v) for s in shown if len(v := np.concatenate([_stream_gaps(r)[1] for r in s.group.runs]))]
    drawn = []
    if ttft:
        drawn.append(distribution("Time to first token (TTFT)", ttft, slo.ttft_s if slo else None))
    if gaps:
        drawn.append(distribution("Gaps between tokens (ITL)", gaps, slo.itl_p99_s if slo else None))
    if not drawn:
        return []
    parts = [_title("Distributions"), element("div", *drawn, class_="charts"), _note(_DISTRIBUTION_WORDS)]
    if gaps:
        panels = [_panel(ledger, s) for s in shown if any(len(_stream_gaps(r)[1]) for r in s.group.runs)]
        left_out = len(panels) - _MAX_PANELS
        more = _ARRIVAL_WORDS if any(p.arrivals for p in panels) else ""
        more += f" {left_out} further timelines are left out." if left_out > 0 else ""
        parts += [_title("Gaps over time"), timeline(panels[:_MAX_PANELS], slo.itl_p99_s if slo else None)]
        parts.append(_note(_TIMELINE_WORDS + more))
    return parts


def _panel(ledger: Ledger, shown: Shown) -> Panel:
    """Return the timeline of the group's middle run by ITL p99, of two middle ones the better."""
    kinds = [kind for kind in shown.group.kinds if kind != _WITHOUT_GAPS]
    with_gaps = [run for run in shown.group.runs if len(_stream_gaps(run)[1])]
    ranked = sorted(with_gaps, key=lambda run: ledger.figures(run, kinds[0]).itl.p99_ms or 0.0)
    run = ranked[(len(ranked) - 1) // 2]
    ends_s, gaps_s = _stream_gaps(run)
    arrivals = tuple(
        Arrival(r.started_s, r.chunk_s[0] if r.chunk_s else None, r.planned_prompt_tokens)
        for r in sorted(run.measured("arrival"), key=lambda r: r.started_s)
    )
    middle = f", the middle one of {len(ranked)} by ITL p99" if len(ranked) > 1 else ""
    return Panel(shown.look, f"run with seed {run.seed}{middle}", ends_s, gaps_s, arrivals, run.duration_s)


def _stream_gaps(run: Run) -> tuple[Floats, Floats]:
    """Return when each gap of the run's streams ended and how long it was, in seconds."""
    streams = [r for r in run.measured() if r.error is None and r.kind != _WITHOUT_GAPS and len(r.chunk_s) > 1]
    if not streams:
        return np.empty(0), np.empty(0)
    gaps = [gaps_in_window(r) for r in streams]
    ends = [np.asarray(r.chunk_s[len(r.chunk_s) - len(g) :]) for r, g in zip(streams, gaps, strict=True)]
    return np.concatenate(ends), np.concatenate(gaps)


def _ttfts_s(runs: Sequence[Run]) -> Floats:
    records = [r for run in runs for r in run.measured() if r.error is None and r.kind != _WITHOUT_TTFT]
    return np.asarray([r.ttft_s for r in records if r.ttft_s is not None])


def _title(words: str) -> Markup:
    return element("h3", words)


def _note(words: str) -> Markup:
    return element("p", words, class_="note")


_MEDIAN_WORDS = (
    "Median over runs, lowest–highest below where they differ. ↓ lower is better, ↑ higher is better. Failed requests "
    "count as missed and in no latency. Output and requests per second count what came inside the window. ITL counts "
    "gaps, one per chunk however many tokens it carries; “by time” weighs each gap by its length, so that a fast "
    "stream does not hide a stall among its many short gaps. TPOT divides by tokens."
)
_RATIO_WORDS = (
    "Each ratio is the median over pairs of runs with the same seed and turn, lowest–highest beside it: a machine "
    "drifts, so only runs made in turns compare."
)
_DISTRIBUTION_WORDS = (
    "All runs together. A point (x, y) says: y of all values were at most x. The vertical axis is stretched, each "
    "further nine has the same height, because the slowest hundredth is what a reader notices. Circles mark p50 and "
    "p99. What is far shorter than all medians is drawn at the left edge."
)
_TIMELINE_WORDS = (
    "Each bar is one gap, from the chunk before it to the chunk that ended it, at the height of its length: lower and "
    "shorter is better. Of a run with many gaps, the longest that ends in each column is drawn and a thin line "
    "shows the median."
)
_ARRIVAL_WORDS = " ▼ marks a prompt that arrives; the shade lasts until its first token."
_TRUST_WORDS = (
    "Worst run of each. The load generator ran on the same machine or network as the reader of the streams would: the "
    "more of one core it used and the later its loop woke, the more of the latencies is its own. “Sent late” is known "
    "for requests with a planned time. A prompt is off plan where the server counted other than the planned tokens. A "
    "p99 of fewer than 100 values lies close to their maximum."
)
