"""A tenant that means no good, and the same tenant in peace: some clients of each kind, for as long as they are told.

             hostile                                             in peace, with the same requests
    grammar  asks for an answer by one of the worst grammars     by one that costs nothing
    unread   asks for much, on a socket with a small buffer,     reads it at once, and is idle for as long as the server
             and reads nothing, or a byte a second               would have waited for it
    leaver   closes its connection at a random moment, half of   reads its answer
             the time with a reset

1. Each kind has its clients; one asks again soon after its last request is over.
2. How each hostile request ended is counted. Any other than those of its kind is a fault: a grammar's
   answer ends with its last token, a refusal or one error, and the router lets go of who does not read.
3. When told to stop they hang up.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
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
_WIDE = completion("word", max_tokens=16, temperature=1.0, ignore_eos=True, n=8, logprobs=20)
# Dear to hold, and cheap to compute: more load than a few rows would slow others whoever reads the answers.
UNREAD: dict[str, tuple[str, dict[str, Any]]] = {
    "stream": ("/v1/completions", _STREAM),
    "echoes": ("/v1/completions", _ECHO),
    "echo stream": ("/v1/completions", {**_ECHO, "stream": True}),
    "wide answer": ("/v1/completions", _WIDE),
    "wide stream": ("/v1/completions", {**_WIDE, "stream": True}),
    "tokens": ("/tokenize", {"prompt": "word " * 7000, "return_token_strs": True}),
}
PEACEFUL = {"structured_outputs": {"regex": "([a-z]{2,9}, ){100,}x"}}


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
    """All clients of the tenant.

    Args:
        ledger: speaks with the key of their tenant; `key` is that key.
        stall_s: after how long without a read the server gives a client up.
        ends: takes how hostile requests end; None where the clients behave.
    """

    def __init__(
        self, ledger: Ledger, url: str, key: str, stall_s: float, dice: random.Random, ends: Ends | None
    ) -> None:
        self._ledger = ledger
        self._port = int(url.rsplit(":", 1)[1])
        self._key = key
        self._stall_s = stall_s
        self._dice = dice
        self._ends = ends
        self._grammars = dice.sample(list(HOSTILE), len(HOSTILE))

    async def run(self, is_over: Callable[[], bool]) -> None:
        """Send clients of every kind until it is over."""
        kinds = [self._grammar] * NUM_GRAMMARS + [self._unread] * NUM_UNREAD + [self._leave] * NUM_LEAVERS

        async def client(ask: Callable[[Callable[[], bool]], Awaitable[None]]) -> None:
            while not is_over():
                await ask(is_over)
                await asyncio.sleep(self._dice.uniform(0.0, 1.0))

        async with asyncio.TaskGroup() as group:
            for ask in kinds:
                group.create_task(client(ask))

    async def _grammar(self, is_over: Callable[[], bool]) -> None:
        self._grammars.append(name := self._grammars.pop(0))
        grammar = PEACEFUL if self._ends is None else HOSTILE[name]
        body = completion("x", max_tokens=1500, temperature=2.0, seed=self._dice.randrange(1 << 30), stream=True)
        asking = asyncio.create_task(self._ledger.ask({**body, "ignore_eos": True, **grammar}))
        while not asking.done() and not is_over():
            await asyncio.wait({asking}, timeout=_POLL_S)
        asking.cancel()
        (record,) = await asyncio.gather(asking, return_exceptions=True)
        if self._ends is None:
            return
        if isinstance(record, asyncio.CancelledError):
            end, fault = _LEFT, None
        else:
            end, fault = ("broken", repr(record)) if isinstance(record, BaseException) else end_of(record)
        self._ends.counts[f"grammar: {end}"] += 1
        self._ends.faults += [f"grammar {name!r}: {fault}"] if fault else []

    async def _unread(self, is_over: Callable[[], bool]) -> None:
        kind, is_slow = self._dice.choice(list(UNREAD)), self._dice.random() < 0.5
        with closing(await self._ask(*UNREAD[kind])) as client:
            if self._ends is not None:
                await self._hold(client, kind, is_slow, is_over, self._ends)
                return
            await _until_over(_read(client, 1 << 16, 0.0), is_over)
        await _until_over(asyncio.sleep(self._stall_s), is_over)

    async def _hold(
        self, client: socket.socket, kind: str, is_slow: bool, is_over: Callable[[], bool], ends: Ends
    ) -> None:
        """Keep a connection and hardly read, until the router has let go of it."""
        begin_s, took_s = time.monotonic(), 0.0
        reading = asyncio.create_task(_read(client, 1, 1.0)) if is_slow else None
        while (is_held := _holds(self._port, client)) and not is_over() and took_s < LET_GO_BUDGET_S:
            await asyncio.sleep(_POLL_S)
            took_s = time.monotonic() - begin_s
        if reading is not None:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        ends.longest_unread_s = max(ends.longest_unread_s, took_s)
        if is_held and took_s >= LET_GO_BUDGET_S:
            how = "read a byte a second" if is_slow else "never read"
            ends.faults.append(f"unread {kind}, {how}: still held after {took_s:.0f} s")
        ends.counts[f"unread {kind}: {_LEFT if is_held else 'let go'}"] += 1

    async def _leave(self, is_over: Callable[[], bool]) -> None:
        number, is_rude = self._dice.randrange(1 << 30), self._dice.random() < 0.5
        body = completion(f"Leaving {number}:", max_tokens=64, temperature=0.8, seed=number, stream=True)
        with closing(await self._ask("/v1/completions", body)) as client:
            if self._ends is None:
                await _until_over(_read(client, 1 << 16, 0.0), is_over)
                return
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


async def _read(client: socket.socket, num_bytes: int, pause_s: float) -> None:
    """Read so many bytes at a time, to the end."""
    loop = asyncio.get_running_loop()
    with suppress(OSError):
        while await loop.sock_recv(client, num_bytes):
            await asyncio.sleep(pause_s)


async def _until_over(work: Coroutine[Any, Any, None], is_over: Callable[[], bool]) -> None:
    task = asyncio.create_task(work)
    while not task.done() and not is_over():
        await asyncio.wait({task}, timeout=_POLL_S)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


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
