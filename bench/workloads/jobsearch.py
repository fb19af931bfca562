"""`jobsearch`: a search typed in plain words becomes a short structured query, within a deadline."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from bench.records import Slo
from bench.text import SEARCH, Part, fixed
from bench.workloads.plan import Ask, OpenLoop, Plan, Workload, option, poisson, warmup_asks

_TASK = fixed(SEARCH)


@dataclass(frozen=True, slots=True)
class JobSearch(Workload):
    """Short prompts arriving at random, short answers that someone waits for."""

    name: ClassVar[str] = "jobsearch"
    summary: ClassVar[str] = "short prompts at random times, short answers, p95 within 0.6 s"
    slo: ClassVar[Slo] = Slo(e2e_s=0.6)

    rate: float = option(2.0, "requests a second, arriving at random (Poisson)", low=1e-6)
    requests: int = option(100, "requests in all", low=1)
    prompt_min_tokens: int = option(60, "tokens in, at least", low=1, is_length=True)
    prompt_max_tokens: int = option(120, "tokens in, at most", low=1, is_length=True)
    output_tokens: int = option(40, "tokens out", low=1, is_length=True)

    def plans(self, seed: int) -> list[Plan]:
        """Return one open loop."""
        stem = self.stem(seed)
        rng = random.Random(f"{stem} sizes")
        spread = max(0, self.prompt_max_tokens - self.prompt_min_tokens) + 1
        asks = []
        for i, due_s in enumerate(poisson(stem, self.rate, self.requests)):
            total = self.prompt_min_tokens + int(rng.random() * spread)
            typed = Part(f"{stem} {i}", max(1, total - _TASK.num_tokens))
            asks.append(Ask(f"{i}", (_TASK, typed), self.output_tokens, due_s=due_s))
        return [OpenLoop(tuple(asks))]

    def warmup(self, seed: int) -> tuple[Ask, ...]:
        """Return two requests."""
        return warmup_asks(self.stem(seed), 2, self.prompt_max_tokens, self.output_tokens)
