"""From the records of one run to the figures that are quoted.

    Run ─► measured records of one kind ─► good ones ─► latencies, rates
                                       └─► all ───────► errors, SLO attainment, goodput

What counts, in every figure of the harness:

1. Warm-up requests never count, nor does a gap or a token that came before the window opened (time 0).
2. Latencies and rates are those of requests that did not fail. A failed request is counted, and misses every bound.
3. A latency counts however late it ended, so that a stall at the end of the window is not lost. A rate counts only what
   happened inside the window: tokens that arrived in it, requests that finished in it.
4. ITL is the gap between two chunks with text. A chunk of k > 1 tokens ends one gap, not k, because that is what the
   reader of the stream sees; TPOT divides by tokens.
5. Percentiles of ITL count gaps, so that a faster stream hides the same stall better: one of five seconds among
   200 gaps of 25 ms is 0.5 % of the gaps and half of the time. Percentiles by time weigh each gap by its length: what
   somebody who looks at the stream at a random moment sits in.
6. Percentiles interpolate linearly between neighbours, so that p99 of few values lies close to their maximum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.records import Record, Run, Slo

PERCENTS = (50.0, 90.0, 95.0, 99.0, 100.0)

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Percentiles of one latency, in milliseconds; all None where there are no values."""

    num_values: int = 0
    p50_ms: float | None = None
    p90_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    max_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Attainment:
    """Share of all requests, 0 to 1, that met a bound; None where nothing is bounded or nothing was sent.

    Attributes:
        every: share that met all bounds at once.
    """

    every: float | None = None
    ttft: float | None = None
    tpot: float | None = None
    itl_p99: float | None = None
    e2e: float | None = None


@dataclass(frozen=True, slots=True)
class ClientOverhead:
    """How far the load generator itself may have bent the figures.

    Attributes:
        cpu_share: its CPU time over the window's length; near 1, the one core it runs on was full.
        lag_p99_ms: how late its event loop woke from sleeps.
        sent_late_p99_ms: how late open-loop requests left; None where no request had a planned time.
    """

    cpu_share: float
    lag_p99_ms: float
    sent_late_p99_ms: float | None


@dataclass(frozen=True, slots=True)
class PromptCheck:
    """Whether the server saw prompts as long as the workload meant.

    Attributes:
        num_compared: requests for which the server told a count.
        num_mismatched: those among them whose count is not the planned one.
        worst_tokens: server's count less the planned one where they differ most; 0 where all agree.
    """

    num_compared: int
    num_mismatched: int
    worst_tokens: int


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of one run, of all its requests or of one kind; the module's text says what counts.

    Attributes:
        num_prompt_tokens: of good requests, as the server counted, else as planned.
        num_output_tokens: of good requests, inside the window or not.
        itl: over all gaps of all streams.
        itl_by_time: the same gaps, each weighed by its length.
        worst_gap: over streams, of the longest gap of each.
        goodput_per_s: requests a second that finished in the window and met every bound; None without bounds.
    """

    num_requests: int
    num_errors: int
    num_prompt_tokens: int
    num_output_tokens: int
    ttft: Quantiles
    tpot: Quantiles
    itl: Quantiles
    itl_by_time: Quantiles
    e2e: Quantiles
    worst_gap: Quantiles
    output_tokens_per_s: float
    requests_per_s: float
    attainment: Attainment
    goodput_per_s: float | None
    client: ClientOverhead
    prompts: PromptCheck


def figures(run: Run, kind: str | None = None) -> Figures:
    """Return the figures of a run.

    Args:
        run: what was measured.
        kind: count only requests of this kind; None counts all.
    """
    records = run.measured(kind)
    good = [r for r in records if r.error is None]
    finished = [r for r in good if 0 <= r.finished_s <= run.duration_s]
    window_gaps = [gaps for r in good if (gaps := gaps_in_window(r)).size]
    gaps_s = np.concatenate(window_gaps) if window_gaps else np.empty(0)
    is_bounded = any(bound is not None for bound in bounds(run.slo).values())
    return Figures(
        num_requests=len(records),
        num_errors=len(records) - len(good),
        num_prompt_tokens=sum(
            r.planned_prompt_tokens if r.num_prompt_tokens is None else r.num_prompt_tokens for r in good
        ),
        num_output_tokens=sum(r.num_output_tokens for r in good),
        ttft=quantiles([r.ttft_s for r in good]),
        tpot=quantiles([r.tpot_s for r in good]),
        itl=quantiles(gaps_s),
        itl_by_time=quantiles_by_time(gaps_s),
        e2e=quantiles([r.e2e_s for r in good]),
        worst_gap=quantiles([float(gaps.max()) for gaps in window_gaps]),
        output_tokens_per_s=_per_s(sum(_tokens_in_window(r, run.duration_s) for r in good), run.duration_s),
        requests_per_s=_per_s(len(finished), run.duration_s),
        attainment=_attainment(records, run.slo),
        goodput_per_s=_per_s(sum(all(met(r, run.slo).values()) for r in finished), run.duration_s)
        if is_bounded
        else None,
        client=_client_overhead(run, records),
        prompts=_prompt_check(records),
    )


def quantiles(values_s: Sequence[float | None] | Floats) -> Quantiles:
    """Return the percentiles of seconds, in milliseconds; values that are None are left out."""
    present = values_s if isinstance(values_s, np.ndarray) else [v for v in values_s if v is not None]
    if not len(present):
        return Quantiles()
    p50, p90, p95, p99, highest = (float(v) * 1e3 for v in np.percentile(present, PERCENTS))
    return Quantiles(len(present), p50, p90, p95, p99, highest)


def quantiles_by_time(gaps_s: Floats) -> Quantiles:
    """Return, for each percentage, the shortest gap such that it and shorter ones fill that share of the time."""
    total_s = float(gaps_s.sum())
    if total_s <= 0:
        return quantiles(gaps_s)
    ordered = np.sort(gaps_s)
    # The last sum may fall short of the total by rounding; the longest gap ends the list all the same.
    filled = np.minimum(np.searchsorted(np.cumsum(ordered), np.multiply(PERCENTS, total_s / 100)), len(ordered) - 1)
    p50, p90, p95, p99, highest = (float(v) * 1e3 for v in ordered[filled])
    return Quantiles(len(ordered), p50, p90, p95, p99, highest)


def gaps_in_window(record: Record) -> Floats:
    """Return a stream's gaps in seconds, less those that ended before the window opened."""
    arrivals = np.asarray(record.chunk_s, dtype=np.float64)
    return np.asarray(np.diff(arrivals)[arrivals[1:] >= 0])


