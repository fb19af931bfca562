"""Runs made by hand for the tests of figures, tables and report: no server, no clock, the same every time."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from bench.records import Record, Run, Slo


def record(
    chunk_s: Sequence[float] = (),
    *,
    started_s: float = 0.0,
    chunk_tokens: Sequence[int] | None = None,
    kind: str = "request",
    error: str | None = None,
    request_id: str = "r",
    finished_s: float | None = None,
    counted: int | None = 8,
) -> Record:
    """Return a request of eight planned prompt tokens whose stream ends with its last chunk."""
    tokens = tuple(chunk_tokens) if chunk_tokens is not None else (1,) * len(chunk_s)
    return Record(
        request_id=request_id,
        kind=kind,
        started_s=started_s,
        finished_s=finished_s if finished_s is not None else (chunk_s[-1] if chunk_s else started_s),
        chunk_s=tuple(chunk_s),
        chunk_tokens=tokens,
        planned_prompt_tokens=8,
        num_prompt_tokens=counted,
        num_output_tokens=sum(tokens),
        error=error,
    )


def run(
    records: Sequence[Record],
    *,
    server: str = "baton",
    workload: str = "closed",
    seed: int = 1,
    parameters: dict[str, float | int | str | None] | None = None,
    slo: Slo | None = None,
    duration_s: float = 10.0,
) -> Run:
    """Return a run of these records."""
    return Run(
        workload=workload,
        server=server,
        url="http://127.0.0.1:8000",
        model="smollm2",
        seed=seed,
        parameters=parameters if parameters is not None else {"num_streams": 4},
        slo=slo or Slo(),
        records=tuple(records),
        duration_s=duration_s,
        client_cpu_s=0.4,
        client_lag_s=0.0012,
        started_at="2026-03-05T10:00:00+00:00",
    )


def stream(start_s: float, ttft_s: float, gaps_s: Sequence[float], *, kind: str, request_id: str) -> Record:
    """Return a stream with this time to first token and these gaps."""
    at_s, chunks = start_s + ttft_s, [start_s + ttft_s]
    for gap in gaps_s:
        at_s += gap
        chunks.append(at_s)
    return record(chunks, started_s=start_s, kind=kind, request_id=request_id)


def interference(server: str, seed: int, *, arrivals: bool, stall_s: float, gap_s: float) -> Run:
    """Return a minute of four steady streams; each of five long prompts stalls them all for `stall_s`."""
    rng = random.Random(f"{server}{seed}{arrivals}")
    times_s = [10.0 * (n + 1) for n in range(5)] if arrivals else []
    records = [_steady(rng, number, times_s, stall_s, gap_s) for number in range(4)]
    for n, at_s in enumerate(times_s):
        ttft_s = max(stall_s, 0.9) * rng.uniform(0.95, 1.2)
        records.append(stream(at_s, ttft_s, [gap_s] * 7, kind="arrival", request_id=f"arrival-{n}"))
    return run(
        records,
        server=server,
        workload="interference",
        seed=seed,
        parameters={"phase": "arrivals" if arrivals else "alone", "num_streams": 4, "every_s": 10.0 * arrivals},
        slo=Slo(ttft_s=2.0, itl_p99_s=0.1),
        duration_s=60.0,
    )


def closed(server: str, seed: int, num_requests: int, *, gap_s: float, num_gaps: int = 30, num_failed: int = 0) -> Run:
    """Return short requests in a closed loop, the last `num_failed` of them refused."""
    rng, records = random.Random(f"{server}{seed}"), []
    for n in range(num_requests):
        start_s = 60.0 * n / num_requests
        gaps = [gap_s * rng.lognormvariate(0, 0.2) for _ in range(num_gaps)]
        records.append(
            stream(start_s, 4 * gap_s * rng.lognormvariate(0, 0.5), gaps, kind="request", request_id=f"req-{n:05d}")
        )
    for n in range(num_requests - num_failed, num_requests):
        failed = record(started_s=records[n].started_s, request_id=f"req-{n:05d}", error="HTTP 429: <b>overloaded</b>")
        records[n] = failed
    return run(records, server=server, seed=seed, slo=Slo(ttft_s=0.3, tpot_s=0.05), duration_s=62.0)


def two_servers(make: Callable[[str, int], Sequence[Run]], seeds: Sequence[int] = (1, 2, 3)) -> list[Run]:
    """Return runs of two servers in turns."""
    return [each for seed in seeds for server in ("baton", "llama-server Q4_0") for each in make(server, seed)]


def interference_in_turns(server: str, seed: int) -> list[Run]:
    """Return both phases of one turn: one server stalls for seconds, the other hardly."""
    stall_s, gap_s = (0.004, 0.022) if server == "baton" else (5.0, 0.055)
    return [interference(server, seed, arrivals=each, stall_s=stall_s, gap_s=gap_s) for each in (False, True)]


def _steady(rng: random.Random, number: int, times_s: Sequence[float], stall_s: float, gap_s: float) -> Record:
    at_s, chunks, pending = rng.uniform(0.1, 0.2), [], list(times_s)
    while at_s < 60.0:
        chunks.append(at_s)
        at_s += gap_s * rng.lognormvariate(0, 0.12)
        if pending and at_s > pending[0]:
            pending.pop(0)
            at_s += stall_s * rng.uniform(0.9, 1.1)
    return record(chunks, started_s=0.05, kind="steady", request_id=f"steady-{number}")
