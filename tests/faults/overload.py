"""Overload: find what the server can carry, ask for five times as much, then see how soon it is itself again.

1. Closed loops of rising width: the most requests per second that meet the objectives are the peak.
2. An open loop at five times the peak. Whoever is refused must be told at once, and when to come back; whoever is
   accepted must get a whole answer; the second half's goodput is held against the peak.
3. A closed loop of half the peak's width: the last request that missed its objectives says how long recovery took.
Clients run in this process, on the same cores as the server: what they cost lowers every number alike.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.faults.ledger import Ledger, Record, Request
from tests.faults.load import long_prompt, open_loop, percentile
from tests.faults.phases import Cluster

TTFT_SLO_S = 2.0
# What the server is told: half a second is left for what a prediction misses.
MAX_WAIT_S = 1.5
TPOT_SLO_S = 0.1
WIDTHS = (1, 2, 4, 8, 16, 32)
PEAK_S = 10.0
FACTOR = 5.0
RECOVERY_S = 12.0
REFUSAL_TARGET_S = 0.1
GOODPUT_TARGET = 0.9
RECOVERY_TARGET_S = 5.0


def meets_slo(record: Record) -> bool:
    """Whether a stream was whole and as fast as promised."""
    is_whole = record.is_done and not record.errors and len(record.token_ids) == record.request.max_tokens
    return is_whole and (record.ttft_s or 0.0) <= TTFT_SLO_S and record.mean_tpot_s <= TPOT_SLO_S


def goodput_per_s(records: Sequence[Record], begin_s: float, end_s: float) -> float:
    """Return the requests per second that ended in a span and met their objectives."""
    return sum(meets_slo(r) and begin_s <= r.ended_s < end_s for r in records) / (end_s - begin_s)


@dataclass(slots=True)
class OverloadReport:
    """What overload showed.

    Attributes:
        goodputs: width of a closed loop to requests/s that met their objectives.
        refusals_s: request sent to 429 received.
        num_failed: accepted requests that did not get a whole answer.
        ttfts_s: of accepted requests.
        recovery_s: end of the overload to the last request of the half load that missed its objectives.
    """

    goodputs: dict[int, float] = field(default_factory=dict)
    peak_per_s: float = 0.0
    num_asked: int = 0
    num_failed: int = 0
    num_late: int = 0
    refusals_s: list[float] = field(default_factory=list)
    num_without_retry_after: int = 0
    ttfts_s: list[float] = field(default_factory=list)
    overload_per_s: float = 0.0
    recovery_s: float = 0.0
    faults: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Say it in a paragraph."""
        widths = ", ".join(f"{width}: {rate:.1f}" for width, rate in self.goodputs.items())
        share = self.overload_per_s / self.peak_per_s if self.peak_per_s else 0.0
        return (
            f"overload: objectives TTFT <= {TTFT_SLO_S} s, mean TPOT <= {TPOT_SLO_S * 1e3:.0f} ms; goodput per width "
            f"in requests/s {widths}; at {FACTOR:g}x the peak: {self.num_asked} asked, {len(self.refusals_s)} refused "
            f"({self.num_without_retry_after} without Retry-After), {self.num_failed} accepted and failed, "
            f"{self.num_late} accepted and late; refusal p50 {percentile(self.refusals_s, 0.5) * 1e3:.0f} ms, "
            f"p99 {percentile(self.refusals_s, 0.99) * 1e3:.0f} ms, longest "
            f"{max(self.refusals_s, default=0) * 1e3:.0f} ms; first token of the accepted p99 "
            f"{percentile(self.ttfts_s, 0.99):.2f} s; goodput of the second half {self.overload_per_s:.1f}/s = "
            f"{share:.0%} of the peak; recovery {self.recovery_s:.1f} s; missed: {'; '.join(self.faults) or 'nothing'}"
        )