def bounds(slo: Slo) -> dict[str, float | None]:
    """Return the bounds of an SLO in seconds, by the names that `Attainment` gives them."""
    return {"ttft": slo.ttft_s, "tpot": slo.tpot_s, "itl_p99": slo.itl_p99_s, "e2e": slo.e2e_s}


def met(record: Record, slo: Slo) -> dict[str, bool]:
    """Say for each bound that is set whether a request met it.

    A failed request meets none, and one without any text no bound on TTFT. One too short to have a gap or a TPOT meets
    the bounds on these.
    """
    gaps_s = record.gaps_s if slo.itl_p99_s is not None else ()
    took_s = {
        "ttft": record.ttft_s if record.chunk_s else float("inf"),
        "tpot": record.tpot_s,
        "itl_p99": float(np.percentile(gaps_s, 99)) if gaps_s else None,
        "e2e": record.e2e_s,
    }
    verdicts = {}
    for name, bound_s in bounds(slo).items():
        if bound_s is not None:
            value_s = took_s[name]
            verdicts[name] = record.error is None and (value_s is None or value_s <= bound_s)
    return verdicts


def _attainment(records: Sequence[Record], slo: Slo) -> Attainment:
    verdicts = [met(r, slo) for r in records]
    if not verdicts or not verdicts[0]:
        return Attainment()
    shares = {name: sum(v[name] for v in verdicts) / len(verdicts) for name in verdicts[0]}
    return Attainment(every=sum(all(v.values()) for v in verdicts) / len(verdicts), **shares)


def _tokens_in_window(record: Record, duration_s: float) -> int:
    return sum(n for at_s, n in zip(record.chunk_s, record.chunk_tokens, strict=True) if 0 <= at_s <= duration_s)


def _per_s(count: int, duration_s: float) -> float:
    return count / duration_s if duration_s > 0 else 0.0


def _client_overhead(run: Run, records: Sequence[Record]) -> ClientOverhead:
    late = quantiles([r.started_s - r.planned_s for r in records if r.planned_s is not None])
    cpu_share = run.client_cpu_s / run.duration_s if run.duration_s > 0 else 0.0
    return ClientOverhead(cpu_share, run.client_lag_s * 1e3, late.p99_ms)


def _prompt_check(records: Sequence[Record]) -> PromptCheck:
    # A failed request may have been refused before anyone counted: its count says nothing about the workload.
    told = [
        r.num_prompt_tokens - r.planned_prompt_tokens
        for r in records
        if r.num_prompt_tokens is not None and r.error is None
    ]
    return PromptCheck(len(told), sum(d != 0 for d in told), max(told, key=abs, default=0))
