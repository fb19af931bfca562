"""Campaigns: a closed loop of streams, and faults that strike it again and again.

1. A round is a kind and a seed; its requests, moments and victims follow from them, so that it can be run again.
2. Its streams come from a pool whose oracles are known. Each fault waits until enough workers are registered and one of
   them is busy, then for a random token of a random stream.
3. Every stream is held against its oracle when it ends. At the end of a round the cluster must be whole again, with
   nothing leased and every block accounted for.
4. `may_fail` kinds may leave no worker at all: there a stream may also end with exactly one explicit error.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.faults.ledger import Ledger, Request
from tests.faults.load import ClosedLoop, bound, percentile
from tests.faults.phases import Cluster, within

KILL_KINDS = ("decode-kill", "prefill-kill", "both-kill", "replacement-kill")
STOP_KINDS = ("decode-stop", "prefill-stop", "decode-doze")
ROUND_KINDS = KILL_KINDS + STOP_KINDS
_MAY_FAIL = frozenset({"both-kill", "replacement-kill"})
BUSY_BUDGET_S = 90.0
MOVE_BUDGET_S = 5.0
MAX_REPLACEMENTS = 3
GAP_WINDOW_S = 1.0
# A doze ends about when its lease does (`--lease-ttl-s`, 3 s): each side may believe what the other does not.
STOPPED_S = {"stop": (0.3, 6.0), "doze": (2.4, 3.2)}


@dataclass(frozen=True, slots=True)
class Round:
    """Faults of one kind, determined by kind and seed."""

    kind: str
    seed: int
    num_faults: int = 10
    width: int = 5

    def __str__(self) -> str:
        """Say how to run it again."""
        return f"--kinds {self.kind} --seed {self.seed} --rounds 1 --faults {self.num_faults} --width {self.width}"


@dataclass(slots=True)
class RoundReport:
    """What a round showed.

    Attributes:
        num_faults: signals sent for it; `num_hits` are those whose victim held at least one request.
        gaps_s: of each stream hit, the longest wait between two tokens around the fault.
        num_explicit: streams that ended with one explicit error, where the kind allows it.
        faults: what was wrong, in words.
    """

    round: Round
    num_faults: int = 0
    num_hits: int = 0
    gaps_s: list[float] = field(default_factory=list)
    num_streams: int = 0
    num_explicit: int = 0
    faults: list[str] = field(default_factory=list)
    took_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Hit:
    """A fault: when it struck, and how many requests its victim held."""

    at_s: float
    role: str
    num_placements: int


class Striker:
    """Picks moments and victims in a running closed loop, and remembers what was hit.

    Args:
        spared: names of workers that are never a victim.
    """

    def __init__(
        self, cluster: Cluster, loop: ClosedLoop, dice: random.Random, spared: frozenset[str] = frozenset()
    ) -> None:
        self.hits: list[_Hit] = []
        self._spared = spared
        self._cluster = cluster
        self._loop = loop
        self._dice = dice
        self._resumptions: set[asyncio.Task[None]] = set()

    async def strike(self, kind: str) -> None:
        """Send one fault of a kind at a random moment of a random stream.

        Raises:
            TimeoutError: no worker of that kind was busy within `BUSY_BUDGET_S`.
        """
        async with asyncio.timeout(BUSY_BUDGET_S):
            role, what = kind.split("-")
            await self._until_ready(role)
            await self._moment()
            if role == "replacement":
                await self._replacements()
            elif role == "both":
                for each in ("decode", "prefill"):
                    await self._one(each, signal.SIGKILL, num_left=0)
            elif what == "kill":
                await self._one(role, signal.SIGKILL, num_left=1)
            else:
                worker = await self._one(role, signal.SIGSTOP, num_left=1)
                after_s = self._dice.uniform(*STOPPED_S[what])
                self._resumptions.add(asyncio.create_task(self._go_on(worker, after_s)))

    async def settle(self) -> None:
        """Wait until every stopped worker was told to go on."""
        await asyncio.gather(*self._resumptions)

    def gaps_s(self) -> tuple[list[float], int]:
        """Return the gap of each stream hit while it was decoded, and how many faults hit a worker that held a request.

        Which streams a victim held is not told, only how many: the longest gaps around the fault count as theirs.
        """
        gaps: list[float] = []
        num_hits = 0
        for hit in self.hits:
            num_hits += hit.num_placements > 0
            if hit.role == "decode":
                around = [r.gap_around_s(hit.at_s, hit.at_s + GAP_WINDOW_S) for r in self._loop.ended]
                gaps += sorted((gap for gap in around if gap is not None), reverse=True)[: hit.num_placements]
        return gaps, num_hits

    async def _until_ready(self, role: str) -> None:
        """Wait for two workers of a role, or for everybody where a fault may take everybody."""
        while not (
            len(await self._cluster.placements(role)) > 1
            if role in self._cluster.num_workers
            else await self._cluster.is_whole()
        ):
            await asyncio.sleep(0.02)

    async def _moment(self) -> None:
        """Wait for a random token, soon, of a random stream."""
        while not (begun := [r for r in self._loop.running if r.times_s]):
            await asyncio.sleep(0.005)
        target = self._dice.choice(begun)
        token = len(target.token_ids) + self._dice.randrange(1, 48)
        while len(target.token_ids) < token and not target.ended_s:
            await asyncio.sleep(0.001)

    async def _one(self, role: str, number: signal.Signals, num_left: int) -> dict[str, Any]:
        """Signal a worker of a role that holds a stream, or any for prefill, leaving at least `num_left` others."""
        while True:
            held = await self._cluster.placements(role)
            fair = [(worker, num) for worker, num in held if worker["worker_id"] not in self._spared]
            busy = [(worker, num) for worker, num in fair if num] or (fair if role == "prefill" else [])
            if len(held) > num_left and busy:
                break
            await asyncio.sleep(0.02)
        worker, num_placements = self._dice.choice(busy)
        self.hits.append(_Hit(time.monotonic(), role, num_placements))
        if number is signal.SIGKILL:
            self._cluster.kill(worker)
        else:
            self._cluster.send(worker, number)
        return worker

    async def _go_on(self, worker: dict[str, Any], after_s: float) -> None:
        await asyncio.sleep(after_s)
        self._cluster.send(worker, signal.SIGCONT)

    async def _replacements(self) -> None:
        """Kill a decode worker, then each one that its streams move to."""
        await self._one("decode", signal.SIGKILL, num_left=0)
        for _ in range(self._dice.randint(1, MAX_REPLACEMENTS)):
            before = {w["instance"]: num for w, num in await self._cluster.placements("decode")}
            moved: list[tuple[dict[str, Any], int]] = []

            async def has_moved(before: dict[int, int] = before, into: list[Any] = moved) -> bool:
                held = await self._cluster.placements("decode")
                into[:] = [(w, num) for w, num in held if num > before.get(w["instance"], 0)]
                return bool(into)

            if not await within(MOVE_BUDGET_S, has_moved):
                return
            await asyncio.sleep(self._dice.uniform(0.0, 0.2))
            fair = [(w, num) for w, num in moved if w["worker_id"] not in self._spared]
            if not fair:
                return
            worker, num = self._dice.choice(fair)
            self.hits.append(_Hit(time.monotonic(), "decode", num))
            self._cluster.kill(worker)


async def run_round(
    cluster: Cluster, ledger: Ledger, oracles: Mapping[Request, Sequence[int]], what: Round
) -> RoundReport:
    """Run one round on a cluster in any state, and leave it whole."""
    dice, begin_s, report = random.Random(str(what)), time.monotonic(), RoundReport(what)
    report.faults += await cluster.aftermath()
    loop = ClosedLoop(ledger, oracles, dice, width=what.width, may_fail=what.kind in _MAY_FAIL)
    striker = Striker(cluster, loop, random.Random(f"strikes {what}"))

    async def faults() -> None:
        for _ in range(what.num_faults):
            await striker.strike(what.kind)

    try:
        tally = await loop.during(faults())
    except TimeoutError:
        report.faults.append(f"no {what.kind} within {BUSY_BUDGET_S} s: {await cluster.workers()}")
        tally = loop.tally
    await striker.settle()
    report.num_faults = len(striker.hits)
    report.gaps_s, report.num_hits = striker.gaps_s()
    report.num_streams, report.num_explicit = tally.num_streams, tally.num_explicit
    report.faults += tally.faults + await cluster.aftermath()
    report.took_s = time.monotonic() - begin_s
    return report


def summary(reports: Sequence[RoundReport]) -> str:
    """Say per kind what struck, what failed, the bound on the rate, and the gaps."""
    lines = []
    for kind in dict.fromkeys(report.round.kind for report in reports):
        mine = [report for report in reports if report.round.kind == kind]
        num_sent, num_hits = sum(r.num_faults for r in mine), sum(r.num_hits for r in mine)
        gaps = [gap for report in mine for gap in report.gaps_s]
        num_wrong = sum(len(r.faults) for r in mine)
        lines.append(
            f"{kind}: {num_sent} faults, {num_hits} of them on a worker at work ({len(gaps)} running streams hit); "
            f"{sum(r.num_streams for r in mine)} streams, {sum(r.num_explicit for r in mine)} ended with one explicit "
            f"error; wrong: {bound(num_wrong, num_hits or num_sent)}; gap median {percentile(gaps, 0.5):.2f} s, "
            f"p90 {percentile(gaps, 0.9):.2f} s, p99 {percentile(gaps, 0.99):.2f} s, longest {max(gaps, default=0):.2f}"
            f" s; {sum(r.took_s for r in mine):.0f} s"
        )
    return "\n".join(lines)
