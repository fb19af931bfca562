"""Looking at a running cluster from outside, and prefill workers killed in a phase that is known, not guessed.

    prompt sent ──► in compute ──first piece lands──► mid-transfer ──COMMIT──► landed ──LANDED──► released

1. A trial's prompt is long and its own, so that no prefix is cached; two companions decode beside it.
2. The moment is drawn from the share of the usual time to first token that the aimed phase takes. The time between
   COMMIT and release is too short to hit from outside: prefill workers notice LANDED late (mutation `late-landed`).
3. What the kill hit follows from what was seen: the first token was there and no transfer failed = after COMMIT; else
   more bytes arrived than landed blocks have = mid-transfer, or no more = in compute. After COMMIT, the own census of
   the prefill worker an instant before its death tells whether it still held the blocks.
4. The oracle is asked afterwards, so that the trial's prompt was new to everybody. Kills repeat until each phase has
   its number of hits, or the attempts are used up.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.e2e.server import Server
from tests.faults.ledger import Ledger, Record, Request
from tests.faults.load import draw_pool, long_prompt, percentile

COMPUTE, TRANSFER, COMMITTED = "in-compute", "mid-transfer", "after-commit"
PHASES = (COMPUTE, TRANSFER, COMMITTED)
WHOLE_BUDGET_S = 90.0
QUIET_BUDGET_S = 2.0
COMMITTED_WITHIN_S = 0.08
TOKEN_ON_ITS_WAY_S = 0.03
ATTEMPTS_PER_HIT = 6
NUM_COMPANIONS = 2
_ADMIN = re.compile(rb"admin of (\S+) on \('([^']+)', (\d+)\)")


class Cluster:
    """What a server's processes say of themselves, asked without blocking the event loop of the streams.

    Args:
        num_workers: of each role when it is whole.
    """

    def __init__(self, server: Server, http: aiohttp.ClientSession, num_workers: dict[str, int]) -> None:
        self.server = server
        self.num_workers = num_workers
        self._http = http
        self._admin: dict[str, str] = {}
        self._log_bytes = 0
        self._killed: set[tuple[int, int]] = set()

    async def workers(self, role: str | None = None) -> list[dict[str, Any]]:
        """Return the router's census of the workers that it knows, without those killed from here."""
        async with self._http.get(f"{self.server.url}/census") as response:
            found: list[dict[str, Any]] = (await response.json())["workers"]
        return [w for w in found if (w["pid"], w["instance"]) not in self._killed and role in (None, w["role"])]

    async def own_census(self, worker: dict[str, Any]) -> dict[str, Any] | None:
        """Return a worker's own census as of now, or None if it does not answer."""
        self._read_log()
        address = self._admin.get(worker["worker_id"])
        if address is None:
            return None
        try:
            async with self._http.get(f"{address}/census", timeout=aiohttp.ClientTimeout(total=1.0)) as response:
                census: dict[str, Any] = await response.json()
        except (aiohttp.ClientError, TimeoutError):
            return None
        return census if census["instance"] == worker["instance"] else None

    async def placements(self, role: str) -> list[tuple[dict[str, Any], int]]:
        """Return the workers of a role, each with the placements that it holds now."""
        workers = await self.workers(role)
        found = await asyncio.gather(*(self.own_census(worker) for worker in workers))
        return [(w, census["num_placements"]) for w, census in zip(workers, found, strict=True) if census is not None]

    async def num_tasks(self) -> dict[str, int]:
        """Return the asyncio tasks of the router and of each worker by name, of those whose census tells them."""
        async with self._http.get(f"{self.server.url}/census") as response:
            found = {"router": await response.json()}
        workers = await self.workers()
        own = await asyncio.gather(*(self.own_census(worker) for worker in workers))
        found |= {worker["worker_id"]: census or {} for worker, census in zip(workers, own, strict=True)}
        return {name: int(census["num_tasks"]) for name, census in found.items() if "num_tasks" in census}

    def kill(self, worker: dict[str, Any]) -> None:
        """SIGKILL a worker."""
        # By instance too: the kernel gives the number of a dead process away again.
        self._killed.add((worker["pid"], worker["instance"]))
        self.send(worker, signal.SIGKILL)

    def send(self, worker: dict[str, Any], number: signal.Signals) -> None:
        """Send a worker a signal, if it still lives."""
        try:
            os.kill(worker["pid"], number)
        except ProcessLookupError:
            return

    async def is_whole(self) -> bool:
        """Whether every worker is registered, and every decode worker linked to every prefill worker."""
        found = await self.workers()
        roles = Counter(worker["role"] for worker in found)
        links = [len(worker["links"]) for worker in found if worker["role"] == "decode"]
        return roles == self.num_workers and all(num == self.num_workers["prefill"] for num in links)

    async def aftermath(self) -> list[str]:
        """Wait until the cluster is whole and quiet; say what is not as it was."""
        if not await within(WHOLE_BUDGET_S, self.is_whole):
            return [f"not whole within {WHOLE_BUDGET_S} s: {[w['worker_id'] for w in await self.workers()]}"]
        return await self.not_at_rest()

    async def not_at_rest(self) -> list[str]:
        """Wait until no worker that is here holds anything; say who does."""
        if await within(QUIET_BUDGET_S, self._is_quiet):
            return []
        censuses = [await self.own_census(worker) for worker in await self.workers()]
        return [f"{QUIET_BUDGET_S} s after the last stream a census is {c}" for c in censuses if not is_at_rest(c)]

    async def _is_quiet(self) -> bool:
        return all([is_at_rest(await self.own_census(worker)) for worker in await self.workers()])

    async def heard_from_all(self, since_s: float) -> list[dict[str, Any]]:
        """Return the router's census once every worker has reported after this moment of the monotonic clock."""
        while True:
            found, now_s = await self.workers(), time.monotonic()
            if all(now_s - worker["heard_s_ago"] > since_s for worker in found):
                return found
            await asyncio.sleep(0.05)

    def _read_log(self) -> None:
        with self.server.log.open("rb") as file:
            file.seek(self._log_bytes)
            fresh = file.read()
        fresh = fresh[: fresh.rfind(b"\n") + 1]
        self._log_bytes += len(fresh)
        for worker_id, host, port in _ADMIN.findall(fresh):
            self._admin[worker_id.decode()] = f"http://{host.decode()}:{port.decode()}"


