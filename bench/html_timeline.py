"""What every gap of a run was over the time of its window, with the prompts that arrived meanwhile.

    gap ─► a bar from its start to its end, at the height of its length: a dot where it is short, a beam where it stalls

A run of more than `_ALL_GAPS` gaps is drawn column by column, `_COLUMNS` over the width: of all gaps that end in a
column its longest stays, so that no stall is ever lost, and a line shows the median of them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.figures import Floats
from bench.html_axes import Frame, LinearScale, LogScale, gap_axis, picture, window_axis
from bench.html_charts import Look
from bench.html_markup import Markup, element, join
from bench.numerals import duration

_ALL_GAPS = 1500
_COLUMNS = 240
_MAX_ARRIVALS = 300


@dataclass(frozen=True, slots=True)
class Arrival:
    """A prompt that came while others streamed; times in the window's seconds, None where no token came."""

    sent_s: float
    first_token_s: float | None
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Panel:
    """One run's timeline.

    Attributes:
        words: which run this is, for the corner.
        ends_s: when each gap ended, in the window's time.
        gaps_s: how long it was; as many as `ends_s`.
        duration_s: length of the measured window.
    """

    look: Look
    words: str
    ends_s: Floats
    gaps_s: Floats
    arrivals: tuple[Arrival, ...]
    duration_s: float


@dataclass(frozen=True, slots=True)
class _Column:
    number: int
    start_s: float
    end_s: float
    gaps_s: Floats
    longest_end_s: float


def timeline(panels: Sequence[Panel], bound_s: float | None) -> Markup:
    """Draw each run's gaps over the time of its window, one panel below the other on equal scales.

    Args:
        panels: at least one, with at least one gap among them.
        bound_s: the SLO's bound on gaps, drawn as a horizontal line, or None.
    """
    gaps_ms = np.concatenate([p.gaps_s for p in panels]) * 1e3
    # Two chunks that came in one packet have next to no gap: they stay on the lower edge and leave the room to others.
    least_ms = max(float(gaps_ms.min()), 0.2 * float(np.median(gaps_ms)))
    end_s = max(max(p.duration_s, float(p.ends_s.max(initial=0.0)), 1e-3) for p in panels)
    drawn = []
    for position, panel in enumerate(panels):
        is_last = position == len(panels) - 1
        frame = Frame(1180, 214 if is_last else 190, top=32, bottom=34 if is_last else 10)
        scale = LogScale.around(least_ms, float(gaps_ms.max()), frame.y_end, frame.top)
        window = LinearScale(end_s, frame.left, frame.x_end)
        arrivals = _thinned(panel.arrivals)
        parts = [
            gap_axis(frame, scale, 5),
            window_axis(frame, window, has_words=is_last),
            _heading(frame, panel),
            _bound(frame, scale, bound_s),
            *(_shade(frame, window, each) for each in arrivals),
            *_gaps(frame, panel, scale, window),
            *(_arrival(frame, window, each) for each in arrivals),
        ]
        drawn.append(picture(frame, f"Gaps over time: {panel.look.label}", parts))
    return element("figure", *drawn, class_="wide")


def _heading(frame: Frame, panel: Panel) -> Markup:
    chip = element("rect", x=frame.left, y=9, width=12, height=12, rx=2, class_=f"chip c{panel.look.colour}")
    name = element("text", panel.look.label, x=frame.left + 19, y=19, class_="name")
    return join([chip, name, element("text", panel.words, x=frame.x_end, y=19, text_anchor="end", class_="tick")])


def _bound(frame: Frame, scale: LogScale, bound_s: float | None) -> Markup:
    if bound_s is None or not scale.low_ms < bound_s * 1e3 < scale.high_ms:
        return Markup()
    y, words = scale.at(bound_s * 1e3), f"SLO on gaps, p99: {duration(bound_s * 1e3)}"
    line = element("line", element("title", words), x1=frame.left, x2=frame.x_end, y1=y, y2=y, class_="bound")
    return join([line, element("text", "SLO", x=frame.x_end - 3, y=y - 4, text_anchor="end", class_="tick")])


