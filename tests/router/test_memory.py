"""Clients that leave in every phase leave nothing behind in the router's heap, whatever they asked and were told."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import random
import tracemalloc

import pytest

from protocol.channel import Channel
from protocol.errors import PeerLost
from protocol.request import TokenRow
from protocol.wire import Abort, FirstToken, Heartbeat, Links, Message, Prefill, Register, Reserve, Tokens, WorkerStats
from router.tokenizer import Tokenizer
from tests.router.cluster import registration
from tests.router.tiny import SPECIAL, alphabet, write_gguf
from tests.router.workers import Stage, staged

NUM_WORDS = 20_000
NUM_WARM, NUM_LEAVERS, NUM_AT_ONCE = 200, 600, 12
STEP_S, STEPS_PER_BEAT = 0.002, 20
STORM_BUDGET_S = 60.0
# New peaks that allocators keep, and CPython's own caches of names, of fixed size.
MAX_BYTES_PER_LEAVER = 40
# What other tests have left running in this process allocates as well: what our own lines hold counts.
_OURS = [tracemalloc.Filter(True, f"*/{folder}/*") for folder in ("router", "protocol")]
END_OF_EVENT = b"\n\n"


@pytest.fixture(scope="module")
def many_words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A vocabulary so large that every leaver is told tokens that nobody was told before."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(word) for word in itertools.islice(itertools.product(letters, repeat=4), NUM_WORDS)]
    tokens = [*SPECIAL, *alphabet(), "th", *words]
    types = [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL))
    path = tmp_path_factory.mktemp("words") / "words.gguf"
    return Tokenizer(write_gguf(path, tokens, types, pre="smollm", merges=["t h"], eos_token_id=2))


class DrawingWorkers:
    """A prefill and a decode worker that answer every request with tokens drawn from the whole vocabulary."""

    def __init__(self, stage: Stage, vocab_size: int) -> None:
        self._stage = stage
        self._dice = random.Random(7)
        self._vocab_size = vocab_size
        self._running: dict[int, list[int]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Register both."""
        channels = [await self._join("p0"), await self._join("d0")]
        self._prefill, self._decode = channels
        self._decode.post(Links(peers=(("p0", 1),)))
        self._tasks += [asyncio.create_task(self._listen(channel)) for channel in channels]
        self._tasks.append(asyncio.create_task(self._step()))
        await self._stage.ready()

    async def close(self) -> None:
        """Leave."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in (self._prefill, self._decode):
            await channel.close()

    async def _join(self, worker_id: str) -> Channel:
        channel = await self._stage.dial()
        told: Register = registration(worker_id, max_num_seqs=64, num_blocks=200, max_model_len=4096)
        channel.post(told)
        return channel

    async def _listen(self, channel: Channel) -> None:
        try:
            while True:
                self._take(await channel.receive())
        except PeerLost:
            return

    def _take(self, message: Message) -> None:
        if isinstance(message, Prefill):
            row = TokenRow(message.request_id, message.epoch, 0, self._draw())
            told = FirstToken(transfer_id=message.transfer_id, row=row, num_cached_tokens=0, queue_s=0.0, prefill_s=0.0)
            self._prefill.post(told)
        elif isinstance(message, Reserve):
            self._running[message.transfer_id] = [message.request_id, message.epoch, 1]
        elif isinstance(message, Abort):
            self._running.pop(message.transfer_id, None)

    async def _step(self) -> None:
        for number in itertools.count():
            rows = tuple(TokenRow(one[0], one[1], one[2], self._draw()) for one in self._running.values())
            for one in self._running.values():
                one[2] += 1
            if rows:
                self._decode.post(Tokens(rows=rows))
            if number % STEPS_PER_BEAT == 0:
                for channel in (self._prefill, self._decode):
                    channel.post(Heartbeat(progress=number, has_work=bool(rows), stats=WorkerStats()))
            await asyncio.sleep(STEP_S)

    def _draw(self) -> int:
        return self._dice.randrange(4, self._vocab_size)


def _held_bytes() -> int:
    traces = tracemalloc.take_snapshot().filter_traces([*_OURS, tracemalloc.Filter(False, "*/tests/*")])
    return sum(trace.size for trace in traces.traces)


async def _leaver(stage: Stage, number: int) -> int:
    """Ask for a long stream and leave it; returns how many events were seen."""
    dice = random.Random(number)
    num_events, is_rude = dice.choice((0, 0, 1, 4)), dice.random() < 0.5
    prompt = "".join(dice.choices("abcdefgh ", k=dice.randint(10, 60)))
    body = json.dumps({"model": "m", "prompt": prompt, "max_tokens": 500, "temperature": 0.8, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", stage.router.http_port)
    writer.write(head.encode() + body)
    await writer.drain()
    await asyncio.sleep(dice.random() * 0.005)
    seen = 0
    while seen < num_events:
        await reader.readuntil(END_OF_EVENT)
        seen += 1
    if is_rude:
        writer.transport.abort()
    writer.close()
    return seen


async def _storm(stage: Stage, numbers: range) -> int:
    """Let clients come and leave, some at once; returns the events that were seen, once nothing is open."""
    left = iter(numbers)
    seen = 0

    async def one_after_another() -> None:
        nonlocal seen
        for number in left:
            num_events = await _leaver(stage, number)
            seen += num_events

    async with asyncio.timeout(STORM_BUDGET_S):
        await asyncio.gather(*(one_after_another() for _ in range(NUM_AT_ONCE)))
    await stage.until(stage.router.switchboard.idle.is_set)
    return seen


async def test_clients_that_leave_leave_nothing_behind(many_words: Tokenizer) -> None:
    async with staged(many_words, max_num_requests=64, access_log="off", lease_ttl_s=30.0) as stage:
        workers = DrawingWorkers(stage, many_words.vocab_size)
        await workers.start()
        tracemalloc.start()
        try:
            await _storm(stage, range(NUM_WARM))
            gc.collect()
            before = _held_bytes()
            num_events = await _storm(stage, range(NUM_WARM, NUM_WARM + NUM_LEAVERS))
            gc.collect()
            grown = _held_bytes() - before
        finally:
            tracemalloc.stop()
            await workers.close()
    assert num_events > NUM_LEAVERS / 2, "they were told tokens"
    assert grown < MAX_BYTES_PER_LEAVER * NUM_LEAVERS, f"{grown / NUM_LEAVERS:.0f} bytes for each that left"
