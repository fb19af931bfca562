"""Clients that do not read their answers: each is cut, nothing of it is kept, and nobody else notices.

    never    reads nothing                     a byte   reads one now and then
    head     reads the head, then nothing      half     closes its own half, and reads nothing

1. Some forty clients at once, on sockets with small buffers; what each asks for and how it reads follow from the seed.
2. Beside them one stream is read again and again: it must say what it said in peace.
3. All of them hold their sockets open until the router has let go of theirs, or the budget is over. Then: descriptors
   as before, and memory flat once the first part has warmed up.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.ledger import Ledger, Request
from tests.faults.phases import Cluster

STALL_S = 2.0
NUM_AT_ONCE = 40
# Beyond the stall: forty long texts have to be tokenised and shaped first.
CUT_BUDGET_S = 60.0
WARM_CLIENTS = 80
MAX_GROWTH_BYTES = 32 << 20
MANNERS = ("never", "a byte", "head", "half")
BESIDE = Request("The longest road", 24, 0.0, 1)
_ECHO: dict[str, Any] = {"model": "smollm2", "prompt": ["word " * 1500] * 64, "max_tokens": 0, "echo": True}
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "echo": ("/v1/completions", _ECHO),
    "echo stream": ("/v1/completions", {**_ECHO, "stream": True}),
    "tokenize": ("/tokenize", {"prompt": "word " * 7000, "return_token_strs": True}),
    "detokenize": ("/detokenize", {"tokens": [1234] * 60_000}),
    "answers": (
        "/v1/completions",
        {"model": "smollm2", "prompt": "a " * 2000, "max_tokens": 2, "ignore_eos": True, "n": 16, "echo": True,
         "return_token_ids": True},
    ),
}  # fmt: skip


@dataclass(slots=True)
class UnreadReport:
    """What answers left behind that nobody read.

    Attributes:
        asked: clients by what they asked for and how they read.
        longest_s: from the last client of a batch to when the router had let go of all of it.
        growth_bytes: of the router's memory, once warm.
    """

    asked: Counter[str] = field(default_factory=Counter)
    num_streams: int = 0
    longest_s: float = 0.0
    growth_bytes: int = 0
    faults: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Say it in a paragraph."""
        return (
            f"unread: {self.asked.total()} clients that do not read ({len(self.asked)} kinds), all let go "
            f"{self.longest_s:.1f} s after the last of a batch at the latest (stall {STALL_S:g} s); {self.num_streams} "
            f"streams beside them; router {self.growth_bytes / (1 << 20):+.1f} MiB; {'; '.join(self.faults) or 'fine'}"
        )


class _Client:
    """One client; it holds its socket open until it is closed."""

    def __init__(self, port: int, kind: str, manner: str) -> None:
        self._port, self._kind, self._manner = port, kind, manner
        self._socket = socket.socket()
        self._reading: asyncio.Task[None] | None = None

    async def ask(self) -> None:
        """Send its request, and begin to read in its manner."""
        path, body = ASKED[self._kind]
        data, loop = json.dumps(body).encode(), asyncio.get_running_loop()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.setblocking(False)
        await loop.sock_connect(self._socket, ("127.0.0.1", self._port))
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        await loop.sock_sendall(self._socket, head.encode() + data)
        if self._manner == "half":
            self._socket.shutdown(socket.SHUT_WR)
        if self._manner in ("a byte", "head"):
            self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        with suppress(OSError):
            if self._manner == "head":
                await loop.sock_recv(self._socket, 200)
                return
            while await loop.sock_recv(self._socket, 1):
                await asyncio.sleep(1.0)

    async def close(self) -> None:
        """End it."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        self._socket.close()


async def run(cluster: Cluster, ledger: Ledger, seed: int, number: int, tell: Callable[[str], None]) -> UnreadReport:
    """Let so many clients ask and not read."""
    report, dice = UnreadReport(), random.Random(f"unread {seed}")
    peace = (await ledger.stream(BESIDE)).token_ids
    pid, port = cluster.server.children()["router"], int(cluster.server.url.rsplit(":", 1)[1])
    is_over = asyncio.Event()
    beside = asyncio.create_task(_read_beside(ledger, peace, report, is_over))
    warm_bytes = 0
    while report.asked.total() < number and not report.faults:
        await _batch(port, pid, min(NUM_AT_ONCE, number - report.asked.total()), dice, report)
        own_bytes = _own_bytes(pid)
        if report.asked.total() <= max(WARM_CLIENTS, NUM_AT_ONCE):
            warm_bytes = own_bytes
        report.growth_bytes = own_bytes - warm_bytes
        tell(f"{report.asked.total()} clients, router {own_bytes >> 20} MiB, {report.num_streams} streams beside")
    is_over.set()
    await beside
    if report.growth_bytes > MAX_GROWTH_BYTES:
        report.faults.append(f"the router has grown by {report.growth_bytes >> 20} MiB")
    if cluster.server.children()["router"] != pid:
        report.faults.append("the router was replaced")
    return report


async def _batch(port: int, pid: int, number: int, dice: random.Random, report: UnreadReport) -> None:
    before, clients = _num_sockets(pid), []
    for _ in range(number):
        kind, manner = dice.choice(list(ASKED)), dice.choice(MANNERS)
        report.asked[f"{kind}, {manner}"] += 1
        clients.append(_Client(port, kind, manner))
    await asyncio.gather(*(client.ask() for client in clients))
    begin_s = time.monotonic()
    # The stream beside them has a connection of its own, or is about to have one.
    while (held := _num_sockets(pid) - before) > 1 and time.monotonic() - begin_s < STALL_S + CUT_BUDGET_S:
        await asyncio.sleep(0.2)
    report.longest_s = max(report.longest_s, time.monotonic() - begin_s)
    if held > 1:
        report.faults.append(f"{held} connections are held {time.monotonic() - begin_s:.0f} s later")
    await asyncio.gather(*(client.close() for client in clients))


async def _read_beside(ledger: Ledger, peace: list[int], report: UnreadReport, is_over: asyncio.Event) -> None:
    while not is_over.is_set():
        record = await ledger.stream(BESIDE)
        if record.status == 429:
            # Unread answers hold places; who is refused comes again.
            await asyncio.sleep(0.5)
        elif record.token_ids != peace or record.errors:
            report.faults.append(f"a stream beside them said {record.token_ids}, {record.errors}")
            return
        else:
            report.num_streams += 1


def _num_sockets(pid: int) -> int:
    found = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            found += os.readlink(entry).startswith("socket:")
    return found


def _own_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().partition("RssAnon:")[2].split()[0]) << 10
