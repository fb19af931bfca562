"""`closed`: a fixed number of requests at once, all of one size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bench.text import Part
from bench.workloads.plan import Ask, ClosedLoop, Plan, Workload, option, warmup_asks


@dataclass(frozen=True, slots=True)
class Closed(Workload):
    """A closed loop: the next request is sent when one has been answered."""

    name: ClassVar[str] = "closed"
    summary: ClassVar[str] = "a fixed number of requests at once, exact lengths in and out"

    concurrency: int = option(4, "requests at once", low=1)
    requests: int = option(16, "requests in all", low=1)
    prompt_tokens: int = option(512, "tokens in", low=1, is_length=True)
    output_tokens: int = option(128, "tokens out", low=1, is_length=True)

    def plans(self, seed: int) -> list[Plan]:
        """Return one closed loop."""
        stem = self.stem(seed)
        asks = tuple(
            Ask(f"{i}", (Part(f"{stem} {i}", self.prompt_tokens),), self.output_tokens) for i in range(self.requests)
        )
        return [ClosedLoop(asks, self.concurrency)]

    def warmup(self, seed: int) -> tuple[Ask, ...]:
        """Return as many requests as will run at once."""
        return warmup_asks(self.stem(seed), self.concurrency, self.prompt_tokens, self.output_tokens)
