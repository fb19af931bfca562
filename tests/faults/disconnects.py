"""Clients that leave, in every phase of their requests; two seconds after the last nobody may hold anything.

    queued ──► in prefill ──► first token, while its blocks are moved ──► decode
       └──────────────┴───────── the client leaves here ─────────────┴──────┘

1. Some forty clients at once, arriving without waiting for each other. Phase, prompt and moment follow from the seed.
2. Half of them drop their connection with a reset, half with an ordinary close.
3. Two seconds after the last: every worker's own census. Memory and descriptors of all processes before and after; the
   first part warms up caches and is not counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from tests.faults.ledger import Ledger, Record, Request
from tests.faults.load import bound, long_prompt, percentile
from tests.faults.phases import Cluster, is_at_rest

QUEUED, PREFILL, TRANSFER, DECODE = "queued", "prefill", "transfer", "decode"
PHASES = (QUEUED, PREFILL, TRANSFER, DECODE)
NUM_AT_ONCE = 40
WARM_SHARE = 0.2
REST_BUDGET_S = 2.0
MAX_DESCRIPTOR_GROWTH = 8
_ABORT = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a process takes."""

    rss_bytes: int
    num_descriptors: int
    num_threads: int


def footprint(pid: int) -> Footprint | None:
    """Return what a process takes now, or None if it is gone."""
    try:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        num_descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return None
    if "VmRSS" not in fields:
        return None
    return Footprint(int(fields["VmRSS"].split()[0]) << 10, num_descriptors, int(fields["Threads"]))


async def process_ids(cluster: Cluster) -> dict[str, int]:
    """Return the pids of a whole cluster by name: the supervisor, the router and every worker."""
    found = {str(worker["worker_id"]): int(worker["pid"]) for worker in await cluster.workers()}
    found["supervisor"] = cluster.server.process.pid
    # A process may vanish while /proc is read.
    with contextlib.suppress(OSError):
        found.update((role, pid) for role, pid in cluster.server.children().items() if role == "router")
    return found


