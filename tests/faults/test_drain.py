"""SIGTERM to each process of a server under load: nobody is refused, no stream changes, a successor takes over."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable

import aiohttp
import pytest

from tests.e2e.client import session
from tests.e2e.server import Server, wait_until
from tests.faults.ledger import Ledger, Record, Request

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.ucx, pytest.mark.slow]

REQUESTS = [Request(f"The longest road in country {i}", 250, (0.0, 0.8)[i % 2], i) for i in range(3)]
LONG = Request(" ".join(f"item {i}" for i in range(600)), 8, 0.0, 0)


@pytest.fixture
def server(two_decodes: Server) -> Server:
    """The shared workers, all there."""
    wait_until(lambda: len(two_decodes.workers()) == 3, 60.0, "whole")
    return two_decodes


def during(server: Server, fault: Callable[[list[Record]], Awaitable[None]], requests: list[Request]) -> list[str]:
    """Stream requests while something happens; return what was wrong with any of them."""

    async def run() -> list[str]:
        async with session() as http:
            ledger = Ledger(http, server.url)
            oracles = [await ledger.oracle(request) for request in requests]
            records = [Record(request) for request in requests]
            running = [asyncio.create_task(ledger.stream(record.request, record)) for record in records]
            await fault(records)
            await asyncio.gather(*running)
            pairs = zip(records, oracles, strict=True)
            return [fault for record, oracle in pairs for fault in record.faults(oracle)]

    return asyncio.run(run())


async def tokens(records: list[Record], num_tokens: int) -> None:
    while any(len(record.token_ids) < num_tokens and not record.is_done for record in records):
        await asyncio.sleep(0.001)


def successor_of(server: Server, worker_id: str, pid: int) -> Callable[[], bool]:
    return lambda: any(w["worker_id"] == worker_id and w["pid"] != pid for w in server.workers())


def test_a_draining_decode_worker_hands_its_streams_over(server: Server) -> None:
    async def terminate(records: list[Record]) -> None:
        await tokens(records, 20)
        busy = max(await asyncio.to_thread(server.workers), key=lambda w: (w["role"] == "decode", w["num_running"]))
        os.kill(busy["pid"], signal.SIGTERM)
        is_back = successor_of(server, busy["worker_id"], busy["pid"])
        await asyncio.to_thread(wait_until, is_back, 20.0, "its successor")
        assert not all(record.is_done for record in records), "it ends before its streams do"

    assert during(server, terminate, REQUESTS) == []
    assert "ended with exit code 0" in server.log.read_text()
    assert "drain budget over" not in server.log.read_text()


def test_a_draining_prefill_worker_finishes_its_prompts(server: Server) -> None:
    async def terminate(_: list[Record]) -> None:
        await asyncio.sleep(0.3)
        (worker,) = [w for w in await asyncio.to_thread(server.workers) if w["role"] == "prefill"]
        os.kill(worker["pid"], signal.SIGTERM)
        is_back = successor_of(server, worker["worker_id"], worker["pid"])
        await asyncio.to_thread(wait_until, is_back, 20.0, "its successor")

    assert during(server, terminate, [LONG, *REQUESTS[:1]]) == []


def test_a_router_with_a_successor_refuses_nobody(server: Server) -> None:
    late = [Request("A good interview begins with", 5, 0.0, 0) for _ in range(30)]
    found: list[Record] = []

    async def terminate(records: list[Record]) -> None:
        await tokens(records, 20)
        pid = server.children()["router"]
        os.kill(pid, signal.SIGTERM)
        async with asyncio.TaskGroup() as group:
            for request in late:
                group.create_task(on_a_new_connection(request))
                await asyncio.sleep(0.1)
        assert server.children()["router"] != pid

    async def on_a_new_connection(request: Request) -> None:
        async with aiohttp.ClientSession() as http:
            found.append(await Ledger(http, server.url).stream(request))

    assert during(server, terminate, REQUESTS) == []
    assert len(found) == len(late)
    assert {fault for record in found for fault in record.faults(found[0].token_ids)} == set()
    assert len(found[0].token_ids) == 5
