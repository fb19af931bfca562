"""Siege: two tenants ask, workers die, and a third tenant means no good; what that costs the other two.

1. Peace: a large tenant keeps some streams running and floods the server now and then; a small one asks one request
   after the other; a third one asks for this and that; a random fault every few seconds (`soak.py`).
2. Siege: the same, and the third tenant's clients are hostile: the worst grammars, answers that nobody reads, clients
   that leave (`besiegers.py`).
3. Turns alternate, so that whatever else the machine does falls on both; floods, kills and load do so anyhow. What is
   measured is what hostility costs.
4. Every stream of the two tenants, in either phase, must say what it said when asked alone, and end once. The small
   tenant is never refused. Every hostile request ends in a way that it may end.
5. At the end nothing is held; router, supervisor and the spared workers have lived through all, and what they take has
   not grown from siege to siege.

The time between two tokens is that of the two tenants' streams without a grammar, each wait counting once, without the
first `NUM_FIRST_GAPS` of a stream: all waits of all sieges against all waits in peace.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from tests.faults.besiegers import Besiegers, Ends
from tests.faults.footprints import JUDGED_FROM, Watch
from tests.faults.grammars import NUM_FIRST_GAPS
from tests.faults.ledger import Ledger, Record, Request
from tests.faults.load import ClosedLoop, Tally, bound, draw_pool, percentile
from tests.faults.phases import Cluster
from tests.faults.soak import LASTING, Nemesis

LARGE, SMALL, THIRD = "large", "small", "third"
STALL_S = 4.0
WIDTH = 4
NUM_FLOOD = 16
FLOOD_EVERY_S = 8.0
REQUESTS_PER_TURN = 400
# Who is refused comes back when it was told to, so often and after at most so long.
MAX_REFUSALS, LONGEST_REFUSAL_S = 20, 10.0
# Of what is asked in a siege, so much more is asked in peace.
PEACE_SHARE = 0.25
ITL_TARGET = 1.3
SMALL_P95_TARGET_S = 2.0
SMALL_LONGEST_S = 20.0
# Answers that nobody reads take megabytes for as long as they last, and an allocator keeps its peaks.
MAX_STEPS_BYTES = 16 << 20
_PATTERNS = ("([a-z]{2,9}, ){100,}x", r"(\{\"n\": [0-9]{1,3}\}\n){100,}x", "((yes|no|perhaps)[,.] ){100,}x")
_BUDGET = aiohttp.ClientTimeout(total=240.0)


@dataclass(slots=True)
class Phase:
    """What the two tenants saw in all turns of a kind.

    Attributes:
        gaps_s: between two tokens of streams without a grammar.
        small_ttfts_s: first tokens of the small tenant.
    """

    num_streams: int = 0
    gaps_s: list[float] = field(default_factory=list)
    small_ttfts_s: list[float] = field(default_factory=list)
    took_s: float = 0.0

    def summary(self) -> str:
        """Say it in a line."""
        itl, ttft = ([percentile(v, share) * 1e3 for share in (0.5, 0.99)] for v in (self.gaps_s, self.small_ttfts_s))
        return (
            f"{self.num_streams} streams in {self.took_s:.0f} s, ITL p50 {itl[0]:.1f}, p99 {itl[1]:.1f} ms, "
            f"the small tenant's TTFT p50 {ttft[0]:.0f}, p99 {ttft[1]:.0f} ms"
        )


@dataclass(slots=True)
class SiegeReport:
    """What a siege showed.

    Attributes:
        kinds: faults sent, by kind.
        num_explicit: streams that ended with one explicit error.
        num_refused: answers that told the large tenant to come back later, which it did.
    """

    peace: Phase = field(default_factory=Phase)
    siege: Phase = field(default_factory=Phase)
    kinds: dict[str, int] = field(default_factory=dict)
    ends: Ends = field(default_factory=Ends)
    watch: Watch = field(default_factory=lambda: Watch(max_steps_bytes=MAX_STEPS_BYTES, counts_from=JUDGED_FROM))
    num_explicit: int = 0
    num_refused: int = 0
    took_s: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def itl_ratio(self) -> float:
        """The 99th percentile of waits between two tokens, in sieges over in peace."""
        return percentile(self.siege.gaps_s, 0.99) / max(1e-9, percentile(self.peace.gaps_s, 0.99))

    def weigh(self, itl_target: float, small_p95_s: float) -> None:
        """Hold times against their targets."""
        ttfts_s = self.siege.small_ttfts_s
        p95_s, longest_s = percentile(ttfts_s, 0.95), max(ttfts_s, default=0.0)
        said = [
            (self.itl_ratio > itl_target, f"the p99 ITL grew to {self.itl_ratio:.2f}x, at most {itl_target:g}x"),
            (p95_s > small_p95_s, f"the small tenant's p95 TTFT is {p95_s:.1f} s"),
            (longest_s > SMALL_LONGEST_S, f"the small tenant waited for {longest_s:.1f} s"),
        ]
        self.faults += [words for is_so, words in said if is_so]

    def summary(self) -> str:
        """Say it in a paragraph."""
        num, kinds = (
            self.peace.num_streams + self.siege.num_streams,
            ", ".join(f"{n} {k}" for k, n in self.kinds.items()),
        )
        return (
            f"siege: {sum(self.kinds.values())} faults ({kinds}); {self.ends.summary()}; in peace "
            f"{self.peace.summary()}; besieged {self.siege.summary()} (ITL p99 {self.itl_ratio:.2f}x); "
            f"{self.num_explicit} ended with one explicit error, {self.num_refused} refusals of a flood; wrong: "
            f"{bound(len(self.faults), num)}; memory: {self.watch.summary()}; {self.took_s:.0f} s"
            + "".join(f"\n  {fault}" for fault in self.faults)
        )


def key_of(tenant: str) -> str:
    """Return the key of a tenant."""
    return f"sk-{tenant}"


def bearer(tenant: str) -> dict[str, str]:
    """Return the headers that show a tenant's key."""
    return {"Authorization": f"Bearer {key_of(tenant)}"}


