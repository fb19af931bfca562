"""Clients that leave, in every phase of their requests; two seconds after the last nobody may hold anything.

    queued ──► in prefill ──► first token, while its blocks are moved ──► decode
       └──────────────┴───────── the client leaves here ─────────────┴──────┘

1. Some forty clients at once, arriving without waiting for each other. Phase, prompt and moment follow from the seed.
2. Half of them drop their connection with a reset, half with an ordinary close.
3. Two seconds after the last: every worker's own census. Nobody dies here, so no process's memory, descriptors, threads
   or tasks may grow; the first part warms up caches and is not counted.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import aiohttp

from tests.faults.footprints import Watch
from tests.faults.heap import Heap
from tests.faults.ledger import Ledger, Record, Request
from tests.faults.load import bound, long_prompt, percentile
from tests.faults.phases import Cluster, is_at_rest

QUEUED, PREFILL, TRANSFER, DECODE = "queued", "prefill", "transfer", "decode"
PHASES = (QUEUED, PREFILL, TRANSFER, DECODE)
NUM_AT_ONCE = 40
WARM_SHARE = 0.2
NUM_PARTS = 4
REST_BUDGET_S = 2.0
LASTING = ("router", "supervisor")
_ABORT = struct.pack("ii", 1, 0)


@dataclass(slots=True)
class DisconnectReport:
    """What a storm of disconnects left behind.

    Attributes:
        num_left: clients that left, by the phase that they saw themselves in.
        num_finished: those whose answer was over before they could leave; `num_refused` were answered with an error.
        watch: what the processes took.
        rest_s: how long after the last disconnect nothing was held.
    """

    num_left: dict[str, int] = field(default_factory=dict)
    num_finished: int = 0
    num_refused: int = 0
    watch: Watch = field(default_factory=Watch)
    rest_s: float | None = None
    took_s: float = 0.0
    faults: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Say it in a paragraph."""
        num_left = sum(self.num_left.values())
        rest = "never" if self.rest_s is None else f"{self.rest_s:.2f} s after the last"
        phases = ", ".join(f"{num} {phase}" for phase, num in self.num_left.items())
        return (
            f"disconnects: {num_left} clients left ({phases}), {self.num_finished} were answered before, "
            f"{self.num_refused} refused; at rest {rest}; wrong: {bound(len(self.faults), num_left)}; "
            f"{self.watch.summary()}; {self.took_s:.0f} s"
        )


class Storm:
    """One storm: `run` sends so many clients and returns when the last has left."""

    def __init__(self, ledger: Ledger, url: str, seed: int, report: DisconnectReport) -> None:
        self._ledger = ledger
        self._url = url
        self._seed = seed
        self._report = report
        self._ttfts_s = [0.5]
        self.num_over = 0

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
        self.num_over += 1
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
    cluster: Cluster,
    ledger: Ledger,
    seed: int,
    num_clients: int,
    tell: Callable[[str], None],
    heap: Heap | None = None,
) -> DisconnectReport:
    """Send `num_clients` clients that leave, then look at what is held; `heap` is looked at in between."""
    begin_s, report = time.monotonic(), DisconnectReport()
    report.faults += await cluster.aftermath()
    storm = Storm(ledger, cluster.server.url, seed, report)
    watching = asyncio.create_task(report.watch.run(cluster, lambda: storm.num_over))
    num_warm = int(WARM_SHARE * num_clients)
    ends = [num_warm + (num_clients - num_warm) * part // NUM_PARTS for part in range(NUM_PARTS + 1)]
    for begin, end in pairwise([0, *ends]):
        await storm.run(begin, end)
        tell(f"{end} clients have left, {time.monotonic() - begin_s:.0f} s")
        if heap is not None:
            await heap.look(end)
    last_s = time.monotonic()
    while not await _is_at_rest(cluster):
        if time.monotonic() - last_s > REST_BUDGET_S:
            held = [await cluster.own_census(worker) for worker in await cluster.workers()]
            report.faults.append(f"{REST_BUDGET_S} s after the last disconnect: {[c for c in held if c]}")
            break
        await asyncio.sleep(0.02)
    else:
        report.rest_s = time.monotonic() - last_s
    watching.cancel()
    (ended,) = await asyncio.gather(watching, return_exceptions=True)
    if not isinstance(ended, asyncio.CancelledError):
        report.faults.append(f"the watch stopped: {ended!r}")
    names = [str(worker["worker_id"]) for worker in await cluster.workers()]
    report.watch.weigh(storm.num_over, (*LASTING, *names), WARM_SHARE)
    report.faults += report.watch.faults
    report.took_s = time.monotonic() - begin_s
    return report


async def _is_at_rest(cluster: Cluster) -> bool:
    workers = await cluster.workers()
    return bool(workers) and all([is_at_rest(await cluster.own_census(worker)) for worker in workers])
