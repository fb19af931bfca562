"""From samples to the figures that are quoted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.client import Sample


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of one run; times in milliseconds, None where nothing was measured.

    Attributes:
        itl_p99_ms: over all gaps of all streams.
        worst_gap_p50_ms: median over streams of each one's longest gap.
        tokens_per_s: output tokens of finished requests over the whole run.
    """

    num_requests: int
    num_errors: int
    duration_s: float
    tokens_per_s: float
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    itl_p50_ms: float | None
    itl_p99_ms: float | None
    itl_max_ms: float | None
    tpot_p50_ms: float | None
    worst_gap_p50_ms: float | None


def summarise(samples: Sequence[Sample], duration_s: float) -> Summary:
    """Return the figures of a run that took `duration_s` seconds."""
    good = [s for s in samples if s.error is None]
    gaps = [gap for s in good for gap in s.gaps_s]
    ttfts = [s.ttft_s for s in good if s.ttft_s is not None]
    return Summary(
        num_requests=len(samples),
        num_errors=len(samples) - len(good),
        duration_s=duration_s,
        tokens_per_s=sum(s.num_output_tokens for s in good) / duration_s if duration_s > 0 else 0.0,
        ttft_p50_ms=percentile_ms(ttfts, 50),
        ttft_p99_ms=percentile_ms(ttfts, 99),
        itl_p50_ms=percentile_ms(gaps, 50),
        itl_p99_ms=percentile_ms(gaps, 99),
        itl_max_ms=percentile_ms(gaps, 100),
        tpot_p50_ms=percentile_ms([s.tpot_s for s in good if s.tpot_s is not None], 50),
        worst_gap_p50_ms=percentile_ms([max(s.gaps_s) for s in good if s.gaps_s], 50),
    )


def percentile_ms(values_s: Sequence[float], percent: float) -> float | None:
    """Return a percentile in milliseconds, linearly interpolated; None without values."""
    return float(np.percentile(values_s, percent)) * 1e3 if values_s else None
