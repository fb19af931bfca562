"""Scripted workers: they speak the real control wire over a real WebSocket, and do what the test says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import aiohttp

from protocol.channel import Channel, dial
from protocol.errors import PeerLost
from protocol.request import FinishReason, TokenLogprobs, TokenRow
from protocol.wire import (
    Abort,
    AnyMessage,
    FirstToken,
    Heartbeat,
    Links,
    Message,
    PeerAddress,
    Prefill,
    Pulse,
    Register,
    Reserve,
    Tokens,
    WorkerStats,
)
from router.app import Router
from router.config import RouterConfig
from router.tokenizer import Tokenizer
from tests.router.cluster import registration
from tests.router.tiny import EOS_ID, byte_ids

SECRET = b"s" * 32
BUDGET_S = 5.0
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
CHAT = "/v1/chat/completions"
HI = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
Kind = TypeVar("Kind", bound=Message)


class ScriptedWorker:
    """One worker on a real channel. Reads everything; says what it is told to say."""

    def __init__(self, register: Register, channel: Channel) -> None:
        self.register = register
        self.channel = channel
        self.received: list[AnyMessage] = []
        self._arrived = asyncio.Event()
        self._reader = asyncio.create_task(self._read())

    def say(self, message: Message) -> None:
        """Send a message."""
        self.channel.post(message)

    def beat(self, progress: int = 1, has_work: bool = False, is_draining: bool = False, **stats: Any) -> None:
        """Send a heartbeat."""
        told = WorkerStats(**stats)
        self.say(Heartbeat(progress=progress, has_work=has_work, stats=told, is_draining=is_draining))

    async def hear(self, kind: type[Kind], where: Callable[[Kind], bool] = lambda _: True) -> Kind:
        """Take the first message of a kind that has come or will come."""
        async with asyncio.timeout(BUDGET_S):
            while True:
                for message in self.received:
                    if isinstance(message, kind) and where(message):
                        self.received.remove(message)
                        return message
                self._arrived.clear()
                await self._arrived.wait()

    def heard(self, kind: type[Message]) -> bool:
        """Whether a message of a kind waits to be taken."""
        return any(isinstance(m, kind) for m in self.received)

    async def close(self) -> None:
        """Leave, as a process that is killed."""
        self.channel.abort("worker ends")
        await self.channel.close()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def _read(self) -> None:
        with suppress(PeerLost):
            while True:
                message = await self.channel.receive()
                if not isinstance(message, Pulse):
                    self.received.append(message)
                self._arrived.set()

    # --- as a prefill or decode worker ---

    async def first(
        self, token_id: int, finish: FinishReason | None = None, num_cached_tokens: int = 0, **logged: Any
    ) -> Prefill:
        """Take the next prompt and answer it with its first token."""
        prefill = await self.hear(Prefill)
        row = TokenRow(prefill.request_id, prefill.epoch, 0, token_id, finish, **logged)
        self.say(
            FirstToken(
                transfer_id=prefill.transfer_id,
                row=row,
                num_cached_tokens=num_cached_tokens,
                queue_s=0.01,
                prefill_s=0.02,
            )
        )
        return prefill

    def emit(
        self,
        reserve: Reserve,
        token_ids: list[int],
        start: int = 1,
        finish: FinishReason | None = None,
        logprobs: TokenLogprobs | None = None,
    ) -> None:
        """Send tokens of one sequence, a message each; `finish` ends it with the last."""
        for i, token_id in enumerate(token_ids):
            end = finish if i == len(token_ids) - 1 else None
            row = TokenRow(reserve.request_id, reserve.epoch, start + i, token_id, end, logprobs)
            self.say(Tokens(rows=(row,)))


class Stage:
    """A router with real ports, and whoever the test brings in."""

    def __init__(self, router: Router, session: aiohttp.ClientSession) -> None:
        self.router = router
        self.http = session
        self.workers: list[ScriptedWorker] = []

    @property
    def url(self) -> str:
        """Base URL for clients."""
        return f"http://127.0.0.1:{self.router.http_port}"

    async def dial(self, secret: bytes = SECRET) -> Channel:
        """Open a control channel."""
        return await dial(self.http, f"http://127.0.0.1:{self.router.control_port}/control", secret, "control")

    async def worker(self, worker_id: str, instance: int = 1, **fields: Any) -> ScriptedWorker:
        """Register a worker; what comes back is in its `received`."""
        register = registration(worker_id, instance, **fields)
        worker = ScriptedWorker(register, await self.dial())
        self.workers.append(worker)
        worker.say(register)
        return worker

    async def pair(self, **fields: Any) -> tuple[ScriptedWorker, ScriptedWorker]:
        """Register p0 and d0, link them, and wait until the router is ready."""
        prefill = await self.worker("p0", **fields)
        decode = await self.worker("d0", **fields)
        decode.say(Links(peers=(("p0", 1),)))
        await self.ready()
        return prefill, decode

    async def ready(self) -> None:
        """Wait until /health says so."""
        async with asyncio.timeout(BUDGET_S):
            while True:
                async with self.http.get(f"{self.url}/health") as response:
                    if response.status == 200:
                        return
                await asyncio.sleep(0.01)

    async def post(self, path: str, body: Any, **options: Any) -> tuple[int, dict[str, Any], Any]:
        """Send JSON; returns status, body and headers."""
        async with self.http.post(f"{self.url}{path}", json=body, **options) as response:
            return response.status, await response.json(), response.headers

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something has become true in this process."""
        async with asyncio.timeout(BUDGET_S):
            while not condition():
                await asyncio.sleep(0.005)


