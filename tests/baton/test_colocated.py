"""Both workers of one process with a tiny model, over real channels, placed by a scripted router."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from baton import config
from baton.colocated import ColocatedConfig, ColocatedWorkers
from decode.config import DecodeConfig
from engine.compute_loop import ComputeLoop
from engine.config import EngineConfig, ServiceConfig
from engine.loading import LoadedModel
from kvtransfer.config import TransferConfig
from prefill.config import PrefillConfig
from protocol.channel import Channel
from protocol.errors import ConfigError
from protocol.request import FinishReason, SamplingParams, TokenRow
from protocol.wire import (
    Abort,
    Declined,
    FirstToken,
    Links,
    Members,
    PeerAddress,
    Prefill,
    Register,
    Reserve,
    Role,
    Tokens,
    TransferFailed,
    Welcome,
)
from tests.baton.test_config import settings
from tests.decode.pair import Pair, prompt_of
from tests.engine.scripted_router import SECRET, ScriptedRouter
from tests.engine.tiny import tiny_model

NUM_BLOCKS = 128
MAX_TOKENS = 12
LEASE_S = 2.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"), num_kv_blocks=NUM_BLOCKS)


@dataclass
class Process:
    """A colocated process and the routers' ends of its channels, one router after the other."""

    workers: ColocatedWorkers
    routers: list[ScriptedRouter]
    to_prefill: list[Channel]
    to_decode: list[Channel]

    def place(
        self,
        transfer_id: int,
        prompt: list[int],
        *,
        router: int = 0,
        halves: tuple[type, ...] = (Reserve, Prefill),
        **sampling: Any,
    ) -> None:
        """Send RESERVE and PREFILL, or one of them, in an order that depends on the number."""
        params = SamplingParams(seed=transfer_id, **{"max_tokens": MAX_TOKENS, **sampling})
        reserve = Reserve(
            request_id=transfer_id, transfer_id=transfer_id, epoch=1, prefill_worker_id="c-prefill",
            prompt=tuple(prompt), sampling=params,
        )  # fmt: skip
        needs_decode = params.max_tokens > 1
        prefill = Prefill(
            request_id=transfer_id, transfer_id=transfer_id, epoch=1, prompt=tuple(prompt), sampling=params,
            decode_worker_id="c-decode" if needs_decode else None, deadline_s=1.0,
        )  # fmt: skip
        sends = [(self.to_decode, reserve)] * needs_decode + [(self.to_prefill, prefill)]
        for channels, message in sends if transfer_id % 2 else sends[::-1]:
            if isinstance(message, halves):
                channels[router].post(message)

    def abort(self, transfer_id: int, *, router: int = 0) -> None:
        for channels in (self.to_prefill, self.to_decode):
            channels[router].post(Abort(transfer_id=transfer_id, reason="client left"))

    async def rows(self, request_id: int, *, router: int = 0) -> list[TokenRow]:
        """Wait for the end of a request; return its rows in order of their index."""
        async with asyncio.timeout(20):
            while True:
                received = self.routers[router].received
                rows = [m.row for m in received if isinstance(m, FirstToken)]
                rows += [row for m in received if isinstance(m, Tokens) for row in m.rows]
                rows = sorted((r for r in rows if r.request_id == request_id), key=lambda r: r.index)
                if any(row.finish_reason for row in rows):
                    return rows
                await asyncio.sleep(0.01)

    async def quiet(self) -> None:
        """Wait until nothing is placed and no block is leased; every block is counted once."""
        prefill, decode = self.workers.services
        async with asyncio.timeout(5):
            while self.workers.decode.stats().blocks_leased or any(
                service.census()["num_placements"] for service in (prefill, decode)
            ):
                await asyncio.sleep(0.01)
        for service, total in ((prefill, 0), (decode, NUM_BLOCKS)):
            blocks = service.census()["blocks"]
            assert isinstance(blocks, dict) and service.census()["is_balanced"]
            assert blocks["total"] == total and blocks["leased"] == 0


def _config(folder: Path, routers: list[ScriptedRouter], **prefill: Any) -> ColocatedConfig:
    engine, transfer = EngineConfig(model="unused: already loaded"), TransferConfig(transport="inproc")
    urls = tuple(router.url for router in routers) or ("http://nobody",)
    service = ServiceConfig("c-prefill", urls, SECRET, admin_port=None, drain_s=5.0)
    return ColocatedConfig(
        PrefillConfig(engine, service, transfer, folder, **prefill),
        DecodeConfig(engine, replace(service, worker_id="c-decode"), transfer, folder, max_num_seqs=8),
    )


