"""What a workload is: settings that become plans, one plan for each measured window.

1. The command line makes a `Workload` from its fields; `scaled` shrinks its lengths for a small machine.
2. `plans(seed)` gives the windows to measure. A plan is data: which requests, and when or how many at once.
3. The generator writes the texts, plays the plan, and makes a `Run` of it.

Every text is drawn from the seed together with all settings, so that no two runs of one call ever send a prompt that a
server's prefix cache could know from the one before.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from bench.records import Slo
from bench.text import Part
from protocol.errors import ConfigError

T = TypeVar("T")
Parameters = dict[str, float | int | str | None]


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to be sent.

    Attributes:
        due_s: when to send it, in seconds from the start of the window; None in a closed loop.
    """

    request_id: str
    parts: tuple[Part, ...]
    output_tokens: int
    kind: str = "request"
    due_s: float | None = None

    @property
    def prompt_tokens(self) -> int:
        """The prompt's length."""
        return sum(part.num_tokens for part in self.parts)


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """Keeps `concurrency` requests running until all have been sent and answered."""

    asks: tuple[Ask, ...]
    concurrency: int


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Sends each request when it is due, whatever became of the others."""

    asks: tuple[Ask, ...]


@dataclass(frozen=True, slots=True)
class SteadyStreams:
    """Keeps `streams` requests running for `window_s` while others arrive.

    Attributes:
        steady: makes the n-th steady request.
        arrivals: sent when due; the window stays open until each has been answered, or for `drain_s` more.
        settle_s: the streams run for this long before the window opens.
        drain_s: bounds every wait after the window's time is over.
    """

    phase: str
    streams: int
    steady: Callable[[int], Ask]
    arrivals: tuple[Ask, ...]
    window_s: float
    settle_s: float
    drain_s: float


Plan = ClosedLoop | OpenLoop | SteadyStreams


def option(default: T, meaning: str, *, low: float = 0.0, is_length: bool = False) -> T:
    """Declare a setting with its meaning, its lowest value, and whether `--scale` divides it."""
    metadata = {"meaning": meaning, "low": low, "is_length": is_length}
    made: T = field(default=default, metadata=metadata)
    return made


@dataclass(frozen=True, slots=True)
class Workload(ABC):
    """Settings of a workload; its fields are the options on the command line.

    Raises:
        ConfigError: a setting is below its lowest value.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    slo: ClassVar[Slo] = Slo()

    def __post_init__(self) -> None:
        """Check every number against its bound."""
        for item in fields(self):
            value, low = getattr(self, item.name), item.metadata["low"]
            if isinstance(value, int | float) and not (math.isfinite(value) and value >= low):
                raise ConfigError(f"--{item.name.replace('_', '-')}: must be at least {low:g}")

    @abstractmethod
    def plans(self, seed: int) -> list[Plan]:
        """Return what is measured, one plan a run."""

    @abstractmethod
    def warmup(self, seed: int) -> tuple[Ask, ...]:
        """Return requests that are sent together, once and unmeasured, before the first plan."""

    @property
    def parameters(self) -> Parameters:
        """All settings, as a run records them."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value.name if isinstance(value, Path) else value for name, value in values.items()}

    def scaled(self, scale: float) -> Self:
        """Return the workload with every length divided by `scale`, at least one token each."""
        shorter: dict[str, Any] = {
            item.name: max(1, round(getattr(self, item.name) / scale))
            for item in fields(self)
            if item.metadata["is_length"] and getattr(self, item.name)
        }
        return replace(self, **shorter)

    def stem(self, seed: int) -> str:
        """Return what the seeds of all texts begin with."""
        return f"{seed} {self.name} {sorted(self.parameters.items())}"


def warmup_asks(stem: str, num_asks: int, prompt_tokens: int, output_tokens: int) -> tuple[Ask, ...]:
    """Return short requests for before the window: of the workload's size up to 512 tokens in and 16 out."""
    return tuple(
        Ask(f"warmup-{i}", (Part(f"{stem} warmup {i}", min(prompt_tokens, 512)),), min(output_tokens, 16))
        for i in range(num_asks)
    )


def poisson(stem: str, rate: float, num_arrivals: int) -> list[float]:
    """Return arrival times in seconds of a Poisson process with `rate` arrivals a second."""
    rng, now_s, found = random.Random(f"{stem} arrivals"), 0.0, []
    for _ in range(num_arrivals):
        now_s -= math.log(1.0 - rng.random()) / rate
        found.append(now_s)
    return found