def _shade(frame: Frame, window: LinearScale, arrival: Arrival) -> Markup:
    if arrival.first_token_s is None:
        return Markup()
    x, height = window.at(arrival.sent_s), frame.y_end - frame.top
    return element(
        "rect", x=x, y=frame.top, width=window.at(arrival.first_token_s) - x, height=height, class_="prefill"
    )


def _arrival(frame: Frame, window: LinearScale, arrival: Arrival) -> Markup:
    x = window.at(arrival.sent_s)
    words = f"prompt of {arrival.num_prompt_tokens} tokens sent at {arrival.sent_s:.2f} s"
    if arrival.first_token_s is not None:
        words += f", first token after {duration((arrival.first_token_s - arrival.sent_s) * 1e3)}"
    return element(
        "g",
        element("title", words),
        element("line", x1=x, x2=x, y1=frame.top, y2=frame.y_end, class_="arrival"),
        element("path", d=f"M{x - 5:.1f} {frame.top - 7:.1f}h10l-5 7z", class_="arrow"),
    )


def _thinned(arrivals: Sequence[Arrival]) -> Sequence[Arrival]:
    return arrivals[:: -(-len(arrivals) // _MAX_ARRIVALS)] if arrivals else ()


def _gaps(frame: Frame, panel: Panel, scale: LogScale, window: LinearScale) -> list[Markup]:
    """Draw the gaps, the medians where not all are drawn, and columns that tell their figures under the pointer."""
    columns = _columns(panel, window.high)
    if len(panel.gaps_s) <= _ALL_GAPS:
        shown = list(zip(panel.ends_s.tolist(), panel.gaps_s.tolist(), strict=True))
        medians = Markup()
    else:
        shown = [(c.longest_end_s, float(c.gaps_s.max())) for c in columns]
        medians = _medians(columns, scale, window)
    bars = []
    for end_s, gap_s in shown:
        x = window.at(end_s - gap_s)
        bars.append(f"M{x:.1f} {scale.at(gap_s * 1e3):.1f}h{max(window.at(end_s) - x, 0.01):.2f}")
    return [
        element("path", d=Markup("".join(bars)), class_=f"bars c{panel.look.colour}"),
        medians,
        *(_hover(frame, window, c) for c in columns),
    ]


def _columns(panel: Panel, end_s: float) -> list[_Column]:
    of_gap = np.minimum(panel.ends_s / end_s * _COLUMNS, _COLUMNS - 1).astype(np.int64)
    order = np.argsort(of_gap, kind="stable")
    numbers, starts = np.unique(of_gap[order], return_index=True)
    columns = []
    for number, members in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
        gaps_s = panel.gaps_s[members]
        longest = members[int(np.argmax(gaps_s))]
        step_s = end_s / _COLUMNS
        columns.append(_Column(number, number * step_s, (number + 1) * step_s, gaps_s, float(panel.ends_s[longest])))
    return columns


def _medians(columns: Sequence[_Column], scale: LogScale, window: LinearScale) -> Markup:
    steps, last_number = [], -2
    for column in columns:
        x, y = window.at(column.start_s), scale.at(float(np.median(column.gaps_s)) * 1e3)
        go = "L" if column.number == last_number + 1 else "M"
        steps.append(f"{go}{x:.1f} {y:.1f}h{window.at(column.end_s) - x:.1f}")
        last_number = column.number
    return element("path", d=Markup("".join(steps)), class_="median")


def _hover(frame: Frame, window: LinearScale, column: _Column) -> Markup:
    longest, middle = (duration(float(pick(column.gaps_s)) * 1e3) for pick in (np.max, np.median))
    words = f"{column.start_s:.1f} s: longest gap {longest}, median {middle}, {len(column.gaps_s)} gaps"
    x = window.at(column.start_s)
    width, height = window.at(column.end_s) - x, frame.y_end - frame.top
    return element("rect", element("title", words), x=x, y=frame.top, width=width, height=height, class_="hover")