@dataclass(slots=True)
class DisconnectReport:
    """What a storm of disconnects left behind.

    Attributes:
        num_left: clients that left, by the phase that they saw themselves in.
        num_finished: those whose answer was over before they could leave; `num_refused` were answered with an error.
        before, after: footprints of each process, once warm and at the end.
        rest_s: how long after the last disconnect nothing was held.
    """

    num_left: dict[str, int] = field(default_factory=dict)
    num_finished: int = 0
    num_refused: int = 0
    before: dict[str, Footprint] = field(default_factory=dict)
    after: dict[str, Footprint] = field(default_factory=dict)
    rest_s: float | None = None
    took_s: float = 0.0
    faults: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Say it in a paragraph."""
        num_left = sum(self.num_left.values())
        grown = ", ".join(
            f"{name} {(self.after[name].rss_bytes - one.rss_bytes) / 2**20:+.1f} MiB "
            f"{self.after[name].num_descriptors - one.num_descriptors:+d} fds"
            for name, one in self.before.items()
            if name in self.after
        )
        rest = "never" if self.rest_s is None else f"{self.rest_s:.2f} s after the last"
        phases = ", ".join(f"{num} {phase}" for phase, num in self.num_left.items())
        return (
            f"disconnects: {num_left} clients left ({phases}), {self.num_finished} were answered before, "
            f"{self.num_refused} refused; at rest {rest}; wrong: {bound(len(self.faults), num_left)}; since warm: "
            f"{grown}; {self.took_s:.0f} s"
        )


class Storm:
    """One storm: `run` sends so many clients and returns when the last has left."""

    def __init__(self, ledger: Ledger, url: str, seed: int, report: DisconnectReport) -> None:
        self._ledger = ledger
        self._url = url
        self._seed = seed
        self._report = report
        self._ttfts_s = [0.5]

    async def run(self, begin: int, end: int) -> None:
        """Send the clients of these numbers, some forty at once."""
        gate = asyncio.Semaphore(NUM_AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for number in range(begin, end):
                await gate.acquire()
                task = group.create_task(self._client(number))
                task.add_done_callback(lambda _: gate.release())

    async def _client(self, number: int) -> None:
        dice = random.Random(f"disconnect {self._seed} {number}")
        record = Record(
            Request(long_prompt(dice, dice.randint(10, 300)), dice.randint(32, 128), 0.8, dice.randrange(1 << 30))
        )
        phase, wish, is_rude = dice.choice(PHASES), dice.random(), dice.random() < 0.5
        # A session of its own: the socket that is dropped is nobody else's.
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as http:
            ledger = Ledger(http, self._url)
            task = asyncio.create_task(ledger.stream(record.request, record))
            await self._until(phase, wish, record)
            if not record.ended_s and is_rude and http.connector is not None:
                _reset(http.connector)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._count(record)

    async def _until(self, phase: str, wish: float, record: Record) -> None:
        usual_s = percentile(self._ttfts_s, 0.5)
        if phase in (QUEUED, PREFILL):
            await asyncio.sleep(wish * 0.01 if phase == QUEUED else wish * usual_s)
            return
        num_tokens = 1 if phase == TRANSFER else 2 + int(wish * (record.request.max_tokens - 4))
        while len(record.token_ids) < num_tokens and not record.ended_s:
            await asyncio.sleep(0.001)
        await asyncio.sleep(wish * 0.003)

    def _count(self, record: Record) -> None:
        if record.ttft_s is not None:
            self._ttfts_s = [*self._ttfts_s[-63:], record.ttft_s]
        if record.is_done:
            self._report.num_finished += 1
        elif record.status >= 400:
            self._report.num_refused += 1
        else:
            seen = len(record.token_ids)
            name = "before a token" if not seen else "at the first" if seen == 1 else "in decode"
            self._report.num_left[name] = self._report.num_left.get(name, 0) + 1
        self._report.faults += [e for e in record.errors if e.startswith(("error event", "HTTP 5", "no end"))]


def _reset(connector: aiohttp.BaseConnector) -> None:
    """Let the sockets of a session end with a reset instead of a polite end."""
    for protocol in list(connector._acquired):
        if protocol.transport is not None:
            sock = protocol.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)


async def run(
    cluster: Cluster, ledger: Ledger, seed: int, num_clients: int, tell: Callable[[str], None]
) -> DisconnectReport:
    """Send `num_clients` clients that leave, then look at what is held."""
    begin_s, report = time.monotonic(), DisconnectReport()
    report.faults += await cluster.aftermath()
    storm, num_warm = Storm(ledger, cluster.server.url, seed, report), int(WARM_SHARE * num_clients)
    await storm.run(0, num_warm)
    report.before = await _footprints(cluster)
    tell(f"{num_warm} clients to warm up, {time.monotonic() - begin_s:.0f} s")
    await storm.run(num_warm, num_clients)
    last_s = time.monotonic()
    while not await _is_at_rest(cluster):
        if time.monotonic() - last_s > REST_BUDGET_S:
            held = [await cluster.own_census(worker) for worker in await cluster.workers()]
            report.faults.append(f"{REST_BUDGET_S} s after the last disconnect: {[c for c in held if c]}")
            break
        await asyncio.sleep(0.02)
    else:
        report.rest_s = time.monotonic() - last_s
    report.after = await _footprints(cluster)
    for name, one in report.before.items():
        grown = report.after[name].num_descriptors - one.num_descriptors if name in report.after else 0
        if grown > MAX_DESCRIPTOR_GROWTH:
            report.faults.append(f"{name} has {grown} descriptors more than before")
    report.took_s = time.monotonic() - begin_s
    return report


async def _is_at_rest(cluster: Cluster) -> bool:
    workers = await cluster.workers()
    return bool(workers) and all([is_at_rest(await cluster.own_census(worker)) for worker in workers])


async def _footprints(cluster: Cluster) -> dict[str, Footprint]:
    found = {name: footprint(pid) for name, pid in (await process_ids(cluster)).items()}
    return {name: one for name, one in found.items() if one is not None}