def is_at_rest(census: dict[str, Any] | None) -> bool:
    """Whether a worker holds nothing, and its blocks add up."""
    if census is None:
        return False
    blocks = census["blocks"]
    return bool(blocks["leased"] == 0 and blocks["free"] + blocks["cached"] == blocks["total"])


async def within(budget_s: float, holds: Callable[[], Awaitable[bool]]) -> bool:
    """Poll until it holds; say whether it did within the budget."""
    deadline_s = time.monotonic() + budget_s
    while not await holds():
        if time.monotonic() > deadline_s:
            return False
        await asyncio.sleep(0.05)
    return True


@dataclass(frozen=True, slots=True)
class Strike:
    """A kill: when, and whether its victim held blocks an instant before."""

    at_s: float
    was_held: bool


@dataclass(slots=True)
class PhaseReport:
    """What kills of prefill workers showed.

    Attributes:
        hits: kills by the phase that they hit in truth; `misses` hit a worker that held nothing any more.
        num_held: of the kills after COMMIT, those whose victim still held the blocks.
        faults: what was wrong, in words, with the seed.
        ttfts_s: time to first token of the prompts that were hit before it, by phase.
    """

    hits: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    misses: int = 0
    num_held: int = 0
    num_streams: int = 0
    faults: list[str] = field(default_factory=list)
    ttfts_s: dict[str, list[float]] = field(default_factory=dict)
    usual_ttft_s: float = 0.0


