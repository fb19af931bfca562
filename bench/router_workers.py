"""The workers of a router benchmark: a process that speaks the real control wire and computes nothing.

    dial, Register, Links ─► {"ready": true}
    Prefill ─► FirstToken at once          Reserve ─► a sequence that gets one token in every step
    {"script": [token ids]} ─► what every sequence gets
    {"steps_per_s": R} ─► one Tokens message per step with a row for each sequence, as a decode worker sends them
    {"end": true} ─► the next step ends every sequence

1. The tokens are those of a script, repeated without end: row `index` carries token `index` of it.
2. Steps come at a given rate, on a fixed schedule: one that is late is made up for at once, so that the rate holds.
3. Rate 0 saturates: the next step leaves as soon as no more than `ahead` steps are on their way, by the clients' count.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import aiohttp

from bench.router_counter import Counter
from protocol.channel import Channel, dial
from protocol.errors import PeerLost
from protocol.kv_layout import KVFingerprint
from protocol.request import FinishReason, TokenRow
from protocol.wire import (
    Abort,
    FirstToken,
    Heartbeat,
    Links,
    PeerAddress,
    Prefill,
    Register,
    Reserve,
    Role,
    Tokens,
    Welcome,
    WorkerStats,
)

BLOCK_SIZE: Final = 16
MAX_MODEL_LEN: Final = 1 << 20
NUM_BLOCKS: Final = 1 << 30
POLL_S: Final = 0.0005
FINGERPRINT: Final = KVFingerprint(
    model_hash="bench", dtype="float32", block_size=BLOCK_SIZE, num_layers=1, num_kv_heads=1, head_dim=1
)


class Sequences:
    """The running sequences and the next token of each. Pure.

    Attributes:
        token_ids: the script.
    """

    def __init__(self) -> None:
        self.token_ids: Sequence[int] = ()
        self._running: dict[int, list[int]] = {}
        self.num_sent = 0

    def __len__(self) -> int:
        return len(self._running)

    def first(self, message: Prefill) -> TokenRow:
        """Return token 0 of a prompt."""
        self.num_sent += 1
        return TokenRow(message.request_id, message.epoch, 0, self.token_ids[0])

    def join(self, message: Reserve) -> None:
        """Let a sequence run, from token 1."""
        self._running[message.transfer_id] = [message.request_id, message.epoch, 1]

    def leave(self, transfer_id: int) -> None:
        """Forget a sequence."""
        self._running.pop(transfer_id, None)

    def step(self, is_last: bool = False) -> tuple[TokenRow, ...]:
        """Return one row for each sequence; the last step ends them."""
        reason = FinishReason.LENGTH if is_last else None
        rows = []
        for sequence in self._running.values():
            request_id, epoch, index = sequence
            rows.append(TokenRow(request_id, epoch, index, self.token_ids[index % len(self.token_ids)], reason))
            sequence[2] = index + 1
        if is_last:
            self._running.clear()
        self.num_sent += len(rows)
        return tuple(rows)


class Workers:
    """One prefill and one decode worker on channels of their own."""

    def __init__(self, prefill: Channel, decode: Channel, sequences: Sequences, counter: Counter, ahead: int) -> None:
        self._prefill = prefill
        self._decode = decode
        self._sequences = sequences
        self._counter = counter
        self._ahead = ahead
        self._num_ended = 0
        self._stepping: asyncio.Task[None] | None = None
        self._tasks = [asyncio.create_task(self._listen(c)) for c in (prefill, decode)]
        self._tasks += [asyncio.create_task(self._beat(c)) for c in (prefill, decode)]

    def set_rate(self, steps_per_s: float) -> None:
        """Begin to step, or go on at another rate."""
        self._stop_stepping()
        steps = self._saturate() if steps_per_s == 0 else self._keep_rate(steps_per_s)
        self._stepping = asyncio.create_task(steps)

    def set_script(self, token_ids: Sequence[int]) -> None:
        """Take the tokens that every sequence gets."""
        self._sequences.token_ids = token_ids

    def end(self) -> int:
        """End every sequence with one more step; return the tokens sent since the last end."""
        self._stop_stepping()
        self._decode.post(Tokens(rows=self._sequences.step(is_last=True)))
        num_before, self._num_ended = self._num_ended, self._sequences.num_sent
        return self._num_ended - num_before

    async def close(self) -> None:
        """Leave."""
        self._stop_stepping()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._prefill.close()
        await self._decode.close()

    def _stop_stepping(self) -> None:
        if self._stepping is not None:
            self._stepping.cancel()
            self._stepping = None

    def _step(self) -> None:
        if len(self._sequences):
            self._decode.post(Tokens(rows=self._sequences.step()))

    async def _keep_rate(self, steps_per_s: float) -> None:
        due_s = time.monotonic()
        while True:
            self._step()
            due_s += 1 / steps_per_s
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))

    async def _saturate(self) -> None:
        while True:
            under_way = self._sequences.num_sent - self._counter.value
            if under_way <= self._ahead * len(self._sequences):
                self._step()
                await asyncio.sleep(0)
            else:
                await asyncio.sleep(POLL_S)

    async def _listen(self, channel: Channel) -> None:
        with suppress(PeerLost):
            while True:
                message = await channel.receive()
                if isinstance(message, Prefill):
                    self._answer(message)
                elif isinstance(message, Reserve):
                    self._sequences.join(message)
                elif isinstance(message, Abort):
                    self._sequences.leave(message.transfer_id)

    def _answer(self, message: Prefill) -> None:
        row, transfer_id = self._sequences.first(message), message.transfer_id
        self._prefill.post(
            FirstToken(transfer_id=transfer_id, row=row, num_cached_tokens=0, queue_s=0.0, prefill_s=0.0)
        )

    async def _beat(self, channel: Channel) -> None:
        progress = 0
        while True:
            progress += 1
            stats = WorkerStats(blocks_total=NUM_BLOCKS, num_running=len(self._sequences), num_steps=progress)
            channel.post(Heartbeat(progress=progress, has_work=len(self._sequences) > 0, stats=stats))
            await asyncio.sleep(0.5)


async def register(session: aiohttp.ClientSession, port: int, secret: bytes, role: Role) -> Channel:
    """Connect one worker and wait until the router has taken it."""
    worker_id = f"bench-{role}"
    channel = await dial(session, f"http://127.0.0.1:{port}/control", secret, "control")
    address = PeerAddress(worker_id=worker_id, instance=1, transport="inproc") if role is Role.PREFILL else None
    channel.post(
        Register(
            worker_id=worker_id,
            instance=1,
            role=role,
            fingerprint=FINGERPRINT,
            num_blocks=NUM_BLOCKS,
            max_num_seqs=4096,
            max_model_len=MAX_MODEL_LEN,
            address=address,
        )
    )
    while not isinstance(await channel.receive(), Welcome):
        pass
    if role is Role.DECODE:
        channel.post(Links(peers=((f"bench-{Role.PREFILL}", 1),)))
    return channel


async def run() -> None:
    """Obey the lines of standard input until it ends."""
    reader = asyncio.StreamReader(limit=1 << 24)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    settings = json.loads(await reader.readline())
    secret, port = settings["secret"].encode(), settings["control_port"]
    async with aiohttp.ClientSession() as session:
        channels = [await register(session, port, secret, role) for role in (Role.PREFILL, Role.DECODE)]
        counter = Counter(Path(settings["counter"]))
        workers = Workers(channels[0], channels[1], Sequences(), counter, settings["ahead"])
        print(json.dumps({"ready": True}), flush=True)
        try:
            while line := await reader.readline():
                print(json.dumps(_obey(workers, json.loads(line))), flush=True)
        finally:
            await workers.close()


def _obey(workers: Workers, command: dict[str, Any]) -> dict[str, Any]:
    if "steps_per_s" in command:
        workers.set_rate(command["steps_per_s"])
        return {"steps_per_s": command["steps_per_s"]}
    if "script" in command:
        workers.set_script(command["script"])
        return {"script": len(command["script"])}
    return {"num_tokens": workers.end()}


if __name__ == "__main__":
    asyncio.run(run())