@asynccontextmanager
async def colocated_process(
    model: LoadedModel, folder: Path, num_routers: int = 1, **prefill: Any
) -> AsyncIterator[Process]:
    """Run both workers, linked, until the test is done with them."""
    # These routers never send a pulse: what they place is reclaimed after a lease, which no other test may outlast.
    welcome = Welcome(router_id="r0", heartbeat_s=0.05, lease_ttl_s=LEASE_S)
    routers = [ScriptedRouter(welcome=welcome) for _ in range(num_routers)]
    for router in routers:
        await router.start()
    compute = ComputeLoop(1)
    workers = ColocatedWorkers(_config(folder, routers, **prefill), model, compute)
    compute.start()
    running = asyncio.create_task(workers.run())
    try:
        process = Process(workers, routers, [], [])
        for router in routers:
            await _link(process, router)
        yield process
        workers.prefill.service.begin_drain()  # takes the other along
        assert await running == 0
    finally:
        running.cancel()
        await compute.stop()
        for router in routers:
            await router.stop()


async def _link(process: Process, router: ScriptedRouter) -> None:
    async with asyncio.timeout(10):
        while len(router.channels) < 2:
            await asyncio.sleep(0.01)
        registered = [m for m in router.received if isinstance(m, Register)]
        by_role = {m.role: channel for m, channel in zip(registered, router.channels, strict=True)}
        address = next(m.address for m in registered if m.role is Role.PREFILL)
        assert address is not None and address.transport == "local"
        assert all(m.num_blocks == NUM_BLOCKS for m in registered)
        by_role[Role.DECODE].post(Members(peers=(address,)))
        while not any(isinstance(m, Links) and m.peers for m in router.received):
            await asyncio.sleep(0.01)
    process.to_prefill.append(by_role[Role.PREFILL])
    process.to_decode.append(by_role[Role.DECODE])


def _expected(model: LoadedModel, transfer_id: int, prompt: list[int]) -> list[int]:
    pair = Pair(model, chunk_tokens=512)
    assert pair.place(transfer_id, prompt, SamplingParams(seed=transfer_id, max_tokens=MAX_TOKENS), [])
    pair.run()
    return pair.tokens[transfer_id]


async def test_streams_of_two_routers_are_those_of_separate_workers_and_nothing_is_left(
    model: LoadedModel, tmp_path: Path
) -> None:
    prompts = {i: prompt_of(i, length) for i, length in enumerate([1, 8, 9, 100, 33, 40], start=1)}
    async with colocated_process(model, tmp_path, num_routers=2) as process:
        for transfer_id, prompt in prompts.items():
            process.place(transfer_id, prompt, router=transfer_id % 2)
        answers = {i: await process.rows(i, router=i % 2) for i in prompts}
        await process.quiet()
        prefill, decode = process.workers.prefill.stats(), process.workers.decode.stats()
        assert (prefill.num_computed_tokens, prefill.blocks_total, prefill.num_transfers) == (191, 0, 0)
        assert (decode.num_transfers, decode.num_bytes_transferred, decode.num_transfers_failed) == (6, 0, 0)
        for router in process.routers:
            firsts = [i for i, m in enumerate(router.received) if isinstance(m, FirstToken)]
            assert len(firsts) == 3
    for transfer_id, rows in answers.items():
        assert [row.index for row in rows] == list(range(MAX_TOKENS))
        assert [row.token_id for row in rows] == _expected(model, transfer_id, prompts[transfer_id])
        assert rows[-1].finish_reason is FinishReason.LENGTH


async def test_one_token_and_a_first_token_that_ends_the_request_leave_nothing(
    model: LoadedModel, tmp_path: Path
) -> None:
    async with colocated_process(model, tmp_path) as process:
        process.place(1, prompt_of(1, 40), max_tokens=1)
        (row,) = await process.rows(1)
        assert row.finish_reason is FinishReason.LENGTH
        process.place(2, prompt_of(1, 40), temperature=0.0, max_tokens=2)
        first = (await process.rows(2))[0].token_id
        process.place(3, prompt_of(1, 40), temperature=0.0, max_tokens=9, stop_token_ids=(first,))
        (row,) = await process.rows(3)
        assert row.finish_reason is FinishReason.STOP
        await process.quiet()
        assert not any(isinstance(m, TransferFailed) for m in process.routers[0].received)