class PhaseKills:
    """Runs trials of one campaign on a server that is left alone otherwise."""

    def __init__(self, cluster: Cluster, ledger: Ledger, seed: int) -> None:
        self.report = PhaseReport()
        self._cluster = cluster
        self._ledger = ledger
        self._seed = seed
        self._block_bytes = 0.0
        self._companions: dict[Request, list[int]] = {}

    async def run(
        self, num_hits: int, tell: Callable[[str], None], first: int = 0, aims: Sequence[str] = PHASES
    ) -> PhaseReport:
        """Kill until each phase of `aims` was hit so often; each trial follows from (seed, its number, its aim)."""
        await self._measure()
        limit = ATTEMPTS_PER_HIT * num_hits * len(aims)
        for number in range(first, first + limit):
            open_phases = [phase for phase in aims if self.report.hits[phase] < num_hits]
            if not open_phases:
                break
            begin_s = time.monotonic()
            aimed = open_phases[number % len(open_phases)]
            hit, faults = await self._trial(aimed, random.Random(f"phases {self._seed} {number}"))
            name = f"trial {number} of seed {self._seed}, aimed {aimed}, hit {hit or 'nothing'}"
            again = f"again by: phases --seed {self._seed} --first {number} --aims {aimed} --trials 1"
            self.report.faults += [f"{name}: {fault} ({again})" for fault in faults]
            tell(f"{name}, {time.monotonic() - begin_s:.1f} s: {'; '.join(faults) or 'fine'}")
        self.report.faults += await self._cluster.aftermath()
        for phase in aims:
            if self.report.hits[phase] < num_hits:
                self.report.faults.append(f"{phase}: hit {self.report.hits[phase]} of {num_hits} in {limit} attempts")
        return self.report

    def _request(self, dice: random.Random, num_words: int, max_tokens: int) -> Request:
        prompt = long_prompt(dice, num_words)
        return Request(prompt, max_tokens, dice.choice([0.0, 0.8]), dice.randrange(1 << 30))

    async def _measure(self) -> None:
        """Learn the usual time to first token, and the bytes of a block, from prompts in peace."""
        for request in draw_pool(self._seed, NUM_COMPANIONS, (128, 128)):
            self._companions[request] = await self._ledger.oracle(request)
        ttfts, dice = [], random.Random(f"peace {self._seed} {time.time_ns()}")
        for _ in range(3):
            record = await self._ledger.stream(self._request(dice, 850, 4))
            ttfts.append(record.ttft_s or 0.0)
        self.report.usual_ttft_s = percentile(ttfts, 0.5)
        bytes_, blocks, _ = await self._moved()
        assert blocks, "prompts in peace moved no block"
        self._block_bytes = bytes_ / blocks

    async def _moved(self) -> tuple[int, int, int]:
        """Return bytes received, blocks landed and transfers broken or called off, of all decode workers by now."""
        found = await self._cluster.heard_from_all(time.monotonic())
        # The router may call off what its worker's death broke before the decode worker has noticed it.
        names = ("num_bytes_transferred", "num_blocks_transferred", "num_transfers_failed", "num_transfers_cancelled")
        decodes = [worker for worker in found if worker["role"] == "decode"]
        bytes_, blocks, failed, cancelled = (sum(int(worker[name]) for worker in decodes) for name in names)
        return bytes_, blocks, failed + cancelled

    async def _trial(self, aimed: str, dice: random.Random) -> tuple[str | None, list[str]]:
        faults = await self._ready()
        companions = [Record(request) for request in self._companions]
        probe = Record(self._request(dice, dice.randint(600, 1100), 24))
        tasks = [asyncio.create_task(self._ledger.stream(r.request, r)) for r in companions]
        await within(10.0, lambda: _all_begun(companions))
        before = await self._moved()
        tasks.append(asyncio.create_task(self._ledger.stream(probe.request, probe)))
        strike = await self._strike(aimed, probe, dice)
        await tasks[-1]
        phase = None if strike is None else self._phase_of(strike, probe, before, await self._moved())
        await asyncio.gather(*tasks)
        self._count(phase, strike is not None and strike.was_held, probe)
        for record in companions:
            faults += record.faults(self._companions[record.request])
        faults += probe.faults(await self._ledger.oracle(probe.request))
        self.report.num_streams += len(companions) + 1
        return phase, faults

    async def _ready(self) -> list[str]:
        """Wait for two prefill workers that every decode worker is linked to; say who still holds what."""

        async def holds() -> bool:
            workers = await self._cluster.workers()
            links = [set(worker["links"]) for worker in workers if worker["role"] == "decode"]
            return len(links) == self._cluster.num_workers["decode"] and len(set.intersection(*links)) > 1

        if not await within(WHOLE_BUDGET_S, holds):
            return [f"not two prefill workers within {WHOLE_BUDGET_S} s"]
        return await self._cluster.not_at_rest()

    async def _strike(self, aimed: str, probe: Record, dice: random.Random) -> Strike | None:
        """Kill the worker that prefills the probe; return None if there was none any more."""
        usual_s, share = self.report.usual_ttft_s, dice.random()
        if aimed == COMMITTED:
            return await self._kill_committed(probe, share)
        await asyncio.sleep(usual_s * (0.12 * share if aimed == COMPUTE else 0.25 + 0.75 * share))
        return await self._kill_busy()

    async def _kill_committed(self, probe: Record, share: float) -> Strike | None:
        while not probe.times_s and not probe.ended_s:
            await asyncio.sleep(0.001)
        await asyncio.sleep(COMMITTED_WITHIN_S * share)
        return await self._kill_busy()

    async def _kill_busy(self) -> Strike | None:
        for worker in await self._cluster.workers("prefill"):
            census = await self._cluster.own_census(worker)
            if census is not None and (census["num_placements"] or census["blocks"]["leased"]):
                self._cluster.kill(worker)
                return Strike(time.monotonic(), bool(census["blocks"]["leased"]))
        return None

    def _phase_of(self, strike: Strike, probe: Record, before: tuple[int, ...], after: tuple[int, ...]) -> str:
        bytes_, blocks, num_failed = (b - a for a, b in zip(before, after, strict=True))
        # A first token on its way when its sender died arrives within ms; one computed again does not.
        had_token = bool(probe.times_s) and probe.times_s[0] < strike.at_s + TOKEN_ON_ITS_WAY_S
        if had_token and num_failed == 0:
            return COMMITTED
        return TRANSFER if bytes_ > blocks * self._block_bytes else COMPUTE

    def _count(self, phase: str | None, was_held: bool, probe: Record) -> None:
        if phase is None:
            self.report.misses += 1
            return
        self.report.hits[phase] += 1
        self.report.num_held += phase == COMMITTED and was_held
        self.report.ttfts_s.setdefault(phase, []).append(probe.ttft_s or 0.0)


async def _all_begun(records: list[Record]) -> bool:
    return all(record.times_s or record.ended_s for record in records)
