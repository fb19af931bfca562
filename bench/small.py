"""The small set: what `make bench` measures, within five minutes on two slow cores.

one stream ─► four streams ─► four steady streams alone, then beside prompts ─► a short job search
"""

from __future__ import annotations

from typing import Final

from bench.workloads.closed import Closed
from bench.workloads.interference import Interference
from bench.workloads.jobsearch import JobSearch
from bench.workloads.plan import Workload

SMALL: Final[tuple[Workload, ...]] = (
    Closed(concurrency=1, requests=4, prompt_tokens=128, output_tokens=48),
    Closed(concurrency=4, requests=12, prompt_tokens=128, output_tokens=48),
    Interference(
        streams=4, steady_output_tokens=200, long_tokens=512, every_s=6.0, window_s=24.0, settle_s=0.5, drain_s=60.0
    ),
    JobSearch(rate=0.5, requests=12, output_tokens=24),
)
