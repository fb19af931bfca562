"""The service shell against a scripted router on a real WebSocket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest

from engine.config import ServiceConfig
from engine.service import ServiceState, WorkerService, new_registration
from protocol.channel import Channel
from protocol.kv_layout import KVFingerprint
from protocol.request import SamplingParams, TokenRow
from protocol.wire import (
    Abort,
    Declined,
    Dismissed,
    Heartbeat,
    Links,
    Members,
    PeerAddress,
    Prefill,
    Pulse,
    Register,
    Reserve,
    Role,
    Tokens,
    TransferFailed,
    WorkerStats,
)
from tests.engine.scripted_router import SECRET, ScriptedRouter

FINGERPRINT = KVFingerprint(model_hash="m", dtype="float32", block_size=16, num_layers=1, num_kv_heads=1, head_dim=8)


class Handler:
    """A role that records what the shell asks of it."""

    def __init__(self) -> None:
        self.taken: list[Prefill | Reserve] = []
        self.aborted: list[tuple[int, str]] = []
        self.members: tuple[PeerAddress, ...] | None = None

    def take(self, message: Prefill | Reserve) -> None:
        self.taken.append(message)

    def abort(self, transfer_id: int, reason: str) -> None:
        self.aborted.append((transfer_id, reason))

    def set_members(self, peers: tuple[PeerAddress, ...]) -> None:
        self.members = peers

    def stats(self) -> WorkerStats:
        return WorkerStats(blocks_free=3, blocks_cached=2, blocks_leased=1, blocks_total=6)

    def progress(self) -> int:
        return 42

    def has_work(self) -> bool:
        return False


def _service(url: str, *, drain_s: float = 5.0, secret: bytes = SECRET) -> tuple[WorkerService, Handler]:
    handler = Handler()
    config = ServiceConfig("w0", (url,), secret, connect_retry_s=0.1, drain_s=drain_s)
    return WorkerService(
        config, new_registration(config, Role.DECODE, FINGERPRINT, (6, 4, 96), "test", False), handler
    ), handler


def _reserve(transfer_id: int) -> Reserve:
    return Reserve(
        request_id=transfer_id, transfer_id=transfer_id, epoch=1, prefill_worker_id="p0", prompt=(1,),
        sampling=SamplingParams(seed=0),
    )  # fmt: skip


@pytest.fixture
async def router() -> AsyncIterator[ScriptedRouter]:
    router = ScriptedRouter()
    await router.start()
    yield router
    await router.stop()


async def _until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  polls a recorder
            await asyncio.sleep(0.01)


async def test_it_registers_beats_announces_and_routes_answers(router: ScriptedRouter) -> None:
    service, handler = _service(router.url)
    service.announce(Links(peers=(("p0", 7),)))
    running = asyncio.create_task(service.run())
    registered = await router.until(lambda m: isinstance(m, Register))
    assert isinstance(registered, Register) and registered.worker_id == "w0" and registered.num_blocks == 6
    beat = await router.until(lambda m: isinstance(m, Heartbeat))
    assert isinstance(beat, Heartbeat) and beat.progress == 42 and not beat.has_work
    await router.until(lambda m: isinstance(m, Links))
    router.channels[0].post(Members(peers=()))
    router.channels[0].post(_reserve(1))
    router.channels[0].post(Pulse())
    await _until(lambda: handler.taken)
    assert handler.members == () and service.holds(1)
    service.tell_rows([(1, TokenRow(1, 1, 1, 5)), (99, TokenRow(99, 1, 1, 5))])
    tokens = await router.until(lambda m: isinstance(m, Tokens))
    assert isinstance(tokens, Tokens) and [r.request_id for r in tokens.rows] == [1]
    router.channels[0].post(Abort(transfer_id=1, reason="client left"))
    await _until(lambda: handler.aborted == [(1, "client left")])
    assert not service.holds(1)
    service.begin_drain()
    assert await running == 0 and service.state is ServiceState.STOPPED


async def test_leases_run_out_by_a_timer_when_the_router_falls_silent(router: ScriptedRouter) -> None:
    service, handler = _service(router.url)
    running = asyncio.create_task(service.run())
    await _until(lambda: router.channels)
    router.channels[0].post(_reserve(1))
    await _until(lambda: service.holds(1))
    for _ in range(12):
        router.channels[0].post(Pulse())
        await asyncio.sleep(0.05)
    assert service.holds(1), "pulses keep the lease"
    await _until(lambda: handler.aborted)
    assert handler.aborted == [(1, "lease ran out")] and not service.holds(1)
    # The router may be there: it must hear that its placement is gone, or the stream would wait for ever.
    told = await router.until(lambda message: isinstance(message, TransferFailed))
    assert isinstance(told, TransferFailed) and told.transfer_id == 1 and "lease ran out" in told.reason
    service.begin_drain()
    assert await running == 0


async def test_a_router_that_says_nothing_is_dialled_anew(router: ScriptedRouter) -> None:
    service, _ = _service(router.url)
    running = asyncio.create_task(service.run())
    await _until(lambda: len(router.channels) == 2)
    service.begin_drain()
    assert await running == 0


async def test_a_drain_before_the_start_ends_it_at_once(router: ScriptedRouter) -> None:
    service, _ = _service(router.url)
    service.begin_drain()
    assert await asyncio.wait_for(service.run(), 5.0) == 0


async def test_a_timer_that_fails_ends_the_worker(router: ScriptedRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    service, _ = _service(router.url)
    monkeypatch.setattr(service._links[0], "expired", lambda: 1 / 0)
    assert await asyncio.wait_for(service.run(), 5.0) == 1


async def test_a_new_connection_does_not_renew_what_the_old_one_placed(router: ScriptedRouter) -> None:
    service, handler = _service(router.url)
    running = asyncio.create_task(service.run())
    await _until(lambda: router.channels)
    router.channels[0].post(_reserve(1))
    await _until(lambda: service.holds(1))
    router.channels[0].abort("router restarts")
    await _until(lambda: len(router.channels) == 2)
    pulses = asyncio.create_task(_pulse(router.channels[1]))
    await _until(lambda: handler.aborted)
    pulses.cancel()
    assert handler.aborted == [(1, "lease ran out")]
    service.begin_drain()
    assert await running == 0


async def _pulse(channel: Channel) -> None:
    while True:
        channel.post(Pulse())
        await asyncio.sleep(0.05)


async def test_draining_finishes_what_runs_and_declines_what_is_new(router: ScriptedRouter) -> None:
    service, handler = _service(router.url)
    running = asyncio.create_task(service.run())
    await _until(lambda: router.channels)
    router.channels[0].post(_reserve(1))
    await _until(lambda: service.holds(1))
    service.begin_drain()
    await router.until(lambda m: isinstance(m, Heartbeat) and m.is_draining)
    router.channels[0].post(_reserve(2))
    declined = await router.until(lambda m: isinstance(m, Declined))
    assert isinstance(declined, Declined) and declined.transfer_id == 2
    assert not running.done()
    service.release(1)
    assert await running == 0


async def test_the_drain_budget_ends_a_drain(router: ScriptedRouter) -> None:
    service, _ = _service(router.url, drain_s=0.2)
    running = asyncio.create_task(service.run())
    await _until(lambda: router.channels)
    router.channels[0].post(_reserve(1))
    await _until(lambda: service.holds(1))
    service.begin_drain()
    assert await asyncio.wait_for(running, 3) == 0


async def test_a_final_dismissal_and_a_wrong_secret_end_the_worker_with_the_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cases = [
        (ScriptedRouter(welcome=Dismissed(reason="another model", is_final=True)), "another model"),
        (ScriptedRouter(secret=b"t" * 32), "wrong cluster secret"),
    ]
    for router, words in cases:
        await router.start()
        service, _ = _service(router.url)
        assert await asyncio.wait_for(service.run(), 5) == 2
        assert words in caplog.text
        await router.stop()


async def test_a_dead_compute_thread_ends_the_worker_with_another_code(router: ScriptedRouter) -> None:
    service, _ = _service(router.url)
    running = asyncio.create_task(service.run())
    await _until(lambda: router.channels)
    service.on_dead(RuntimeError("out of memory"))
    assert await asyncio.wait_for(running, 5) == 1


async def test_census_and_health_on_the_admin_port(router: ScriptedRouter, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    service, _ = _service(router.url)
    running = asyncio.create_task(service.run())
    await _until(lambda: router.channels)
    line = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("admin of"))
    port = int(line.rsplit(",", 1)[1].strip(" )"))
    async with aiohttp.ClientSession() as http:
        async with http.get(f"http://127.0.0.1:{port}/census") as response:
            census = await response.json()
        async with http.get(f"http://127.0.0.1:{port}/health") as response:
            assert response.status == 200
    assert census["is_balanced"] and census["blocks"] == {"free": 3, "cached": 2, "leased": 1, "total": 6}
    service.begin_drain()
    assert await running == 0
