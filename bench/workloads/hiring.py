"""`hiring`: many candidates judged against a few job descriptions.

    [ the job: shared by all its candidates | the candidate: lines of JSON | what to do ] ─► a long answer as JSON

The answer repeats lines of the job and of the candidate, which is what makes such answers copy-heavy.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from bench.text import JUDGE, Part, fixed
from bench.workloads.plan import Ask, ClosedLoop, OpenLoop, Plan, Workload, option, poisson, warmup_asks

_TASK = fixed(JUDGE)


@dataclass(frozen=True, slots=True)
class Hiring(Workload):
    """Long prompts that share their beginning, long answers."""

    name: ClassVar[str] = "hiring"
    summary: ClassVar[str] = "many candidates against a few shared job descriptions, long copy-heavy answers"

    jobs: int = option(4, "job descriptions", low=1)
    candidates: int = option(200, "candidates, one request each", low=1)
    job_tokens: int = option(1500, "tokens of a job description", low=1, is_length=True)
    prompt_min_tokens: int = option(2000, "tokens in, at least", low=1, is_length=True)
    prompt_max_tokens: int = option(8000, "tokens in, at most", low=1, is_length=True)
    output_tokens: int = option(1000, "tokens out", low=1, is_length=True)
    rate: float = option(0.0, "requests a second, arriving at random (Poisson); 0: a closed loop")
    concurrency: int = option(8, "requests at once in the closed loop", low=1)

    def plans(self, seed: int) -> list[Plan]:
        """Return an open loop if there is a rate, else a closed one."""
        if self.rate > 0:
            return [OpenLoop(tuple(self._asks(seed, poisson(self.stem(seed), self.rate, self.candidates))))]
        return [ClosedLoop(tuple(self._asks(seed, [None] * self.candidates)), self.concurrency)]

    def warmup(self, seed: int) -> tuple[Ask, ...]:
        """Return two short requests."""
        return warmup_asks(self.stem(seed), 2, self.prompt_min_tokens, self.output_tokens)

    def _asks(self, seed: int, dues: list[float] | list[None]) -> list[Ask]:
        stem = self.stem(seed)
        rng = random.Random(f"{stem} sizes")
        jobs = [Part(f"{stem} job {j}", self.job_tokens, "prose", is_shared=True) for j in range(self.jobs)]
        asks = []
        for i, due_s in enumerate(dues):
            job = jobs[int(rng.random() * len(jobs))]
            spread = max(0, self.prompt_max_tokens - self.prompt_min_tokens) + 1
            total = self.prompt_min_tokens + int(rng.random() * spread)
            own_tokens = max(1, total - job.num_tokens - _TASK.num_tokens)
            candidate = Part(f"{stem} candidate {i}", own_tokens, "rows")
            asks.append(Ask(f"{i}", (job, candidate, _TASK), self.output_tokens, due_s=due_s))
        return asks
