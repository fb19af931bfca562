"""`kvtransfer`'s two sides moving blocks as often as they are asked to, in one process or in two.

1. The sender listens; the receiver, beside it or in a process of its own (`bench.gpu.handoff_peer`), dials.
2. For each transfer the receiver grants its blocks, then the clock starts: cells ready, committed, LANDED.
3. Receiver, sender, listener and transport are closed, in this order.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from bench.gpu.rig import Rig
from engine.kv_cache import KVCache
from kvtransfer.config import TransferConfig
from kvtransfer.receiving import ReceiveSide
from kvtransfer.sending import SendSide
from kvtransfer.tombstones import Ending
from kvtransfer.transport import Endpoint, Identity, Transport
from kvtransfer.transports import open_transport
from protocol.handoff import SendRange
from protocol.wire import PeerAddress

Way = Literal["inproc", "ucx"]
Grant = Callable[[int, int], Awaitable[None]]
"""Let the receiver grant so many blocks to a transfer; returns once it has."""

SENDER, RECEIVER = "bench-prefill", "bench-decode"
_LINK_BUDGET_S, _TRANSFER_BUDGET_S, _STOP_BUDGET_S = 60.0, 30.0, 10.0
_NUM_WARM: Final = 2
_FIRST_TOKEN_ID: Final = 3
_CHECKOUT: Final = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Found:
    """Seconds of each transfer, by size in the order asked for, and what the two ends had agreed on."""

    times_s: list[list[float]]
    slots: str
    checksum: str


def transfer_config(way: Way) -> TransferConfig:
    """Give the defaults, with budgets for a peer that compiles kernels first."""
    return TransferConfig(transport=way, connect_s=_LINK_BUDGET_S, progress_s=20.0)


class Sender:
    """The prefill worker's half, and a future for what it waits for.

    Attributes:
        linked: the endpoint, once a receiver has dialled.
    """

    def __init__(self, rig: Rig, config: TransferConfig) -> None:
        self._num_layers = rig.loaded.fingerprint.num_layers
        self._ended: dict[int, asyncio.Future[str | None]] = {}
        self.linked: asyncio.Future[Endpoint] = asyncio.get_running_loop().create_future()
        self.side = SendSide(rig.kv_cache, config, self._end)

    def serve(self, endpoint: Endpoint) -> None:
        """Take the receiver's connection."""
        self.side.serve(endpoint)
        if not self.linked.done():
            self.linked.set_result(endpoint)

    async def send(self, transfer_id: int, num_blocks: int) -> float:
        """Send granted blocks; return the seconds until they landed. Raises RuntimeError where they did not."""
        ended = self._ended[transfer_id] = asyncio.get_running_loop().create_future()
        begin_s = time.perf_counter()
        self.side.open(transfer_id, RECEIVER, range(num_blocks))
        self.side.ready(transfer_id, SendRange(0, num_blocks, 0, self._num_layers))
        self.side.commit(transfer_id, _FIRST_TOKEN_ID)
        reason = await asyncio.wait_for(ended, _TRANSFER_BUDGET_S)
        if reason is not None:
            raise RuntimeError(f"transfer {transfer_id} ended: {reason}")
        return time.perf_counter() - begin_s

    def _end(self, transfer_id: int, ending: Ending | None) -> None:
        self._ended.pop(transfer_id).set_result(None if ending is None else ending.reason)


async def transfers(rig: Rig, way: Way, num_blocks: Sequence[int], num_rounds: int) -> Found:
    """Move each number of blocks several times; return how long each took.

    Raises:
        ConfigError: the transport cannot be had here.
        RuntimeError: the receiver did not start, or a transfer broke.
    """
    config, secret = transfer_config(way), secrets.token_bytes(32)
    transport = open_transport(config, secret)
    sender = Sender(rig, config)
    identity = Identity(SENDER, 1, rig.loaded.fingerprint, sender.side.slot_store)
    try:
        listener = await transport.listen(identity, sender.serve)
        address, most = listener.address, max(num_blocks)
        receiver = (
            _beside(rig, transport, config, address, most)
            if way == "inproc"
            else _in_process(rig, secret, address, most)
        )
        try:
            async with receiver as (grant, ended):
                endpoint = await _first_of(sender.linked, ended)
                times_s = [await _rounds(sender, grant, count, num_rounds) for count in num_blocks]
        finally:
            await sender.side.close()
            await listener.close()
    finally:
        await transport.close()
    return Found(times_s, endpoint.agreement.kind, endpoint.agreement.checksum)


async def _rounds(sender: Sender, grant: Grant, num_blocks: int, num_rounds: int) -> list[float]:
    times_s = []
    for number in range(_NUM_WARM + num_rounds):
        transfer_id = num_blocks * 1000 + number
        await grant(transfer_id, num_blocks)
        times_s.append(await sender.send(transfer_id, num_blocks))
    return times_s[_NUM_WARM:]


async def _first_of(linked: asyncio.Future[Endpoint], ended: asyncio.Future[Any]) -> Endpoint:
    done, _ = await asyncio.wait({linked, ended}, timeout=_LINK_BUDGET_S, return_when=asyncio.FIRST_COMPLETED)
    if linked in done:
        return linked.result()
    raise RuntimeError("the receiver ended" if ended in done else f"no receiver within {_LINK_BUDGET_S:.0f} s")


@contextlib.asynccontextmanager
async def _beside(
    rig: Rig, transport: Transport, config: TransferConfig, address: PeerAddress, num_blocks: int
) -> AsyncIterator[tuple[Grant, asyncio.Future[Any]]]:
    side = new_receiver(rig.new_kv_cache(num_blocks), config, transport)
    side.set_peers([address])

    async def grant(transfer_id: int, count: int) -> None:
        side.open(transfer_id, SENDER, range(count), 0)

    try:
        yield grant, asyncio.get_running_loop().create_future()
    finally:
        await side.close()


def new_receiver(cache: KVCache, config: TransferConfig, transport: Transport) -> ReceiveSide:
    """Give the decode worker's half. What breaks is told by the sender, whom the receiver tells."""
    identity = Identity(RECEIVER, 2, cache.fingerprint)
    return ReceiveSide(cache, config, transport, identity, lambda *_: None, lambda *_: None, lambda: None)


@contextlib.asynccontextmanager
async def _in_process(
    rig: Rig, secret: bytes, address: PeerAddress, num_blocks: int
) -> AsyncIterator[tuple[Grant, asyncio.Future[Any]]]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"{__package__}.handoff_peer"),
        cwd=_CHECKOUT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    to_peer, from_peer = process.stdin, process.stdout
    told = {
        "fingerprint": msgspec.to_builtins(rig.loaded.fingerprint),
        "address": msgspec.to_builtins(address),
        "num_blocks": num_blocks,
        "secret": secret.hex(),
    }

    async def grant(transfer_id: int, count: int) -> None:
        to_peer.write(f"{transfer_id} {count}\n".encode())
        if not await asyncio.wait_for(from_peer.readline(), _TRANSFER_BUDGET_S):
            raise RuntimeError("the receiver ended")

    ended = asyncio.ensure_future(process.wait())
    try:
        to_peer.write(json.dumps(told).encode() + b"\n")
        yield grant, ended
    finally:
        to_peer.close()  # the peer ends with its input
        try:
            await asyncio.wait_for(asyncio.shield(ended), _STOP_BUDGET_S)
        except TimeoutError:
            process.kill()
            await ended
