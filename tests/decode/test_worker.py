"""A prefill and a decode worker with a tiny model, real channels and both transports, placed by a scripted router."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decode.config import DecodeConfig
from decode.worker import DecodeWorker
from engine.compute_loop import ComputeLoop
from engine.config import EngineConfig, ServiceConfig
from engine.loading import LoadedModel
from kvtransfer.config import TransferConfig
from kvtransfer.transports import open_transport
from prefill.config import PrefillConfig
from prefill.worker import PrefillWorker
from protocol.channel import Channel
from protocol.request import FinishReason, SamplingParams, TokenRow
from protocol.wire import Abort, Declined, FirstToken, Links, Members, Prefill, Register, Reserve, Role, Tokens
from tests.engine.scripted_router import SECRET, ScriptedRouter
from tests.engine.tiny import tiny_model

MAX_TOKENS = 12


@dataclass
class Cluster:
    """Both workers, registered and linked, and the router's ends of their channels."""

    router: ScriptedRouter
    prefill: PrefillWorker
    decode: DecodeWorker
    to_prefill: Channel
    to_decode: Channel

    def place(self, transfer_id: int, prompt: list[int], *, needs_decode: bool = True, **sampling: Any) -> None:
        """Send RESERVE and PREFILL at the same time."""
        params = SamplingParams(seed=transfer_id, **{"max_tokens": MAX_TOKENS, **sampling})
        if needs_decode:
            self.to_decode.post(
                Reserve(
                    request_id=transfer_id, transfer_id=transfer_id, epoch=1, prefill_worker_id="p0",
                    prompt=tuple(prompt), sampling=params,
                )
            )  # fmt: skip
        receiver = "d0" if needs_decode else None
        self.to_prefill.post(
            Prefill(
                request_id=transfer_id, transfer_id=transfer_id, epoch=1, decode_worker_id=receiver,
                prompt=tuple(prompt), sampling=params, deadline_s=1.0,
            )
        )  # fmt: skip

    async def rows(self, request_id: int) -> list[TokenRow]:
        """Wait for the end of a request; return its rows in order of their index."""
        async with asyncio.timeout(20):
            while True:
                rows = self._rows(request_id)
                if any(row.finish_reason for row in rows):
                    return rows
                await asyncio.sleep(0.01)

    def _rows(self, request_id: int) -> list[TokenRow]:
        firsts = [m.row for m in self.router.received if isinstance(m, FirstToken)]
        later = [row for m in self.router.received if isinstance(m, Tokens) for row in m.rows]
        return sorted((r for r in firsts + later if r.request_id == request_id), key=lambda r: r.index)

    async def quiet(self) -> None:
        """Wait until both pools hold nothing."""
        async with asyncio.timeout(5):
            for worker in (self.prefill, self.decode):
                while worker.stats().blocks_leased or worker.service.census()["num_placements"]:
                    await asyncio.sleep(0.01)
                assert worker.service.census()["is_balanced"]


@asynccontextmanager
async def _cluster(model: LoadedModel, transport_name: str, folder: Path, **decode: Any) -> AsyncIterator[Cluster]:
    router = ScriptedRouter()
    await router.start()
    engine = EngineConfig(model="unused: already loaded")
    transfer = TransferConfig(transport=transport_name, slot_bytes=1 << 16, num_slots=4)

    def service(worker_id: str) -> ServiceConfig:
        return ServiceConfig(worker_id, (router.url,), SECRET, admin_port=None, drain_s=5.0)

    shared = open_transport(transfer, SECRET)
    other = shared if transport_name == "inproc" else open_transport(transfer, SECRET)
    loops = ComputeLoop(1), ComputeLoop(1)
    prefill = PrefillWorker(
        PrefillConfig(engine, service("p0"), transfer, folder, chunk_tokens=32, layer_push_min_tokens=16),
        model, loops[0], shared,
    )  # fmt: skip
    decode_worker = DecodeWorker(
        DecodeConfig(engine, service("d0"), transfer, folder, **decode), model, loops[1], other
    )
    await prefill.start()
    for loop in loops:
        loop.start()
    running = [asyncio.create_task(w.service.run()) for w in (prefill, decode_worker)]
    try:
        yield await _linked(router, prefill, decode_worker)
        for worker in (prefill, decode_worker):
            worker.service.begin_drain()
        assert await asyncio.gather(*running) == [0, 0]
    finally:
        await decode_worker.close()
        await prefill.close()
        for transport in {shared, other}:
            await transport.close()
        for loop in loops:
            await loop.stop()
        await router.stop()


