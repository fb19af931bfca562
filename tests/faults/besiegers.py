"""Clients that mean no good, all of one tenant: for as long as they are told, some of each kind at a time.

    grammar  asks for an answer by one of the worst grammars, and reads it
    unread   asks for much, on a socket with a small buffer, and reads nothing, or a byte now and then
    leaver   asks, and closes its connection at a random moment, half of the time with a reset

1. Each kind has its clients; one asks again as soon as its last request is over.
2. How each request ended is counted. An end that is none of those that its kind may have is a fault: a grammar's answer
   ends with its last token, a refusal or one error, and the router lets go of who does not read.
3. When told to stop they hang up, as such clients would.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.e2e.client import completion
from tests.faults.grammars import HOSTILE
from tests.faults.ledger import Ledger, Record

NUM_GRAMMARS, NUM_UNREAD, NUM_LEAVERS = 2, 4, 1
# Beyond the stall: what nobody reads has to be computed first, beside everything else.
LET_GO_BUDGET_S = 60.0
_POLL_S = 0.5
_LEFT = "left at the end of a turn"
_ABORT = struct.pack("ii", 1, 0)
_ESTABLISHED, _CLOSE_WAIT = "01", "08"
_EXPLICIT = ("HTTP 400", "HTTP 429", "HTTP 503", "error event")
_STREAM = completion("x", max_tokens=300, temperature=1.0, ignore_eos=True, logprobs=20, stream=True)
_ECHO = completion(["word " * 1500] * 64, max_tokens=0, echo=True)
_WIDE = completion("word " * 1500, max_tokens=2, n=8, echo=True)
# Dear to hold, and cheap to compute: more load than a few rows would slow others whoever reads the answers.
UNREAD: dict[str, tuple[str, dict[str, Any]]] = {
    "stream": ("/v1/completions", _STREAM),
    "echoes": ("/v1/completions", _ECHO),
    "echo stream": ("/v1/completions", {**_ECHO, "stream": True}),
    "wide answer": ("/v1/completions", _WIDE),
    "wide stream": ("/v1/completions", {**_WIDE, "stream": True}),
    "tokens": ("/tokenize", {"prompt": "word " * 7000, "return_token_strs": True}),
}


@dataclass(slots=True)
class Ends:
    """How hostile requests ended.

    Attributes:
        counts: by kind and end, as "kind: end".
        longest_unread_s: from asking to when the router had let go of it.
        faults: ends that may not be, in words.
    """

    counts: Counter[str] = field(default_factory=Counter)
    longest_unread_s: float = 0.0
    faults: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Say it in a line."""
        ends = ", ".join(f"{number} {end}" for end, number in sorted(self.counts.items()))
        return f"{self.counts.total()} hostile ({ends or 'none'}), unread for {self.longest_unread_s:.1f} s at most"


def end_of(record: Record) -> tuple[str, str | None]:
    """Return how a hostile grammar's request ended, and what is wrong with that."""
    was_said = all(error.startswith(_EXPLICIT) for error in record.errors)
    if record.num_ends != 1 or not was_said or record.is_done is bool(record.errors):
        return "undefined", f"{record.num_ends} ends, {'with' if record.is_done else 'without'} [DONE], {record.errors}"
    return ("finished" if record.is_done else record.errors[0].split(":")[0]), None


