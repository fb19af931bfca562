"""What is measured, in what order, and what became of it.

    Section ─ a share of the clock ─ Point, Point, ...   each ─► measured, skipped or failed, never dropped

1. Sections run in order of importance. Each may use its own share of the time and what those before it left over.
2. A point begins only if the time that it needs is still there; else it is skipped with that reason.
3. A point that cannot be measured says why (`Skip`); one that breaks is noted as failed, and the run goes on.
4. After every point `on_change` gets what there is, so that a run that is killed keeps it.
5. A point that takes the whole device down with it ends the run (`DeviceLost`): what is left needs a new process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

Figure: TypeAlias = float | int | str | bool | list[dict[str, float | int | str]] | None
Figures: TypeAlias = dict[str, Figure]
Status = Literal["measured", "skipped", "failed"]

NO_TIME = "no time left"
_SHOWN_ERROR_CHARS = 400


class Skip(Exception):
    """A point cannot be measured here; the message says why."""


class DeviceLost(Exception):
    """After the last point nothing can be computed in this process any more."""


@dataclass(frozen=True, slots=True)
class Point:
    """One thing to measure.

    Attributes:
        keys: what tells it from the others of its section, such as batch and context.
        need_s: about how long it takes; it does not begin with less.
        measure: does it.
    """

    name: str
    keys: Figures
    need_s: float
    measure: Callable[[], Figures]


@dataclass(frozen=True, slots=True)
class Section:
    """Points that belong together.

    Attributes:
        model: of all its points, or "" where there is none.
        share_s: of the whole time.
    """

    name: str
    model: str
    share_s: float
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one point.

    Attributes:
        reason: why there are no figures.
    """

    section: str
    model: str
    name: str
    keys: Figures
    status: Status
    seconds: float = 0.0
    figures: Figures = field(default_factory=dict)
    reason: str = ""


class Clock:
    """The time that a run may take.

    Args:
        budget_s: from now on.
        shares_s: of the sections, in their order. They are scaled to the budget.
    """

    def __init__(self, budget_s: float, shares_s: Sequence[float]) -> None:
        self._end_s = time.monotonic() + budget_s
        scale, kept_s = budget_s / (sum(shares_s) or 1.0), sum(shares_s)
        self._kept_s = []
        for share_s in shares_s:
            kept_s -= share_s
            self._kept_s.append(kept_s * scale)

    def left_s(self, index: int) -> float:
        """Return how long a section may go on: what later ones are promised is not its own."""
        return self._end_s - time.monotonic() - self._kept_s[index]


class Runner:
    """Measures points and keeps what became of them.

    Args:
        say: takes a line of progress.
        on_change: gets all outcomes after each point.
        is_lost: asked after a point that failed, whether the device still works.
        kept: outcomes of an earlier run, whose points are not measured again.

    Attributes:
        outcomes: so far.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        on_change: Callable[[Sequence[Outcome]], None],
        is_lost: Callable[[], bool],
        kept: Sequence[Outcome] = (),
    ) -> None:
        self._say, self._on_change, self._is_lost = say, on_change, is_lost
        self.outcomes = list(kept)

    def run(self, sections: Sequence[Section], budget_s: float) -> None:
        """Measure every point that the budget has time for; raises DeviceLost."""
        done = {(outcome.section, outcome.model, outcome.name) for outcome in self.outcomes}
        left = [
            replace(
                section, points=tuple(p for p in section.points if (section.name, section.model, p.name) not in done)
            )
            for section in sections
        ]
        left = [section for section in left if section.points]
        clock = Clock(budget_s, [section.share_s for section in left])
        for index, section in enumerate(left):
            for point in section.points:
                self._take(section, point, clock.left_s(index))

    def _take(self, section: Section, point: Point, left_s: float) -> None:
        if left_s < point.need_s:
            reason = f"{NO_TIME}: {max(left_s, 0):.0f} s of this section's, about {point.need_s:.0f} s needed"
            outcome = _outcome(section, point, "skipped", reason=reason)
        else:
            self._say(f"{section.name} {section.model} {point.name}".replace("  ", " "))
            outcome = _measured(section, point)
            self._say(f"  {_told(outcome)}")
        self.outcomes.append(outcome)
        self._on_change(self.outcomes)
        if outcome.status == "failed" and self._is_lost():
            raise DeviceLost(outcome.reason)


def _measured(section: Section, point: Point) -> Outcome:
    begin_s = time.monotonic()
    try:
        figures = point.measure()
    except Skip as skip:
        return _outcome(section, point, "skipped", time.monotonic() - begin_s, reason=str(skip))
    except Exception as error:  # noqa: BLE001  one broken point must not cost the machine's time for all others
        words = f"{type(error).__name__}: {error}"[:_SHOWN_ERROR_CHARS]
        return _outcome(section, point, "failed", time.monotonic() - begin_s, reason=words)
    return _outcome(section, point, "measured", time.monotonic() - begin_s, figures)


def _outcome(
    section: Section,
    point: Point,
    status: Status,
    seconds: float = 0.0,
    figures: Figures | None = None,
    reason: str = "",
) -> Outcome:
    return Outcome(section.name, section.model, point.name, point.keys, status, seconds, figures or {}, reason)


def _told(outcome: Outcome) -> str:
    if outcome.status != "measured":
        return f"{outcome.status}: {outcome.reason}"
    shown = [
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
        for k, v in outcome.figures.items()
        if v != "" and _is_short(v)
    ]
    return f"{', '.join(shown)} ({outcome.seconds:.1f} s)"


def _is_short(value: Figure) -> bool:
    return not isinstance(value, list) and not (isinstance(value, str) and len(value) > 40)