class _Requests:
    """Short requests, each with a prompt of its own, in an order that follows from the seed."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(f"overload {seed}")

    def draw(self) -> Request:
        dice = self._dice
        return Request(long_prompt(dice, dice.randint(10, 80)), dice.randint(16, 48), 0.0, dice.randrange(1 << 30))


async def _closed(ledger: Ledger, requests: _Requests, width: int, for_s: float) -> list[Record]:
    end_s, records = time.monotonic() + for_s, []

    async def client() -> None:
        while time.monotonic() < end_s:
            record = Record(requests.draw())
            records.append(record)
            await ledger.stream(record.request, record)

    await asyncio.gather(*(client() for _ in range(width)))
    return records


async def _find_peak(ledger: Ledger, requests: _Requests, report: OverloadReport, peak_s: float) -> int:
    for width in WIDTHS:
        begin_s = time.monotonic()
        records = await _closed(ledger, requests, width, peak_s)
        report.goodputs[width] = goodput_per_s(records, begin_s, time.monotonic())
        if report.goodputs[width] < 0.5 * max(report.goodputs.values()):
            break
    best = max(report.goodputs, key=lambda width: report.goodputs[width])
    report.peak_per_s = report.goodputs[best]
    return best


def _judge(records: Sequence[Record], begin_s: float, for_s: float, report: OverloadReport) -> None:
    refused = [record for record in records if record.status == 429]
    accepted = [record for record in records if record.status != 429]
    report.num_asked = len(records)
    report.refusals_s = [record.answered_s - record.begun_s for record in refused]
    report.num_without_retry_after = sum(record.retry_after is None for record in refused)
    report.num_failed = sum(not record.is_done or bool(record.errors) for record in accepted)
    report.num_late = sum(record.is_done and not meets_slo(record) for record in accepted)
    report.ttfts_s = [record.ttft_s for record in accepted if record.ttft_s is not None]
    report.overload_per_s = goodput_per_s(accepted, begin_s + for_s / 2, begin_s + for_s)


def _missed(report: OverloadReport) -> list[str]:
    worst_s = percentile(report.refusals_s, 0.99)
    said = [
        (not report.refusals_s, "nobody was refused"),
        (worst_s > REFUSAL_TARGET_S, f"refusals take {worst_s:.3f} s at p99"),
        (report.num_without_retry_after > 0, f"{report.num_without_retry_after} refusals without Retry-After"),
        (report.num_failed > 0, f"{report.num_failed} accepted requests failed"),
        (report.overload_per_s < GOODPUT_TARGET * report.peak_per_s, "goodput fell below 90 % of the peak"),
        (report.recovery_s > RECOVERY_TARGET_S, f"recovery took {report.recovery_s:.1f} s"),
    ]
    return [words for is_so, words in said if is_so]


async def run(
    cluster: Cluster, ledger: Ledger, seed: int, for_s: float, tell: Callable[[str], None], peak_s: float = PEAK_S
) -> OverloadReport:
    """Find the peak (`peak_s` for each width), then overload the server `for_s`, then let it recover."""
    report, requests = OverloadReport(), _Requests(seed)
    report.faults += await cluster.aftermath()
    width = await _find_peak(ledger, requests, report, peak_s)
    tell(f"peak {report.peak_per_s:.1f} requests/s with {width} at once: {report.goodputs}")
    if not report.peak_per_s:
        report.faults.append("no request met its objectives even alone")
        return report
    dice, begin_s = random.Random(f"arrivals {seed}"), time.monotonic()
    rate_per_s = FACTOR * report.peak_per_s
    overload = asyncio.create_task(open_loop(ledger, requests.draw, dice, rate_per_s=rate_per_s, for_s=for_s))
    await asyncio.sleep(for_s)
    end_s = time.monotonic()
    calm = await _closed(ledger, requests, max(1, width // 2), RECOVERY_S)
    _judge(await overload, begin_s, for_s, report)
    report.recovery_s = max((r.ended_s - end_s for r in calm if not meets_slo(r)), default=0.0)
    report.faults += _missed(report) + await cluster.aftermath()
    return report