async def _linked(router: ScriptedRouter, prefill: PrefillWorker, decode: DecodeWorker) -> Cluster:
    async with asyncio.timeout(10):
        while len(router.channels) < 2:
            await asyncio.sleep(0.01)
        registered = [m for m in router.received if isinstance(m, Register)]
        by_role = {m.role: channel for m, channel in zip(registered, router.channels, strict=True)}
        address = next(m.address for m in registered if m.role is Role.PREFILL)
        assert address is not None
        by_role[Role.DECODE].post(Members(peers=(address,)))
        while not any(isinstance(m, Links) and m.peers for m in router.received):
            await asyncio.sleep(0.01)
    return Cluster(router, prefill, decode, by_role[Role.PREFILL], by_role[Role.DECODE])


def _prompt(seed: int, length: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, 256, length)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"), num_kv_blocks=128)


@pytest.mark.parametrize("transport", ["inproc", pytest.param("ucx", marks=pytest.mark.ucx)])
async def test_both_transports_give_the_same_tokens_and_leave_nothing(
    model: LoadedModel, transport: str, tmp_path: Path
) -> None:
    async with _cluster(model, transport, tmp_path) as cluster:
        for transfer_id, length in enumerate([1, 8, 9, 100, 33], start=1):
            cluster.place(transfer_id, _prompt(transfer_id, length))
        answers = {i: await cluster.rows(i) for i in range(1, 6)}
        await cluster.quiet()
        stats = cluster.decode.stats()
        assert stats.num_blocks_transferred == 1 + 1 + 2 + 13 + 5
        assert stats.num_bytes_transferred == stats.num_blocks_transferred * model.fingerprint.block_bytes
        assert stats.num_transfers == 5 and stats.num_transfers_failed == 0
    for rows in answers.values():
        assert [r.index for r in rows] == list(range(MAX_TOKENS))
        assert rows[-1].finish_reason is FinishReason.LENGTH
    tokens = {i: [r.token_id for r in rows] for i, rows in answers.items()}
    assert tokens == EXPECTED.setdefault("tokens", tokens)


# The tokens of whichever transport ran first: the other must give the same.
EXPECTED: dict[str, dict[int, list[int]]] = {}


async def test_one_token_needs_no_decode_worker(model: LoadedModel, tmp_path: Path) -> None:
    async with _cluster(model, "inproc", tmp_path) as cluster:
        cluster.place(1, _prompt(1, 40), needs_decode=False, max_tokens=1)
        rows = await cluster.rows(1)
        assert len(rows) == 1 and rows[0].finish_reason is FinishReason.LENGTH
        await cluster.quiet()
        assert cluster.decode.stats().num_transfers == 0


async def test_a_first_token_that_ends_the_request_frees_the_grant(model: LoadedModel, tmp_path: Path) -> None:
    async with _cluster(model, "inproc", tmp_path) as cluster:
        cluster.place(1, _prompt(1, 40), max_tokens=1)
        assert len(await cluster.rows(1)) == 1
        await cluster.quiet()


async def test_abort_at_any_moment_leaves_nothing(model: LoadedModel, tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    async with _cluster(model, "inproc", tmp_path) as cluster:
        for transfer_id in range(1, 60):
            cluster.place(transfer_id, _prompt(transfer_id % 5, int(rng.integers(1, 120))))
            await asyncio.sleep(float(rng.random()) * 0.03)
            for channel in (cluster.to_prefill, cluster.to_decode):
                channel.post(Abort(transfer_id=transfer_id, reason="client left"))
        await cluster.quiet()
        cluster.place(100, _prompt(100, 50))
        assert len(await cluster.rows(100)) == MAX_TOKENS
        await cluster.quiet()


async def test_no_room_is_declined_and_harms_nobody(model: LoadedModel, tmp_path: Path) -> None:
    async with _cluster(model, "inproc", tmp_path, max_num_seqs=1) as cluster:
        cluster.place(1, _prompt(1, 60), max_tokens=40)
        cluster.place(2, _prompt(2, 60))
        declined = await cluster.router.until(lambda m: isinstance(m, Declined))
        assert isinstance(declined, Declined)
        for channel in (cluster.to_prefill, cluster.to_decode):
            channel.post(Abort(transfer_id=declined.transfer_id, reason="declined"))
        other = 3 - declined.transfer_id
        assert len(await cluster.rows(other)) in (40, MAX_TOKENS)
        await cluster.quiet()


async def test_a_token_outside_the_vocabulary_is_declined(model: LoadedModel, tmp_path: Path) -> None:
    async with _cluster(model, "inproc", tmp_path) as cluster:
        cluster.place(1, [5, 9999])
        declined = await cluster.router.until(lambda m: isinstance(m, Declined))
        assert isinstance(declined, Declined) and "9999" in declined.reason
        await cluster.quiet()
