"""Prefill and decode workers reduced to their transfers: what the contract suite starts and looks at."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kvtransfer.config import TransferConfig
from kvtransfer.inproc import InprocTransport
from kvtransfer.receiving import ReceiveSide
from kvtransfer.sending import SendSide
from kvtransfer.tombstones import Ending
from kvtransfer.transport import Endpoint, Identity, Listener, Transport
from kvtransfer.ucx import UcxTransport
from protocol.handoff import SendRange
from protocol.kv_layout import KVFingerprint
from protocol.wire import PeerAddress
from tests.kvtransfer.memory_region import MemoryRegion, fingerprint

SECRET = b"0123456789abcdef0123456789abcdef"
BUDGET_S = 10.0
# Of tests with processes: blocks so large that a transfer can be met half-way, budgets so short that it is quick.
PROCESS_LAYOUT = fingerprint(num_layers=8, head_dim=512)
PROCESS_CONFIG = TransferConfig(slot_bytes=1 << 20, num_slots=4, progress_s=0.5, connect_s=5.0)


async def until(condition: Callable[[], bool], budget_s: float = BUDGET_S) -> None:
    """Wait for a condition that no future announces."""
    give_up_s = time.monotonic() + budget_s
    while not condition():
        assert time.monotonic() < give_up_s, "it did not happen in time"
        await asyncio.sleep(0.002)


@dataclass
class PrefillWorker:
    """A SendSide over random memory."""

    region: MemoryRegion
    side: SendSide
    listener: Listener
    ended: dict[int, str | None] = field(default_factory=dict)
    num_ended: int = 0

    @property
    def address(self) -> PeerAddress:
        """Where it listens."""
        return self.listener.address

    def on_ended(self, transfer_id: int, ending: Ending | None) -> None:
        """Note one end."""
        assert transfer_id not in self.ended, "a transfer ended twice"
        self.ended[transfer_id] = None if ending is None else ending.reason


@dataclass
class DecodeWorker:
    """A ReceiveSide over empty memory."""

    region: MemoryRegion
    side: ReceiveSide = field(init=False)
    complete: dict[int, int] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    begun: list[tuple[str, int]] = field(default_factory=list)

    def on_complete(self, transfer_id: int, first_token_id: int) -> None:
        """Note one completion."""
        assert transfer_id not in self.complete and transfer_id not in self.failed
        self.complete[transfer_id] = first_token_id

    def on_failed(self, transfer_id: int, ending: Ending) -> None:
        """Note one failure."""
        assert transfer_id not in self.complete and transfer_id not in self.failed
        self.failed[transfer_id] = ending.reason

    def is_over(self, transfer_id: int) -> bool:
        """Whether one of the two came."""
        return transfer_id in self.complete or transfer_id in self.failed


class Site:
    """Starts transports and workers, and closes them in the right order.

    Args:
        config: of every worker, unless it is given its own.
        region: what the KV memory of workers is, unless they are given their own: host memory, or opaque.
    """

    def __init__(self, config: TransferConfig, region: type[MemoryRegion] = MemoryRegion) -> None:
        self.config = config
        self.region = region
        self.layout = fingerprint()
        self._inproc = InprocTransport()
        self.transports: list[Transport] = []
        self.bare: list[Endpoint] = []
        self.prefills: list[PrefillWorker] = []
        self.decodes: list[DecodeWorker] = []

    @property
    def is_ucx(self) -> bool:
        """Whether bytes really leave through the network stack."""
        return self.config.transport == "ucx"

    def transport(self, secret: bytes = SECRET, config: TransferConfig | None = None) -> Transport:
        """Return a worker's transport; over inproc all share one."""
        if not self.is_ucx:
            return self._inproc
        self.transports.append(UcxTransport(config or self.config, secret))
        return self.transports[-1]

    async def endpoints(self) -> tuple[Endpoint, Endpoint]:
        """Return the two ends of a fresh connection: dialer, acceptor."""
        accepted: asyncio.Queue[Endpoint] = asyncio.Queue()
        number = random.randrange(1 << 60)
        listener = await self.transport().listen(Identity(f"p{number}", 1, self.layout), accepted.put_nowait)
        dialer = await self.transport().dial(listener.address, Identity(f"d{number}", 2, self.layout))
        self.bare += [dialer, acceptor := await asyncio.wait_for(accepted.get(), BUDGET_S)]
        return dialer, acceptor

    async def prefill(
        self,
        name: str = "p0",
        instance: int = 1,
        num_blocks: int = 64,
        config: TransferConfig | None = None,
        region: type[MemoryRegion] | None = None,
    ) -> PrefillWorker:
        """Start a prefill worker."""
        config = config or self.config
        memory = (region or self.region)(self.layout, num_blocks, seed=instance)
        worker: PrefillWorker
        side = SendSide(memory, config, lambda transfer_id, ending: worker.on_ended(transfer_id, ending))
        identity = Identity(name, instance, self.layout, side.slot_store)
        listener = await self.transport(config=config).listen(identity, side.serve)
        worker = PrefillWorker(memory, side, listener)
        self.prefills.append(worker)
        return worker

    async def decode(
        self,
        *prefills: PrefillWorker,
        name: str = "d0",
        num_blocks: int = 64,
        layout: KVFingerprint | None = None,
        config: TransferConfig | None = None,
        region: type[MemoryRegion] | None = None,
    ) -> DecodeWorker:
        """Start a decode worker and wait until it is linked."""
        config = config or self.config
        layout = layout or self.layout
        worker = DecodeWorker((region or self.region)(layout, num_blocks))
        identity = Identity(name, random.randrange(1 << 60), layout)
        worker.side = ReceiveSide(
            worker.region,
            config,
            self.transport(config=config),
            identity,
            worker.on_complete,
            worker.on_failed,
            lambda: None,
        )
        worker.side.on_begin = lambda sender_id, transfer_id: worker.begun.append((sender_id, transfer_id))
        worker.side.set_peers([p.address for p in prefills])
        self.decodes.append(worker)
        if layout == self.layout:
            await until(lambda: len(worker.side.links) == len(prefills))
            await until(lambda: all(name in p.side._peers for p in prefills))
        return worker

    async def close(self) -> None:
        """Close everything; afterwards every slot is free."""
        for endpoint in self.bare:
            endpoint.abort("test over")  # nobody reads there, so a polite close would wait for its budget
        for decode in self.decodes:
            await decode.side.close()
        for prefill in self.prefills:
            await prefill.side.close()
            await prefill.listener.close()
        for transport in self.transports:
            await transport.close()
        await self._inproc.close()
        await asyncio.sleep(0.01)
        sides: list[ReceiveSide | SendSide] = [*(d.side for d in self.decodes), *(p.side for p in self.prefills)]
        for side in sides:
            assert side.slots[0] == side.slots[1], f"slots lost: {side.slots}"
            assert side.num_open == 0


