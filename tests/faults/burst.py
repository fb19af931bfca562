"""Bursts: many long prompts at once on a server that has computed nothing yet, and one small client beside them.

1. The server has just started: the burst is its first traffic. 2. Its prefill workers are killed, and the next burst
   comes as soon as their successors are there.

Each time: who is refused must be told at once, and when to come back; who is let in must have a first token within what
a wait may be, give or take what a prediction misses; a short request of a client with another address must be let in
and served beside the burst, in a fraction of that time.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp

from tests.faults.ledger import Ledger, Record, Request
from tests.faults.load import long_prompt, percentile
from tests.faults.phases import Cluster, within

MAX_WAIT_S = 10.0
NUM_PROMPTS = 30
PROMPT_WORDS = 1600
# Clients are counted by address where there are no keys: Linux has all of 127.0.0.0/8.
OTHER_ADDRESS = "127.0.0.2"
# A worker measures itself for a moment, beside whatever else starts just then.
FACTOR = 3.0
REFUSAL_TARGET_S = 1.0
SMALL_SHARE = 0.5
BACK_BUDGET_S = 30.0


@dataclass(slots=True)
class BurstReport:
    """What the bursts showed.

    Attributes:
        accepted: prompts let in, of each burst.
        ttfts_s: of these.
        refusals_s: request sent to 429 received.
        smalls_s: first tokens of the small client.
    """

    accepted: list[int] = field(default_factory=list)
    ttfts_s: list[float] = field(default_factory=list)
    refusals_s: list[float] = field(default_factory=list)
    smalls_s: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Say it in a paragraph."""
        return (
            f"bursts of {NUM_PROMPTS} long prompts: {', '.join(map(str, self.accepted))} let in; first token of these "
            f"p50 {percentile(self.ttfts_s, 0.5):.1f} s, longest {max(self.ttfts_s, default=0.0):.1f} s; "
            f"{len(self.refusals_s)} refused, the slowest after {max(self.refusals_s, default=0.0) * 1e3:.0f} ms; a "
            f"small client beside them: {', '.join(f'{s:.2f}' for s in self.smalls_s)} s; "
            f"wrong: {'; '.join(self.faults) or 'nothing'}"
        )


async def run(
    cluster: Cluster,
    ledger: Ledger,
    url: str,
    seed: int,
    num_rounds: int,
    max_wait_s: float,
    tell: Callable[[str], None],
) -> BurstReport:
    """Let bursts come: one on the server as it started, the others right after its prefill workers were killed."""
    report, dice = BurstReport(), random.Random(f"burst {seed}")
    connector = aiohttp.TCPConnector(local_addr=(OTHER_ADDRESS, 0))
    async with aiohttp.ClientSession(connector=connector) as http:
        other = Ledger(http, url)
        for number in range(num_rounds):
            if number:
                await _restart(cluster, report)
            await _burst(ledger, other, dice, max_wait_s, report)
            tell(f"burst {number}: {report.accepted[-1]} let in, small client {report.smalls_s[-1:]}")
    report.faults += await cluster.aftermath()
    return report


async def _restart(cluster: Cluster, report: BurstReport) -> None:
    for worker in await cluster.workers("prefill"):
        cluster.kill(worker)
    await asyncio.sleep(0.5)
    if not await within(BACK_BUDGET_S, cluster.is_whole):
        report.faults.append(f"not whole within {BACK_BUDGET_S} s of a kill")


async def _burst(ledger: Ledger, other: Ledger, dice: random.Random, max_wait_s: float, report: BurstReport) -> None:
    prompts = [Request(long_prompt(dice, PROMPT_WORDS), 2, 0.0, dice.randrange(1 << 30)) for _ in range(NUM_PROMPTS)]
    records = [Record(request) for request in prompts]
    burst = [asyncio.create_task(ledger.stream(record.request, record)) for record in records]
    # The first of them holds a worker's chunk by now.
    await asyncio.sleep(0.3)
    small = await other.stream(Request(long_prompt(dice, 8), 1, 0.0, dice.randrange(1 << 30)))
    small_ended_s = time.monotonic()
    is_beside = any(not record.ended_s for record in records)
    await asyncio.gather(*burst)
    _judge(records, max_wait_s, report)
    if small.ttft_s is None:
        report.faults.append(f"the small client was not served: {small.errors}")
    elif is_beside and small.ttft_s > SMALL_SHARE * max_wait_s:
        report.faults.append(f"the small client waited for {small.ttft_s:.1f} s")
    else:
        report.smalls_s.append(small_ended_s - small.begun_s)


def _judge(records: list[Record], max_wait_s: float, report: BurstReport) -> None:
    refused = [record for record in records if record.status == 429]
    accepted = [record for record in records if record.status != 429]
    ttfts_s = [record.ttft_s for record in accepted if record.ttft_s is not None]
    refusals_s = [record.answered_s - record.begun_s for record in refused]
    report.accepted.append(len(accepted))
    report.ttfts_s += ttfts_s
    report.refusals_s += refusals_s
    said = [
        (not refused, "nobody was refused"),
        (not accepted, "nobody was let in"),
        (max(refusals_s, default=0.0) > REFUSAL_TARGET_S, f"a refusal took {max(refusals_s, default=0.0):.1f} s"),
        (any(record.retry_after is None for record in refused), "a refusal does not say when to come back"),
        (any(not r.is_done or r.num_ends != 1 for r in accepted), "an accepted request was not answered whole"),
        (max(ttfts_s, default=0.0) > FACTOR * max_wait_s, f"a first token took {max(ttfts_s, default=0.0):.1f} s"),
    ]
    report.faults += [words for is_so, words in said if is_so]