async def test_abort_at_any_moment_leaves_nothing(model: LoadedModel, tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    async with colocated_process(model, tmp_path) as process:
        for transfer_id in range(1, 50):
            process.place(transfer_id, prompt_of(transfer_id % 5, int(rng.integers(1, 120))))
            await asyncio.sleep(float(rng.random()) * 0.02)
            process.abort(transfer_id)
        await process.quiet()
        process.place(100, prompt_of(100, 50))
        assert len(await process.rows(100)) == MAX_TOKENS
        await process.quiet()


async def test_half_a_placement_is_reclaimed_when_its_lease_runs_out_and_disturbs_nobody(
    model: LoadedModel, tmp_path: Path
) -> None:
    """A slot waits for its prompt, and a prompt for its slot, as long as the router that placed them lives."""
    async with colocated_process(model, tmp_path, num_routers=2) as process:
        process.place(1, prompt_of(1, 60), halves=(Reserve,))
        process.place(2, prompt_of(2, 60), halves=(Prefill,))
        process.place(3, prompt_of(3, 60), router=1)
        assert len(await process.rows(3, router=1)) == MAX_TOKENS
        prefill, decode = process.workers.prefill, process.workers.decode
        assert (prefill.stats().num_waiting, decode.stats().num_waiting) == (1, 1)
        assert not prefill.has_work(), "a prompt without a slot is nothing that must make progress"
        assert decode.stats().blocks_leased == 0
        await process.quiet()
        async with asyncio.timeout(5):
            while prefill.stats().num_waiting or decode.stats().num_waiting:
                await asyncio.sleep(0.01)
        assert prefill.stats().num_computed_tokens == 60


async def test_a_full_batch_is_declined_and_its_prompt_is_never_computed(model: LoadedModel, tmp_path: Path) -> None:
    async with colocated_process(model, tmp_path) as process:
        for transfer_id in range(1, 10):
            process.place(transfer_id, prompt_of(transfer_id, 10), max_tokens=100, ignore_eos=True)
        declined = await process.routers[0].until(lambda m: isinstance(m, Declined))
        assert isinstance(declined, Declined) and "8 sequence slots" in declined.reason
        await process.routers[0].until(lambda m: isinstance(m, Tokens) and len(m.rows) == 8)
        assert process.workers.prefill.stats().num_computed_tokens == 80
        for transfer_id in range(1, 10):
            process.abort(transfer_id)
        await process.quiet()


async def test_only_the_prefill_worker_beside_it_is_linked(model: LoadedModel, tmp_path: Path) -> None:
    async with colocated_process(model, tmp_path) as process:
        links = [m for m in process.routers[0].received if isinstance(m, Links)]
        own = process.workers.prefill.service.registration
        assert links[-1].peers == ((own.worker_id, own.instance),)
        stranger = PeerAddress(worker_id="p9", instance=5, transport="ucx", host="127.0.0.1", port=1)
        process.to_decode[0].post(Members(peers=(stranger,)))
        await process.routers[0].until(lambda m: isinstance(m, Links) and not m.peers)


async def test_multiprocessors_of_a_cpu_cannot_be_divided(model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prefill-sms: 64 multiprocessors of a GPU, but the model is on the cpu"):
        ColocatedWorkers(_config(tmp_path, [], num_sms=64), model, ComputeLoop(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prefill_sms": "64"}, "prefill-sms: divides a GPU between the roles of one process"),
        ({"prefill_sms": "64", "mode": "colocated", "device": "cpu"}, "prefill-sms: divides the multiprocessors"),
        ({"prefill_sms": "-8", "mode": "colocated", "device": "cuda"}, "num_sms must not be negative"),
    ],
)
def test_serve_refuses_to_divide_what_is_not_there(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.serve_config(settings(also=arguments))


def test_the_share_of_prefill_reaches_the_worker(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s" * 32)
    given = settings("colocated", prefill_sms="64", secret_file=str(tmp_path / "secret"))
    model = config.ResolvedModel("/m", "/m", "m")
    prefill, decode = config.colocated_configs(given, model)
    assert ColocatedConfig(prefill, decode).prefill.num_sms == 64
