"""The report's list of requests, run by run: all of them, or those that a reader would look for.

Of more requests than fit, a run shows every failed one as long as they fill at most half of the room, then the slowest
by TTFT, by worst gap and by E2E, and fills the rest with others evenly over time. So the extremes are always there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.figures import met
from bench.html_markup import Markup, details, element, table, text
from bench.html_tables import Shown
from bench.numerals import MISSING, number
from bench.records import Record, Run

# All rows of a report together: at about 250 bytes each they stay under half a megabyte.
_MAX_ROWS = 1800
_MIN_ROWS = 12
_SLOWEST_SHARE = 8  # an eighth of the room for each way of being slow


def requests(section: Sequence[Shown], num_runs: int) -> Markup:
    """Return one folded table per run.

    Args:
        section: the groups whose runs are listed.
        num_runs: how many runs the whole report lists; they share the room.
    """
    room = max(_MAX_ROWS // max(num_runs, 1), _MIN_ROWS)
    parts = [_run_table(shown, run, room) for shown in section for run in shown.group.runs]
    return details("Requests, one by one", *parts)


def shown_records(records: Sequence[Record], room: int) -> list[Record]:
    """Return at most `room` records in the order of sending, by the rule at the top of this module."""
    ordered = sorted(records, key=lambda r: r.started_s)
    if len(ordered) <= room:
        return ordered
    kept = set(_evenly([n for n, r in enumerate(ordered) if r.error is not None], room // 2))
    for slowness in (_ttft_s, _worst_gap_s, _e2e_s):
        kept.update(_slowest(ordered, slowness, room // _SLOWEST_SHARE))
    kept.update(_evenly([n for n in range(len(ordered)) if n not in kept], room - len(kept)))
    return [ordered[n] for n in sorted(kept)]


def _run_table(shown: Shown, run: Run, room: int) -> Markup:
    measured = run.measured()
    listed = shown_records(measured, room)
    summary = f"{shown.look.label}, seed {run.seed}: {len(measured):,} requests"
    note = Markup()
    if len(listed) < len(measured):
        summary += f", {len(listed):,} of them listed"
        words = "Listed: failed ones (up to half), the slowest by TTFT, worst gap and E2E, others evenly over time."
        note = element("p", words, class_="note")
    head = ["request", element("th", "kind", class_="words"), "sent, s", "prompt", "output", "TTFT, ms", "TPOT, ms"]
    head += ["worst gap, ms", "E2E, ms", element("th", "result", class_="words")]
    return details(summary, note, table([head], (_row(r, run) for r in listed)))


def _row(record: Record, run: Run) -> list[str]:
    prompt = str(record.planned_prompt_tokens)
    if record.num_prompt_tokens not in (None, record.planned_prompt_tokens):
        prompt = f"{record.num_prompt_tokens} (planned {prompt})"
    tpot_s = record.tpot_s
    return [
        text(record.request_id, 48),
        element("td", record.kind, class_="words"),
        f"{record.started_s:.2f}",
        prompt,
        str(record.num_output_tokens),
        number(_ttft_s(record) * 1e3) if record.chunk_s else MISSING,
        number(tpot_s * 1e3) if tpot_s is not None else MISSING,
        number(_worst_gap_s(record) * 1e3) if len(record.chunk_s) > 1 else MISSING,
        number(record.e2e_s * 1e3),
        _result(record, run),
    ]


def _result(record: Record, run: Run) -> Markup:
    if record.error is not None:
        return element("td", text(record.error, 60), class_="words bad")
    missed = [name.replace("_", " ") for name, is_met in met(record, run.slo).items() if not is_met]
    return element("td", f"missed {', '.join(missed)}" if missed else "ok", class_="words")


def _slowest(records: Sequence[Record], slowness: Callable[[Record], float], count: int) -> list[int]:
    good = [n for n, r in enumerate(records) if r.error is None]
    return sorted(good, key=lambda n: slowness(records[n]), reverse=True)[:count]


def _evenly(numbers: Sequence[int], count: int) -> list[int]:
    if len(numbers) <= count:
        return list(numbers)
    return [numbers[n * len(numbers) // count] for n in range(count)]


def _ttft_s(record: Record) -> float:
    return record.ttft_s or 0.0


def _worst_gap_s(record: Record) -> float:
    return max(record.gaps_s, default=0.0)


def _e2e_s(record: Record) -> float:
    return record.e2e_s