def config(**fields: Any) -> RouterConfig:
    """Make a router's configuration with short times."""
    defaults: dict[str, Any] = {
        "model_path": "unused",
        "served_model_names": ("m", "alias"),
        "secret": SECRET,
        "http_port": 0,
        "control_port": 0,
        "heartbeat_s": 0.1,
        "lease_ttl_s": 2.0,
        "placement_wait_s": 3.0,
        "startup_wait_s": 0.0,
        "drain_s": 2.0,
    }
    return RouterConfig(**{**defaults, **fields})


@asynccontextmanager
async def staged(tokenizer: Tokenizer, **fields: Any) -> AsyncIterator[Stage]:
    """Run a router for the time of a test."""
    router = Router(config(**fields), tokenizer)
    await router.start()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session:
        stage = Stage(router, session)
        try:
            yield stage
        finally:
            for worker in stage.workers:
                await worker.close()
            await session.close()
            await router.close()


async def aborted(worker: ScriptedWorker, transfer_id: int) -> Abort:
    """Wait for the abort of a placement."""
    return await worker.hear(Abort, lambda m: m.transfer_id == transfer_id)


def prefill_address(worker_id: str, transport: str) -> PeerAddress:
    """Say where a prefill worker listens."""
    return PeerAddress(worker_id=worker_id, instance=1, transport=transport, host="127.0.0.1", port=1)


async def answer(prefill: ScriptedWorker, decode: ScriptedWorker, text: str, finish: FinishReason = STOP) -> Reserve:
    """Answer the next request with a text, byte by byte; STOP adds EOS."""
    ids = byte_ids(text) + ([EOS_ID] if finish is STOP else [])
    reserve = await decode.hear(Reserve)
    await prefill.first(ids[0])
    decode.emit(reserve, ids[1:], finish=finish)
    return reserve


async def events(response: aiohttp.ClientResponse) -> list[Any]:
    """Read a whole stream; [DONE] is kept as a string."""
    found: list[Any] = []
    async for line in response.content:
        if line.startswith(b"data: "):
            data = line[6:].strip()
            found.append("[DONE]" if data == b"[DONE]" else json.loads(data))
    return found