class Besiegers:
    """All hostile clients of a server.

    Args:
        ledger: speaks with the key of their tenant; `key` is that key.
    """

    def __init__(self, ledger: Ledger, url: str, key: str, dice: random.Random, ends: Ends) -> None:
        self._ledger = ledger
        self._port = int(url.rsplit(":", 1)[1])
        self._key = key
        self._dice = dice
        self._ends = ends
        self._grammars = dice.sample(list(HOSTILE), len(HOSTILE))

    async def run(self, is_over: Callable[[], bool]) -> None:
        """Send clients of every kind until it is over."""
        kinds = [self._grammar] * NUM_GRAMMARS + [self._unread] * NUM_UNREAD + [self._leave] * NUM_LEAVERS

        async def client(ask: Callable[[Callable[[], bool]], Any]) -> None:
            while not is_over():
                await ask(is_over)
                await asyncio.sleep(self._dice.uniform(0.0, 1.0))

        async with asyncio.TaskGroup() as group:
            for ask in kinds:
                group.create_task(client(ask))

    async def _grammar(self, is_over: Callable[[], bool]) -> None:
        self._grammars.append(name := self._grammars.pop(0))
        body = completion("x", max_tokens=1500, temperature=2.0, seed=self._dice.randrange(1 << 30), stream=True)
        asking = asyncio.create_task(self._ledger.ask({**body, "ignore_eos": True, **HOSTILE[name]}))
        while not asking.done() and not is_over():
            await asyncio.wait({asking}, timeout=_POLL_S)
        if not asking.done():
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            self._ends.counts[f"grammar: {_LEFT}"] += 1
            return
        error = asking.exception()
        end, fault = ("broken", repr(error)) if error is not None else end_of(asking.result())
        self._ends.counts[f"grammar: {end}"] += 1
        self._ends.faults += [f"grammar {name!r}: {fault}"] if fault else []

    async def _unread(self, is_over: Callable[[], bool]) -> None:
        kind, is_slow = self._dice.choice(list(UNREAD)), self._dice.random() < 0.5
        begin_s = time.monotonic()
        with closing(await self._ask(*UNREAD[kind])) as client:
            reading = asyncio.create_task(_read_slowly(client)) if is_slow else None
            try:
                while is_held := _holds(self._port, client):
                    took_s = time.monotonic() - begin_s
                    if is_over() or took_s > LET_GO_BUDGET_S:
                        break
                    await asyncio.sleep(_POLL_S)
            finally:
                if reading is not None:
                    reading.cancel()
                    await asyncio.gather(reading, return_exceptions=True)
        took_s = time.monotonic() - begin_s
        self._ends.longest_unread_s = max(self._ends.longest_unread_s, took_s)
        name = f"unread {kind}"
        if is_held and took_s > LET_GO_BUDGET_S:
            how = "a byte a second" if is_slow else "never read"
            self._ends.faults.append(f"{name}, {how}: still held after {took_s:.0f} s")
        self._ends.counts[f"{name}: {_LEFT if is_held else 'let go'}"] += 1

    async def _leave(self, _: Callable[[], bool]) -> None:
        number, is_rude = self._dice.randrange(1 << 30), self._dice.random() < 0.5
        body = completion(f"Leaving {number}:", max_tokens=64, temperature=0.8, seed=number, stream=True)
        with closing(await self._ask("/v1/completions", body)) as client:
            await asyncio.sleep(self._dice.uniform(0.0, 1.0))
            if is_rude:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
        self._ends.counts[f"leaver: {'reset' if is_rude else 'closed'}"] += 1

    async def _ask(self, path: str, body: dict[str, Any]) -> socket.socket:
        """Send a request on a socket of its own, whose buffer is small, and read nothing."""
        client, loop = socket.socket(), asyncio.get_running_loop()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self._key}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        try:
            await loop.sock_connect(client, ("127.0.0.1", self._port))
            await loop.sock_sendall(client, head.encode() + data)
        except BaseException:
            client.close()
            raise
        return client


async def _read_slowly(client: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    with suppress(OSError):
        while await loop.sock_recv(client, 1):
            await asyncio.sleep(1.0)


def _holds(port: int, client: socket.socket) -> bool:
    """Whether the process at a port still has its end of a connection.

    The client cannot tell: of an end that is closed while its window is full it hears nothing. What was closed is in
    neither of these two states, and no file of any process, which has inode 0; but so has what was not accepted yet.
    """
    local = [f"0100007F:{number:04X}" for number in (port, client.getsockname()[1])]
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1:3] == local:
            return fields[3] in (_ESTABLISHED, _CLOSE_WAIT) or fields[9] != "0"
    return False
