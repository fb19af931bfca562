"""Every workload by its name on the command line."""

from __future__ import annotations

from typing import Final

from bench.workloads.closed import Closed
from bench.workloads.hiring import Hiring
from bench.workloads.interference import Interference
from bench.workloads.jobsearch import JobSearch
from bench.workloads.plan import Workload
from bench.workloads.trace import Trace

WORKLOADS: Final[dict[str, type[Workload]]] = {
    kind.name: kind for kind in (Hiring, JobSearch, Interference, Closed, Trace)
}