def options(folder: Path) -> list[str]:
    """Return what the server of a siege needs: a file of keys, and little patience with who does not read."""
    keys = folder / "keys.txt"
    keys.write_text("".join(f"{key_of(tenant)} {tenant}\n" for tenant in (LARGE, SMALL, THIRD)))
    return [f"--api-key-file={keys}", f"--client-stall-s={STALL_S}"]


def pool(seed: int, num_requests: int) -> list[Request]:
    """Draw the innocent requests; every fifth obeys a pattern that has no end."""
    drawn = draw_pool(seed, num_requests, (8, 40))
    return [
        dataclasses.replace(request, regex=_PATTERNS[i // 5 % len(_PATTERNS)]) if i % 5 == 4 else request
        for i, request in enumerate(drawn)
    ]


def session(tenant: str) -> aiohttp.ClientSession:
    """Return a client session that shows a tenant's key."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=_BUDGET, headers=bearer(tenant))


class Patient(Ledger):
    """Streams requests, and asks again where it was told to come back later.

    Attributes:
        num_refused: how often that was.
    """

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        super().__init__(http, url)
        self.num_refused = 0

    async def stream(self, request: Request, record: Record | None = None) -> Record:
        """Read one stream to its end; its time begins when it was asked first."""
        record, begun_s = record or Record(request), time.monotonic()
        for _ in range(MAX_REFUSALS):
            await super().stream(request, record)
            if record.status != 429 or record.retry_after is None:
                break
            self.num_refused += 1
            await asyncio.sleep(min(float(record.retry_after), LONGEST_REFUSAL_S))
            record.errors.clear()
            record.num_ends = record.status = 0
        record.begun_s = begun_s
        return record


class Siege:
    """The turns of one campaign on a server that is there for it alone.

    Args:
        ledgers: of each tenant, each with its key.
        oracles: what each innocent request answers in peace.
    """

    def __init__(
        self, cluster: Cluster, ledgers: Mapping[str, Patient], oracles: Mapping[Request, Sequence[int]], seed: int
    ) -> None:
        self.report = SiegeReport()
        self._cluster = cluster
        self._ledgers = ledgers
        self._oracles = oracles
        self._dice = random.Random(f"siege {seed}")
        self._phase, self._num_wanted = self.report.peace, 0
        self._others = Tally()
        self._next_flood_s = time.monotonic()
        large = ledgers[LARGE]
        # A kill of everybody may end a stream with one explicit error.
        self._loop = ClosedLoop(large, oracles, self._dice, width=WIDTH, may_fail=True, on_done=self._note)
        self._nemesis = Nemesis(cluster, self._loop, large, seed)
        self.report.kinds = self._nemesis.kinds

    async def run(self, num_requests: int, tell: Callable[[str], None]) -> SiegeReport:
        """Alternate turns until `num_requests` of the two tenants have ended in sieges; leave the cluster whole."""
        begin_s, report = time.monotonic(), self.report
        report.faults += await self._cluster.aftermath()
        num_turns = max(1, round(num_requests / REQUESTS_PER_TURN))
        striking = asyncio.create_task(self._nemesis.run())
        for number in range(num_turns):
            num_wanted = (number + 1) * num_requests // num_turns
            await self._turn(max(1, round(PEACE_SHARE * num_wanted)), report.peace)
            await self._turn(num_wanted, report.siege)
            tell(
                f"turn {number + 1} of {num_turns}, {time.monotonic() - begin_s:.0f} s: in peace "
                f"{report.peace.summary()}; besieged {report.siege.summary()}; {report.ends.counts.total()} hostile, "
                f"{sum(report.kinds.values())} faults, {self._num_wrong} wrong"
            )
        self._nemesis.is_ending = True
        striking.cancel()
        (ended,) = await asyncio.gather(striking, return_exceptions=True)
        if ended is not None and not isinstance(ended, asyncio.CancelledError):
            report.faults.append(f"the siege's own fault: {ended!r}")
        await self._nemesis.settle()
        await self._close(begin_s)
        return report

    @property
    def _num_wrong(self) -> int:
        mine = (self._loop.tally, self._others, self._nemesis, self.report.ends)
        return sum(len(who.faults) for who in mine)

    async def _close(self, begin_s: float) -> None:
        report = self.report
        tallies = (self._loop.tally, self._others)
        report.num_refused = self._ledgers[LARGE].num_refused
        if (num_refused := self._ledgers[SMALL].num_refused) > 0:
            report.faults.append(f"the small tenant was refused {num_refused} times")
        report.num_explicit = sum(tally.num_explicit for tally in tallies)
        for who in (*tallies, self._nemesis, report.ends):
            report.faults += who.faults
        report.faults += await self._cluster.aftermath()
        report.watch.weigh(report.siege.num_streams, LASTING)
        report.faults += report.watch.faults
        report.took_s = time.monotonic() - begin_s

    async def _turn(self, num_wanted: int, phase: Phase) -> None:
        """Let all tenants ask until so many streams of the two have ended in turns of this kind."""
        begin_s, is_over, is_siege = time.monotonic(), asyncio.Event(), phase is self.report.siege
        self._phase, self._num_wanted = phase, num_wanted
        third = Besiegers(
            self._ledgers[THIRD],
            self._cluster.server.url,
            key_of(THIRD),
            STALL_S,
            random.Random(self._dice.random()),
            self.report.ends if is_siege else None,
        )
        watching = asyncio.create_task(self._watch()) if is_siege else None
        async with asyncio.TaskGroup() as beside:
            beside.create_task(self._ask_little(is_over))
            beside.create_task(self._flood(is_over))
            beside.create_task(third.run(is_over.is_set))
            await self._loop.run(max(0, num_wanted - phase.num_streams))
            is_over.set()
        if watching is not None:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        phase.took_s += time.monotonic() - begin_s

    async def _watch(self) -> None:
        try:
            await self.report.watch.run(self._cluster, lambda: self.report.siege.num_streams)
        except Exception as error:  # noqa: BLE001  the turn is to end all the same
            self.report.faults.append(f"the watch stopped: {error!r}")

    async def _ask_little(self, is_over: asyncio.Event) -> None:
        """Let the small tenant ask one request after the other."""
        while not is_over.is_set():
            record = Record(self._dice.choice(self._loop.pool))
            await self._ledgers[SMALL].stream(record.request, record)
            self._judge(record)
            if record.ttft_s is not None:
                self._phase.small_ttfts_s.append(record.ttft_s)
            await asyncio.sleep(self._dice.uniform(0.1, 0.5))

    async def _flood(self, is_over: asyncio.Event) -> None:
        """Let the large tenant ask for much at once, again and again; turns of either kind have as many by time."""
        while not is_over.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(self._next_flood_s - time.monotonic()):
                    await is_over.wait()
                    return
            self._next_flood_s = time.monotonic() + self._dice.uniform(0.5, 1.5) * FLOOD_EVERY_S
            records = [Record(request) for request in self._dice.choices(self._loop.pool, k=NUM_FLOOD)]
            await asyncio.gather(*(self._ledgers[LARGE].stream(record.request, record) for record in records))
            for record in records:
                self._judge(record)

    def _judge(self, record: Record) -> None:
        self._others.add(record, self._oracles[record.request], may_fail=True)
        self._note(record)

    def _note(self, record: Record) -> None:
        self._phase.num_streams += 1
        if self._phase.num_streams >= self._num_wanted:
            self._loop.begin_no_more()
        if not record.request.regex:
            gaps = [b - a for a, b in zip(record.times_s, record.times_s[1:], strict=False)]
            self._phase.gaps_s.extend(gaps[NUM_FIRST_GAPS:])


async def run(
    cluster: Cluster,
    oracles: Mapping[Request, Sequence[int]],
    seed: int,
    num_requests: int,
    tell: Callable[[str], None],
) -> SiegeReport:
    """Besiege a server that has the tenants of `options`."""
    url = cluster.server.url
    async with session(LARGE) as large, session(SMALL) as small, session(THIRD) as third:
        ledgers = {tenant: Patient(http, url) for tenant, http in ((LARGE, large), (SMALL, small), (THIRD, third))}
        report = await Siege(cluster, ledgers, oracles, seed).run(num_requests, tell)
        async with large.get(f"{url}/census") as response:
            census = await response.json()
    if not census["is_balanced"] or any(census["requests"].values()):
        report.faults.append(f"at the end the router's census is {census['requests']}, {census['is_balanced']=}")
    return report
