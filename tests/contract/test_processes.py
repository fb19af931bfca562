"""Two processes, and one of them dies or stops in the middle of a transfer."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
import pytest_asyncio

from protocol.handoff import SendRange
from protocol.wire import PeerAddress
from tests.contract.workers import PROCESS_CONFIG, PROCESS_LAYOUT, DecodeWorker, PrefillWorker, Site, until

pytestmark = pytest.mark.ucx
NUM_BLOCKS = 64


@pytest.fixture
def transport_name() -> str:
    """Processes share no memory: UCX only."""
    return "ucx"


@pytest_asyncio.fixture
async def processes() -> AsyncIterator[list[asyncio.subprocess.Process]]:
    """Collect children; whatever is left is killed."""
    children: list[asyncio.subprocess.Process] = []
    yield children
    for child in children:
        with suppress(ProcessLookupError):
            child.kill()
        await child.wait()


class Child:
    """A peer process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(cls, processes: list[asyncio.subprocess.Process], *args: object) -> Child:
        """Start one role; tests/contract/peer_process.py says which."""
        command = [sys.executable, "-m", "tests.contract.peer_process", *map(str, args)]
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        processes.append(process)
        return cls(process)

    async def line(self) -> str:
        """Return its next word."""
        assert self.process.stdout is not None
        return (await asyncio.wait_for(self.process.stdout.readline(), 20)).decode().strip()

    def transfer(self, transfer_id: int) -> None:
        """Let it begin a transfer."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{transfer_id}\n".encode())

    def signal(self, number: signal.Signals) -> float:
        """Send a signal; return when."""
        os.kill(self.process.pid, number)
        return time.perf_counter()


@pytest.fixture(autouse=True)
def _large_blocks(site: Site) -> None:
    site.layout, site.config = PROCESS_LAYOUT, PROCESS_CONFIG


async def linked_decode(site: Site, child: Child) -> DecodeWorker:
    """Start a decode worker here that is linked with the prefill worker in the child."""
    port = int(await child.line())
    decode = await site.decode(num_blocks=NUM_BLOCKS)
    decode.side.set_peers([PeerAddress(worker_id="p0", instance=1, transport="ucx", host="127.0.0.1", port=port)])
    await until(lambda: bool(decode.side.links), budget_s=20)
    return decode


async def linked_prefill(site: Site, processes: list[asyncio.subprocess.Process]) -> tuple[PrefillWorker, Child]:
    """Start a prefill worker here and a decode worker in a child."""
    prefill = await site.prefill(num_blocks=NUM_BLOCKS)
    child = await Child.start(processes, "decode", NUM_BLOCKS, prefill.address.port)
    await until(lambda: "d0" in prefill.side._peers, budget_s=20)
    await child.line()
    return prefill, child


def push(prefill: PrefillWorker, transfer_id: int) -> None:
    prefill.side.open(transfer_id, "d0", range(NUM_BLOCKS))
    prefill.side.ready(transfer_id, SendRange(0, NUM_BLOCKS, 0, PROCESS_LAYOUT.num_layers))
    prefill.side.commit(transfer_id, 5)


async def test_killing_the_prefill_worker_fails_the_transfer_within_a_second(
    site: Site, processes: list[asyncio.subprocess.Process]
) -> None:
    child = await Child.start(processes, "prefill", NUM_BLOCKS)
    decode = await linked_decode(site, child)
    killed_s = 0.0
    scatter = decode.region.scatter

    def scatter_and_kill(*args: Any) -> None:
        nonlocal killed_s
        scatter(*args)
        if decode.region.num_writes == 4:
            killed_s = child.signal(signal.SIGKILL)

    decode.region.scatter = scatter_and_kill  # type: ignore[method-assign,assignment]
    decode.side.open(1, "p0", range(NUM_BLOCKS), 0)
    child.transfer(1)
    await until(lambda: decode.is_over(1))
    assert time.perf_counter() - killed_s < 1
    assert "prefill worker p0 lost" in decode.failed[1]
    assert decode.side.links == ()
    before = decode.region.memory.tobytes()
    await until(lambda: decode.side.slots[0] == decode.side.slots[1], budget_s=1)
    await asyncio.sleep(0.1)
    assert decode.region.memory.tobytes() == before
    assert all(transport.num_pending == 0 for transport in site.transports)  # type: ignore[attr-defined]


async def test_killing_the_decode_worker_ends_the_transfer_within_a_second(
    site: Site, processes: list[asyncio.subprocess.Process]
) -> None:
    prefill, child = await linked_prefill(site, processes)
    child.transfer(1)
    push(prefill, 1)
    await until(lambda: prefill.side.stats.num_pieces >= 4)
    killed_s = child.signal(signal.SIGKILL)
    await until(lambda: 1 in prefill.ended)
    assert time.perf_counter() - killed_s < 1
    assert "decode worker d0 lost" in str(prefill.ended[1])
    await until(lambda: prefill.side.slots[0] == prefill.side.slots[1], budget_s=1)
    assert all(transport.num_pending == 0 for transport in site.transports)  # type: ignore[attr-defined]


async def test_a_stopped_decode_worker_is_found_by_the_progress_budget(
    site: Site, processes: list[asyncio.subprocess.Process]
) -> None:
    prefill, child = await linked_prefill(site, processes)
    child.transfer(1)
    push(prefill, 1)
    await until(lambda: prefill.side.stats.num_pieces >= 4)
    stopped_s = child.signal(signal.SIGSTOP)
    await until(lambda: 1 in prefill.ended)
    assert PROCESS_CONFIG.progress_s * 0.8 < time.perf_counter() - stopped_s < PROCESS_CONFIG.progress_s * 2
    assert any(words in str(prefill.ended[1]) for words in ("no progress", "no credit", "not landed"))
    await until(lambda: prefill.side.slots[0] == prefill.side.slots[1], budget_s=2)
    child.signal(signal.SIGCONT)  # it comes back, finds its connection cut, and dials again
    assert await child.line() == "links"
    assert await child.line() == "links"
    child.transfer(2)
    push(prefill, 2)
    await until(lambda: 2 in prefill.ended)
    assert prefill.ended[2] is None


async def test_a_stopped_prefill_worker_is_found_by_pings(
    site: Site, processes: list[asyncio.subprocess.Process]
) -> None:
    child = await Child.start(processes, "prefill", NUM_BLOCKS)
    decode = await linked_decode(site, child)
    decode.side.open(1, "p0", range(NUM_BLOCKS), 0)
    stopped_s = child.signal(signal.SIGSTOP)
    await until(lambda: decode.is_over(1))
    assert time.perf_counter() - stopped_s < 5 * PROCESS_CONFIG.progress_s
    assert "prefill worker p0 lost" in decode.failed[1]
    await until(lambda: decode.side.slots[0] == decode.side.slots[1], budget_s=2)
