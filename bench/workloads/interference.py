"""`interference`: what a long prompt does to streams that are already running.

    phase "alone"      ──steady──steady──steady──────────────────►  the baseline
    phase "arrivals"   ──steady──▲──steady──▲──steady────────────►  ▲ a long prompt every `every_s`

Both phases have the same streams, which are started again when they end. Their ends are spread out, so that the
streams are not all new at the same moment. No gap is cut off at the end: a stream is watched until its next token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from bench.text import Part
from bench.workloads.plan import Ask, Plan, SteadyStreams, Workload, option, warmup_asks


@dataclass(frozen=True, slots=True)
class Interference(Workload):
    """Steady streams, first alone and then beside long prompts."""

    name: ClassVar[str] = "interference"
    summary: ClassVar[str] = "steady streams alone, then while long prompts arrive"

    streams: int = option(4, "steady streams", low=1)
    steady_prompt_tokens: int = option(32, "tokens in of a steady stream", low=1, is_length=True)
    steady_output_tokens: int = option(1000, "tokens out of a steady stream, which then starts again", low=2)
    long_tokens: int = option(1500, "tokens in of an arriving prompt", low=1, is_length=True)
    long_output_tokens: int = option(4, "tokens out of an arriving prompt", low=1)
    every_s: float = option(10.0, "seconds between arriving prompts", low=0.01)
    window_s: float = option(40.0, "seconds measured in each phase", low=0.1)
    settle_s: float = option(1.0, "seconds that the streams run before each phase")
    drain_s: float = option(120.0, "seconds to wait, after the window, for what is still running", low=0.1)

    def plans(self, seed: int) -> list[Plan]:
        """Return the phase alone and the phase with arrivals."""
        stem = f"{self.stem(seed)} arrivals"
        # The first comes half an interval after the start, so that the last has as long before the end.
        num_arrivals = max(1, round(self.window_s / self.every_s))
        arrivals = tuple(
            Ask(
                f"arrival-{i}",
                (Part(f"{stem} long {i}", self.long_tokens),),
                self.long_output_tokens,
                "arrival",
                (i + 0.5) * self.every_s,
            )
            for i in range(num_arrivals)
        )
        return [self._phase("alone", seed, ()), self._phase("arrivals", seed, arrivals)]

    def warmup(self, seed: int) -> tuple[Ask, ...]:
        """Return as many requests as there are streams, and one long prompt."""
        stem = self.stem(seed)
        long = Ask("warmup-long", (Part(f"{stem} warmup long", self.long_tokens),), 1)
        return (*warmup_asks(stem, self.streams, self.steady_prompt_tokens, self.steady_output_tokens), long)

    def _phase(self, phase: str, seed: int, arrivals: tuple[Ask, ...]) -> SteadyStreams:
        return SteadyStreams(
            phase, self.streams, self._steady(phase, seed), arrivals, self.window_s, self.settle_s, self.drain_s
        )

    def _steady(self, phase: str, seed: int) -> Callable[[int], Ask]:
        stem = f"{self.stem(seed)} {phase}"

        def make(index: int) -> Ask:
            length = self.steady_output_tokens
            if index < self.streams:
                length = max(2, length * (index + 1) // self.streams)
            part = Part(f"{stem} {index}", self.steady_prompt_tokens)
            return Ask(f"steady-{index}", (part,), length, "steady")

        return make
