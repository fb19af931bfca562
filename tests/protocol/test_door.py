"""Strangers at a port for workers: what they cost, who of them is cut, and that a worker gets in beside them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from protocol import door
from protocol.channel import Channel, accept, dial
from protocol.door import MAX_SAID, MAX_STRANGERS, STRANGER_BYTES, GuardedRunner, Strangers
from protocol.errors import BatonError
from protocol.wire import Abort, Reserve
from tests.protocol.test_channel import SECRET, reservation

UPGRADE = (
    b"GET /test HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n%b\r\n"
)
NUM_STRANGERS = 200
LARGE = 8 << 20
MAX_GROWTH_BYTES = 40 << 20
SERVER = """
import asyncio
from aiohttp import web
from protocol.channel import accept
from protocol.door import GuardedRunner
from protocol.errors import BatonError

async def handle(request):
    try:
        channel = await accept(request, b"0123456789abcdef0123456789abcdef", "test")
    except BatonError:
        return web.Response(status=403)
    return await channel.served()

async def main():
    app = web.Application()
    app.router.add_get("/test", handle)
    runner = GuardedRunner(app, 1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


class Port:
    """A guarded port, and the channels that it let in."""

    def __init__(self, max_num: int = MAX_STRANGERS) -> None:
        self.strangers = Strangers(max_num)
        self.channels: asyncio.Queue[Channel] = asyncio.Queue()
        self.refusals: list[BatonError] = []
        self.port = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        try:
            channel = await accept(request, SECRET, "test")
        except BatonError as error:
            self.refusals.append(error)
            return web.Response(status=403)
        self.channels.put_nowait(channel)
        return await channel.served()

    async def open(self) -> GuardedRunner:
        app = web.Application()
        app.router.add_get("/test", self.handle)
        runner = GuardedRunner(app, 0.2, strangers=self.strangers)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port = int(runner.addresses[0][1])
        return runner

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/test"

    async def emptied(self) -> None:
        """Wait until the last stranger is gone."""
        async with asyncio.timeout(3.0):
            while len(self.strangers):
                await asyncio.sleep(0.01)


@pytest_asyncio.fixture
async def port() -> AsyncIterator[Port]:
    found = Port()
    runner = await found.open()
    yield found
    await runner.cleanup()


def frame(payload: bytes, opcode: int = 2, first: int = 0x80, announced: int | None = None) -> bytes:
    """Return a frame of a client; `first` has the bits beside the opcode."""
    length = len(payload) if announced is None else announced
    if length < 126:
        head = struct.pack("!BB", first | opcode, 0x80 | length)
    elif length < 1 << 16:
        head = struct.pack("!BBH", first | opcode, 0x80 | 126, length)
    else:
        head = struct.pack("!BBQ", first | opcode, 0x80 | 127, length)
    return head + bytes(4) + payload


async def ended(port: Port, data: bytes, within_s: float = 2.0) -> bytes:
    """Send, and return what came until the other side closed, which it must in time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port.port)
    found = b""
    try:
        with contextlib.suppress(ConnectionError):
            writer.write(data)
        async with asyncio.timeout(within_s):
            with contextlib.suppress(ConnectionError):
                while more := await reader.read(65536):
                    found += more
    finally:
        writer.transport.abort()
    return found


SENT = {
    "announced": frame(b"", announced=LARGE),
    "announced 5 kB": frame(b"", announced=5000),
    "announced 2^63": frame(b"", announced=1 << 63),
    "fragments": frame(bytes(100), first=0) + frame(bytes(100), opcode=0, first=0) * 60,
    "tiny fragments": frame(b"x", first=0) + frame(b"x", opcode=0, first=0) * 5000,
    "empty fragments": frame(b"", first=0) + frame(b"", opcode=0, first=0) * 5000,
    "fragment announced": frame(bytes(4000), first=0) + frame(b"", opcode=0, first=0, announced=4000),
    "pings": frame(bytes(100), opcode=9) * 1000,
    "pongs": frame(bytes(100), opcode=10) * 1000,
    "empty pings": frame(b"", opcode=9) * 10_000,
    "compressed": frame(b"x" * 100, first=0xC0),
    "reserved": frame(b"x" * 100, first=0xA0),
    "text": frame(b"hello", opcode=1),
    "no proof": frame(b"x" * 4000),
}


@pytest.mark.parametrize("name", SENT)
async def test_what_is_no_proof_is_refused_while_it_comes(port: Port, name: str) -> None:
    offer = b"Sec-WebSocket-Extensions: permessage-deflate\r\n"
    found = await ended(port, UPGRADE % offer + SENT[name])
    assert b"101 Switching" in found or found == b""
    assert b"permessage-deflate" not in found
    await port.emptied()
    await worker_gets_in(port)


@pytest.mark.parametrize(
    "data",
    [
        b"GET /test HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /test HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n" + bytes(100_000),
        b"GET /test HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n" + bytes(100_000),
        b"GET /test HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 10_000,
        UPGRADE % b"Content-Length: 100000000\r\n" + bytes(100_000),
        UPGRADE % b"Transfer-Encoding: chunked\r\n" + b"1\r\nx\r\n" * 10_000,
        b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n" * 2000,
        b"GET /test HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 40 + b"\r\n",
        b"GET /test HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 6000 + b"\r\n\r\n",
        b"GET /" + b"y" * 20_000,
        b"\x16\x03\x01\x02\x00" + bytes(1000) + b"\r\n\r\n",
        bytes(100_000),
    ],
    ids=["plain", "post", "body", "chunks", "body of upgrade", "chunks of upgrade", "pipeline", "many headers",
         "long header", "long path", "TLS", "zeros"],
)  # fmt: skip
async def test_other_http_and_none_at_all_is_refused_and_not_kept(port: Port, data: bytes) -> None:
    found = await ended(port, data, within_s=door.HEAD_BUDGET_S + 1.0)
    assert b"101" not in found[:20]
    await port.emptied()
    assert port.channels.empty()


@pytest.mark.parametrize("begun", [b"", b"GET /te", UPGRADE[:60]], ids=["silent", "line", "head"])
async def test_a_head_that_never_ends_is_cut_however_it_drips(monkeypatch: pytest.MonkeyPatch, begun: bytes) -> None:
    monkeypatch.setattr(door, "HEAD_BUDGET_S", 0.3)
    port = Port()
    runner = await port.open()
    reader, writer = await asyncio.open_connection("127.0.0.1", port.port)
    writer.write(begun)

    async def drip() -> None:
        with contextlib.suppress(ConnectionError):
            while begun and not reader.at_eof():
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.02)

    dripping = asyncio.create_task(drip())
    with contextlib.suppress(ConnectionError):
        assert await asyncio.wait_for(reader.read(), 2.0) == b""
    await dripping
    writer.transport.abort()
    await port.emptied()
    await runner.cleanup()


async def test_whole_messages_pass_once_the_proof_is_checked(port: Port) -> None:
    async with aiohttp.ClientSession() as session:
        dialer = await dial(session, port.url, SECRET, "test")
        acceptor = await port.channels.get()
        assert len(port.strangers) == 0
        sent = reservation(100_000)
        for _ in range(20):
            dialer.post(sent)
            acceptor.post(Abort(transfer_id=1, reason="x" * 4000))
        for _ in range(20):
            assert isinstance(await acceptor.receive(), Reserve)
            assert await dialer.receive() == Abort(transfer_id=1, reason="x" * 4000)
        await dialer.close()


async def worker_gets_in(port: Port) -> None:
    async with aiohttp.ClientSession() as session:
        dialer = await dial(session, port.url, SECRET, "test")
        dialer.post(Abort(transfer_id=7, reason="mine"))
        assert await (await port.channels.get()).receive() == Abort(transfer_id=7, reason="mine")
        dialer.abort("test over")
        await dialer.close()


@pytest.mark.parametrize("begun", [b"", UPGRADE[:50], UPGRADE % b""], ids=["silent", "half a head", "upgraded"])
async def test_a_worker_gets_in_while_strangers_hold_connections(port: Port, begun: bytes) -> None:
    held = []
    for _ in range(NUM_STRANGERS):
        held.append(await asyncio.open_connection("127.0.0.1", port.port))
        held[-1][1].write(begun)
    await asyncio.sleep(0.05)
    assert len(port.strangers) == MAX_STRANGERS
    for _ in range(3):
        await worker_gets_in(port)
    for _, writer in held:
        writer.close()
    await port.emptied()


async def test_a_worker_gets_in_while_others_open_connections_without_end(port: Port) -> None:
    async def flood() -> None:
        while len(held) < 20_000 and not over.is_set():
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port.port)
                writer.write(UPGRADE % b"")
                held.append(writer)

    held: list[asyncio.StreamWriter] = []
    over = asyncio.Event()
    flooding = [asyncio.create_task(flood()) for _ in range(4)]
    await asyncio.sleep(0.3)
    assert len(held) > MAX_STRANGERS
    failures = 0
    for _ in range(10):
        try:
            await worker_gets_in(port)
        except BatonError:
            failures += 1
    assert failures <= 5, "it has to try again too often"
    over.set()
    await asyncio.gather(*flooding)
    for writer in held:
        writer.transport.abort()
    await asyncio.sleep(0)


class One:
    """A stranger of the pure tests."""

    is_cut = False

    def cut(self) -> None:
        self.is_cut = True


def test_the_oldest_goes_and_never_the_newest() -> None:
    clock = [0.0]
    strangers, come = Strangers(4, lambda: clock[0]), [One() for _ in range(10)]
    for number, one in enumerate(come):
        clock[0] = 2.0 * number
        strangers.enter(one, "a")
    assert [one.is_cut for one in come] == [True] * 6 + [False] * 4
    assert len(strangers) == 4


def test_in_a_flood_any_of_them_goes_but_the_newest() -> None:
    strangers, survivors = Strangers(4, lambda: 0.0), set()
    for _ in range(50):
        come = [One() for _ in range(5)]
        for one in come:
            strangers.enter(one, "a")
        assert not come[-1].is_cut
        survivors.add(next((i for i, one in enumerate(come[:-1]) if one.is_cut), -1))
        for one in come:
            strangers.leave(one)
    assert len(survivors) > 1


def test_a_host_pushes_out_nobody_of_another() -> None:
    clock = [0.0]
    strangers, honest = Strangers(8, lambda: clock[0]), One()
    strangers.enter(honest, "honest")
    for number in range(100):
        clock[0] += number % 3
        strangers.enter(One(), "hostile")
    assert not honest.is_cut and len(strangers) == 8
    strangers.leave(honest)
    strangers.leave(honest)
    assert len(strangers) == 7


def test_strangers_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    clock = [0.0]
    strangers = Strangers(2, lambda: clock[0])
    for _ in range(100):
        strangers.enter(One(), "a")
    clock[0] = 60.0
    strangers.enter(One(), "a")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == MAX_SAID + 2 and said[-2].startswith(f"{98 - MAX_SAID} more lines")
    assert set(said[:-2]) == {said[-1]} == {"cut an unproved connection from a: there are more than 2 of them"}


async def test_a_connection_brings_one_request() -> None:
    async def once(_: web.Request) -> web.Response:
        return web.Response(text="here")

    port = Port()
    app = web.Application()
    app.router.add_get("/once", once)
    runner = GuardedRunner(app, 0.2, strangers=port.strangers)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port.port = int(runner.addresses[0][1])
    found = await ended(port, b"GET /once HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
    assert found.count(b"200 OK") == 1 and found.endswith(b"here")
    await runner.cleanup()


async def test_strangers_take_no_memory() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVER, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    port = Port()
    port.port = int(await process.stdout.readline())
    sent = UPGRADE % b"" + frame(bytes(1 << 20), announced=LARGE)
    parts = UPGRADE % b"" + frame(b"x" * 50, first=0) + frame(b"x" * 50, opcode=0, first=0) * 10_000
    body = b"POST /test HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n" + bytes(1 << 20)
    before = peak = rss(process.pid)
    try:
        for data in (sent, parts, body, UPGRADE[:-2]):
            opened = [asyncio.create_task(hold(port, data)) for _ in range(NUM_STRANGERS)]
            for _ in range(10):
                await asyncio.sleep(0.05)
                peak = max(peak, rss(process.pid))
            for task in opened:
                task.cancel()
            await asyncio.gather(*opened, return_exceptions=True)
        assert len(os.listdir(f"/proc/{process.pid}/fd")) < MAX_STRANGERS + 30
    finally:
        process.kill()
        await process.wait()
    assert peak - before < MAX_GROWTH_BYTES, f"{(peak - before) >> 20} MiB"


async def hold(port: Port, data: bytes) -> None:
    """Send, and hold the connection."""
    _, writer = await asyncio.open_connection("127.0.0.1", port.port)
    try:
        writer.write(data)
        await writer.drain()
        await asyncio.sleep(30)
    finally:
        writer.transport.abort()


def rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]) << 10


def test_a_stranger_may_send_a_handshake() -> None:
    assert STRANGER_BYTES > 2 * 4096
