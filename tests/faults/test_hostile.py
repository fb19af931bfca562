"""Strangers at every port, and a router without descriptors: no stream notices, and nobody has to be started again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import signal
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest

from tests.e2e.client import session
from tests.e2e.server import Server, wait_until
from tests.faults.ledger import Ledger, Request
from tests.faults.load import ClosedLoop
from tests.faults.mutated import busy_pid
from tests.faults.phases import WHOLE_BUDGET_S, Cluster

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.ucx, pytest.mark.slow]

STREAM = Request("The longest road in the country", 400, 0.8, 7)
NUM_FRAMES = 2000
NUM_AT_ONCE = 16
SPARE_DESCRIPTORS = 4
STOPPED_S = 5.0
SEED = 1
# What a pickle that runs a command looks like; nothing here could make one.
PICKLE = b"\x80\x04cposix\nsystem\n(S'kill -9 -1'\ntR."
BOMBS = (
    b"\x91" * 200_000,  # arrays in arrays
    b"\x81\xa1a" * 100_000,  # maps in maps
    b"\xdd\xff\xff\xff\xff",  # an array of four thousand million elements, of which none comes
    b"\xdb\xff\xff\xff\xff" + b"x" * 100,
    b"\xc6\x7f\xff\xff\xff",
    b"\xc7\xff\x05" + b"\x00" * 255,  # an extension type
)


@pytest.fixture
def server(two_decodes: Server) -> Server:
    """The shared workers, all there."""
    wait_until(lambda: len(two_decodes.workers()) == 3, WHOLE_BUDGET_S, "whole")
    return two_decodes


async def beside(server: Server, fault: Callable[[], Awaitable[None]]) -> list[str]:
    """Stream again and again while something happens; return what was wrong, and who is another process than before."""
    async with session() as http:
        ledger, cluster = Ledger(http, server.url), Cluster(server, http, {"decode": 2, "prefill": 1})
        oracle = await ledger.oracle(STREAM)
        before = await asyncio.to_thread(pids, server)
        loop = ClosedLoop(ledger, {STREAM: oracle}, random.Random(SEED), width=1)

        async def once_begun() -> None:
            while not any(len(record.token_ids) > 20 for record in loop.running):
                await asyncio.sleep(0.001)
            await fault()

        tally = await loop.during(once_begun())
        faults = tally.faults + await cluster.aftermath()
        after = await asyncio.to_thread(pids, server)
        return faults + [f"{name} is another process" for name in before if after.get(name) != before[name]]


def pids(server: Server) -> dict[str, int]:
    found = {str(worker["worker_id"]): int(worker["pid"]) for worker in server.workers()}
    return found | {"router": server.children()["router"]}


def listening_ports(pid: int) -> list[int]:
    """Return the TCP ports that a process listens on."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(entry).removeprefix("socket:[").removesuffix("]"))
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sorted({int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and row[9] in inodes})


def num_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def noise(dice: random.Random) -> bytes:
    """Draw a frame: random bytes, a bomb, a pickle, or the beginning of something that nearly fits."""
    kind = dice.randrange(4)
    if kind == 0:
        return dice.randbytes(dice.choice([0, 1, 7, 64, 1000, 70_000]))
    if kind == 1:
        return dice.choice(BOMBS)
    if kind == 2:
        return PICKLE + dice.randbytes(dice.randrange(20))
    return bytes([0x80 + dice.randrange(16)]) + b"\xa4type\xa8Register" + dice.randbytes(dice.randrange(200))


async def test_strangers_at_every_port_change_no_token(server: Server) -> None:
    dice, sent = random.Random(SEED), [0]
    found = pids(server)
    ports = {name: listening_ports(pid) for name, pid in found.items()}
    assert len(ports["router"]) == 2 and len(ports["prefill-0"]) == 2, ports  # clients, control; peer, admin

    async def storm() -> None:
        gate = asyncio.Semaphore(NUM_AT_ONCE)
        async with aiohttp.ClientSession() as http, asyncio.TaskGroup() as group:
            for number in range(NUM_FRAMES):
                name = dice.choice(list(ports))
                port, frame = dice.choice(ports[name]), noise(dice)
                await gate.acquire()
                if number % 2:
                    work = _as_peer(http, port, "/control" if name == "router" else "/peer", frame)
                else:
                    work = _raw(port, frame)
                group.create_task(work).add_done_callback(lambda _: gate.release())
                sent[0] += 1

    assert await beside(server, storm) == []
    assert sent[0] == NUM_FRAMES
    said = server.log.read_text()
    assert "refused a connection from 127.0.0.1" in said and "refused a peer from 127.0.0.1" in said


async def _raw(port: int, frame: bytes) -> None:
    """Say something on a bare connection, and leave."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(5.0):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(frame)
                await writer.drain()
            finally:
                writer.close()


async def _as_peer(http: aiohttp.ClientSession, port: int, path: str, frame: bytes) -> None:
    """Say something in the place of a handshake, where there is one, and read what comes back."""
    with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
        async with asyncio.timeout(5.0), http.ws_connect(f"http://127.0.0.1:{port}{path}") as web_socket:
            await web_socket.send_bytes(frame)
            while (await web_socket.receive()).type is aiohttp.WSMsgType.BINARY:
                await web_socket.send_bytes(frame)


async def test_a_router_without_descriptors_loses_no_stream(server: Server) -> None:
    router = server.children()["router"]
    most = resource.prlimit(router, resource.RLIMIT_NOFILE)
    address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))

    async def starve() -> None:
        busy = await asyncio.to_thread(busy_pid, server)
        limit = num_descriptors(router) + SPARE_DESCRIPTORS
        resource.prlimit(router, resource.RLIMIT_NOFILE, (limit, most[1]))
        idle: list[socket.socket] = []
        try:
            while num_descriptors(router) < limit:  # what the router cannot take waits in its socket
                idle.append(socket.create_connection(address))
                await asyncio.sleep(0.05)
            os.kill(busy, signal.SIGSTOP)
            await asyncio.sleep(STOPPED_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(busy, signal.SIGCONT)
            for each in idle:
                each.close()
            with contextlib.suppress(ProcessLookupError):  # who is gone is told below
                resource.prlimit(router, resource.RLIMIT_NOFILE, most)
        assert len(idle) >= SPARE_DESCRIPTORS

    assert await beside(server, starve) == []
    assert "worker decode-" in (said := server.log.read_text()) and "is gone: silent for" in said
