"""Scales and axes of the report's charts: from values to pixels, and the ticks that a reader can take in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.html_markup import Markup, element, join
from bench.numerals import duration

# From many ticks within a decade to one: the first that is few enough is taken.
_STEPS = (
    (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9),
    (1, 1.5, 2, 3, 4, 5, 6, 8),
    (1, 2, 5),
    (1, 3),
    (1,),
)


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a chart's plot lies within its picture, in pixels."""

    width: float
    height: float
    left: float = 52
    top: float = 18
    right: float = 16
    bottom: float = 42

    @property
    def x_end(self) -> float:
        """Right edge of the plot."""
        return self.width - self.right

    @property
    def y_end(self) -> float:
        """Lower edge of the plot."""
        return self.height - self.bottom


@dataclass(frozen=True, slots=True)
class LogScale:
    """Milliseconds on a logarithmic axis between two pixels; what lies outside is drawn at the edge."""

    low_ms: float
    high_ms: float
    start: float
    end: float

    @classmethod
    def around(cls, least_ms: float, greatest_ms: float, start: float, end: float) -> LogScale:
        """Return a scale with some air around the values; at least a factor of two, at least a microsecond."""
        low_ms = max(least_ms, 1e-3)
        high_ms = max(greatest_ms, low_ms)
        spare = max(1.12, math.sqrt(2 * low_ms / high_ms))
        return cls(low_ms / spare, high_ms * spare, start, end)

    def at(self, value_ms: float) -> float:
        """Return a value's pixel."""
        inside = min(max(value_ms, self.low_ms), self.high_ms)
        share = math.log(inside / self.low_ms) / math.log(self.high_ms / self.low_ms)
        return self.start + share * (self.end - self.start)

    def ticks(self, max_ticks: int) -> list[float]:
        """Return round values within the scale, at most this many."""
        decades = range(math.floor(math.log10(self.low_ms)), math.ceil(math.log10(self.high_ms)) + 1)
        found: list[float] = []
        for steps in _STEPS:
            found = [v for d in decades for s in steps if self.low_ms <= (v := float(f"{s}e{d}")) <= self.high_ms]
            if len(found) <= max_ticks:
                return found
        return found[:: math.ceil(len(found) / max_ticks)]


@dataclass(frozen=True, slots=True)
class LinearScale:
    """Values from 0 to `high` between two pixels."""

    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Return a value's pixel; what lies outside is drawn at the edge."""
        return self.start + min(max(value / self.high, 0.0), 1.0) * (self.end - self.start)

    def ticks(self, max_ticks: int) -> list[float]:
        """Return round values from 0 on, at most this many and one."""
        rough = self.high / max_ticks
        decade = 10.0 ** math.floor(math.log10(rough))
        step = next(s * decade for s in (1, 2, 5, 10) if s * decade >= rough)
        return [n * step for n in range(int(self.high / step + 1e-9) + 1)]


@dataclass(frozen=True, slots=True)
class TailScale:
    """Shares from 0 to 1 on an axis that gives each further nine equal room: 0, 90 %, 99 %, 99.9 %.

    A plain axis would squeeze the slowest hundredth, which this project is about, into one hundredth of the height.
    """

    decades: int
    start: float
    end: float

    def at(self, share: float) -> float:
        """Return a share's pixel; 1 lies at the end."""
        stretched = -math.log10(1 - share * (1 - 10.0**-self.decades)) / self.decades
        return self.start + stretched * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Return shares and their words."""
        known = ((0.0, "0 %"), (0.5, "50 %"), (0.9, "90 %"), (0.99, "99 %"), (0.999, "99.9 %"))
        return [*known[: self.decades + 1], (1.0, "max")]


def picture(frame: Frame, words: str, parts: Iterable[Markup]) -> Markup:
    """Return a chart's SVG, which scales with the page and scrolls where that would make it too small to read."""
    drawn = element(
        "svg",
        *parts,
        viewBox=f"0 0 {frame.width:g} {frame.height:g}",
        role="img",
        aria_label=words,
        style=f"min-width:{0.62 * frame.width + 60:.0f}px",
    )
    return element("div", drawn, class_="scroll")


def time_axis(frame: Frame, scale: LogScale, title: str) -> Markup:
    """Return the lower axis of a chart over milliseconds: grid, ticks and title."""
    parts = []
    for value in scale.ticks(8):
        x = scale.at(value)
        parts.append(element("line", x1=x, x2=x, y1=frame.top, y2=frame.y_end, class_="grid"))
        parts.append(_words(x, frame.y_end + 17, _tick(value), "middle"))
    middle = (frame.left + frame.x_end) / 2
    parts.append(_words(middle, frame.height - 5, title, "middle", "axis"))
    return join(parts)


def share_axis(frame: Frame, scale: TailScale) -> Markup:
    """Return the left axis of a distribution."""
    return _left_axis(frame, [(scale.at(share), words) for share, words in scale.ticks()])


def gap_axis(frame: Frame, scale: LogScale, max_ticks: int) -> Markup:
    """Return the left axis of a timeline."""
    return _left_axis(frame, [(scale.at(value), _tick(value)) for value in scale.ticks(max_ticks)])


def window_axis(frame: Frame, scale: LinearScale, *, has_words: bool) -> Markup:
    """Return the lower axis of a timeline in seconds; panels above others have ticks without words."""
    parts = []
    for value in scale.ticks(12):
        x = scale.at(value)
        parts.append(element("line", x1=x, x2=x, y1=frame.y_end, y2=frame.y_end + 4, class_="edge"))
        if has_words:
            parts.append(_words(x, frame.y_end + 18, f"{value:g} s", "middle"))
    return join(parts)


def _left_axis(frame: Frame, ticks: Sequence[tuple[float, str]]) -> Markup:
    parts = []
    for y, words in ticks:
        parts.append(element("line", x1=frame.left, x2=frame.x_end, y1=y, y2=y, class_="grid"))
        parts.append(_words(frame.left - 7, y + 4, words, "end"))
    return join(parts)


def _words(x: float, y: float, words: str, anchor: str, class_: str = "tick") -> Markup:
    return element("text", words, x=x, y=y, text_anchor=anchor, class_=class_)


def _tick(value_ms: float) -> str:
    value, unit = duration(value_ms).split(" ")
    return f"{float(value):g} {unit}"