@dataclass(frozen=True)
class Plan:
    """One transfer of a random shape, and the order in which its cells become ready."""

    transfer_id: int
    source: tuple[int, ...]
    target: tuple[int, ...]
    num_cached_blocks: int
    ranges: tuple[SendRange, ...]
    first_token_id: int

    @classmethod
    def draw(cls, rng: random.Random, transfer_id: int, num_layers: int, free: list[int]) -> Plan:
        """Draw a plan; its target blocks are taken out of `free`."""
        num_blocks = rng.randint(1, min(12, len(free)))
        target = tuple(free.pop() for _ in range(num_blocks))
        source = tuple(rng.sample(range(64), num_blocks))
        num_cached = rng.choice([0, 0, rng.randint(0, num_blocks)])
        chunk, group = rng.randint(1, num_blocks), rng.randint(1, num_layers)
        ranges = [
            SendRange(b, min(chunk, num_blocks - b), layer, min(group, num_layers - layer))
            for b in range(0, num_blocks, chunk)
            for layer in range(0, num_layers, group)
        ]
        rng.shuffle(ranges)
        return cls(transfer_id, source, target, num_cached, tuple(ranges), rng.randrange(50000))

    async def send(self, prefill: PrefillWorker, receiver_id: str, rng: random.Random | None = None) -> None:
        """Compute and hand over; with `rng`, with pauses at random points."""
        prefill.side.open(self.transfer_id, receiver_id, self.source)
        for cells in self.ranges:
            if rng is not None and rng.random() < 0.3:
                await asyncio.sleep(rng.random() * 0.005)
            prefill.side.ready(self.transfer_id, cells)
        prefill.side.commit(self.transfer_id, self.first_token_id)

    def receive(self, decode: DecodeWorker, sender_id: str) -> None:
        """Grant."""
        decode.side.open(self.transfer_id, sender_id, self.target, self.num_cached_blocks)

    def check(self, prefill: PrefillWorker, decode: DecodeWorker) -> None:
        """Assert that the blocks that were not cached arrived byte for byte, and the cached ones were left alone."""
        n = self.num_cached_blocks
        got, sent = decode.region.memory[list(self.target)], prefill.region.memory[list(self.source)]
        assert (got[n:] == sent[n:]).all()
        assert not got[:n].any()
        assert decode.complete[self.transfer_id] == self.first_token_id
