"""Distributions as lines: one per server and variant, each drawn through at most `_CURVE_POINTS` of its percentiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.figures import Floats
from bench.html_axes import Frame, LogScale, TailScale, picture, share_axis, time_axis
from bench.html_markup import Markup, element, join
from bench.numerals import duration

_CURVE_POINTS = 240


@dataclass(frozen=True, slots=True)
class Look:
    """How the lines of one server and variant look: a colour of the style sheet, and a dash pattern."""

    label: str
    colour: int
    dash: int

    @property
    def classes(self) -> str:
        """Classes of the style sheet."""
        return f"c{self.colour} d{self.dash}"


@dataclass(frozen=True, slots=True)
class Curve:
    """The values of one line of a distribution, in seconds, at least one."""

    look: Look
    values_s: Floats


def distribution(title: str, curves: Sequence[Curve], bound_s: float | None) -> Markup:
    """Draw cumulative distributions over a logarithmic time axis, and a legend that tells each median and p99.

    Args:
        title: what is distributed.
        curves: one line each, at least one.
        bound_s: the SLO's bound, drawn as a vertical line, or None.
    """
    frame = Frame(600, 340)
    # Two chunks that came in one packet have next to no gap: they stay on the left edge and leave the room to others.
    least_s = min(max(float(c.values_s.min()), 0.05 * float(np.median(c.values_s))) for c in curves)
    greatest_s = max(float(c.values_s.max()) for c in curves)
    scale = LogScale.around(least_s * 1e3, greatest_s * 1e3, frame.left, frame.x_end)
    decades = 4 if max(len(c.values_s) for c in curves) >= 1000 else 3
    shares = TailScale(decades, frame.y_end, frame.top)
    parts = [time_axis(frame, scale, title), share_axis(frame, shares), _bound(frame, scale, bound_s)]
    parts += [_curve(curve, scale, shares) for curve in curves]
    drawn = picture(frame, f"Distribution of {title}", parts)
    return element("figure", element("figcaption", title), drawn, _legend(curves))


def swatch(look: Look) -> Markup:
    """Draw the short line that stands for a look in legends."""
    line = element("line", x1=2, x2=30, y1=6, y2=6, class_=f"curve {look.classes}")
    return element("svg", line, viewBox="0 0 32 12", width=32, height=12, aria_hidden="true", class_="swatch")


def _curve(curve: Curve, scale: LogScale, shares: TailScale) -> Markup:
    # Points lie evenly on the stretched axis, so that the tail keeps its detail; the last one is the maximum.
    stretched = np.linspace(0.0, 1.0, min(_CURVE_POINTS, 4 * len(curve.values_s) + 2))
    whole = 1 - 10.0**-shares.decades
    at_shares = np.minimum((1 - 10.0 ** (-shares.decades * stretched)) / whole, 1.0)
    values_ms = np.percentile(curve.values_s, at_shares * 100) * 1e3
    points = [f"{scale.at(v):.1f} {shares.at(s):.1f}" for v, s in zip(values_ms, at_shares, strict=True)]
    label = curve.look.label
    parts = [
        element(
            "path", element("title", label), d=Markup("M" + "L".join(points)), class_=f"curve {curve.look.classes}"
        ),
    ]
    for share in (0.5, 0.99):
        value_ms = float(np.percentile(curve.values_s, share * 100)) * 1e3
        mark = element("title", f"{label}: p{share * 100:.0f} {duration(value_ms)}")
        x, y = scale.at(value_ms), shares.at(share)
        parts.append(element("circle", mark, cx=x, cy=y, r=4.5, class_=f"mark c{curve.look.colour}"))
    return element("g", *parts)


def _legend(curves: Sequence[Curve]) -> Markup:
    entries = []
    for curve in curves:
        p50, p99 = (duration(float(v) * 1e3) for v in np.percentile(curve.values_s, (50, 99)))
        figures = element("span", f"p50 {p50}, p99 {p99}, {len(curve.values_s):,} values", class_="quiet")
        entries.append(element("li", swatch(curve.look), element("span", curve.look.label), figures))
    return element("ul", *entries, class_="legend")


def _bound(frame: Frame, scale: LogScale, bound_s: float | None) -> Markup:
    if bound_s is None or not scale.low_ms < bound_s * 1e3 < scale.high_ms:
        return Markup()
    x = scale.at(bound_s * 1e3)
    is_far_right = x > frame.x_end - 90
    words = element(
        "text",
        f"SLO {duration(bound_s * 1e3)}",
        x=x + (-5 if is_far_right else 5),
        y=frame.y_end - 6,
        text_anchor="end" if is_far_right else "start",
        class_="tick",
    )
    return join([element("line", x1=x, x2=x, y1=frame.top, y2=frame.y_end, class_="bound"), words])
