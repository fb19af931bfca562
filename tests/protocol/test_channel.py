"""The channel against a real aiohttp server: who gets in, who hears why not, and who is cut off."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field

import aiohttp
import pytest
import pytest_asyncio
import uvloop
from aiohttp import web

from protocol import channel as channel_module
from protocol.channel import MAX_QUEUED_BYTES, Channel, accept, dial
from protocol.errors import AuthenticationFailed, BatonError, PeerLost, ProtocolError, VersionMismatch
from protocol.request import SamplingParams
from protocol.wire import (
    MAX_MESSAGE_BYTES,
    WIRE_VERSION,
    Abort,
    Accept,
    Challenge,
    PeerAbort,
    Proof,
    Pulse,
    Reserve,
    decode,
    encode,
)

SECRET = b"0123456789abcdef0123456789abcdef"


@dataclass
class Server:
    """An accepting side, and what it saw."""

    url: str = ""
    channels: asyncio.Queue[Channel] = field(default_factory=asyncio.Queue)
    refusals: asyncio.Queue[BatonError] = field(default_factory=asyncio.Queue)
    session: aiohttp.ClientSession = field(default_factory=aiohttp.ClientSession)
    ping_s: float | None = None
    dialled: list[Channel] = field(default_factory=list)

    async def pair(self) -> tuple[Channel, Channel]:
        """Return both ends of a fresh channel: dialer, acceptor."""
        dialer = await dial(self.session, self.url, SECRET, "test", self.ping_s)
        self.dialled.append(dialer)
        return dialer, await asyncio.wait_for(self.channels.get(), 2)

    async def close(self) -> None:
        """Leave no connection behind."""
        for channel in self.dialled:
            channel.abort("test over")
            await channel.close()
        await self.session.close()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Accept one peer."""
        try:
            channel = await accept(request, SECRET, "test", self.ping_s)
        except BatonError as error:
            self.refusals.put_nowait(error)
            return web.Response(status=403)
        self.channels.put_nowait(channel)
        return await channel.served()


async def serve(server: Server, handler: Callable[..., object]) -> web.AppRunner:
    app = web.Application()
    app.router.add_get("/test", handler)  # type: ignore[arg-type]
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/test"
    return runner


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    runner = await serve(server, server.handle)
    yield server
    await server.close()
    await runner.cleanup()


async def impostor(server: Server, behave: Callable[[web.WebSocketResponse], object]) -> web.AppRunner:
    """Serve something that is not an honest acceptor."""

    async def handler(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await behave(socket)  # type: ignore[misc]
        return socket

    return await serve(server, handler)


async def refusal(server: Server) -> BatonError:
    return await asyncio.wait_for(server.refusals.get(), 2)


def message_of(num_bytes: int) -> PeerAbort:
    return PeerAbort(transfer_id=1, reason="x" * num_bytes)


async def test_messages_arrive_in_order_both_ways(server: Server) -> None:
    dialer, acceptor = await server.pair()
    for number in range(100):
        dialer.post(Abort(transfer_id=number, reason="there"))
        acceptor.post(Abort(transfer_id=number, reason="back"))
    assert [await acceptor.receive() for _ in range(100)] == [Abort(transfer_id=n, reason="there") for n in range(100)]
    assert [await dialer.receive() for _ in range(100)] == [Abort(transfer_id=n, reason="back") for n in range(100)]
    assert dialer.peer_host == acceptor.peer_host == "127.0.0.1"
    await dialer.close()
    with pytest.raises(PeerLost):
        await acceptor.receive()


async def test_close_delivers_what_was_posted(server: Server) -> None:
    dialer, acceptor = await server.pair()
    for _ in range(500):
        dialer.post(message_of(4000))
    closing = asyncio.create_task(dialer.close())
    for _ in range(500):
        assert await acceptor.receive() == message_of(4000)
    await closing
    assert await dialer.lost == "closed here"
    with pytest.raises(PeerLost, match="closed by peer"):
        await acceptor.receive()


async def test_wrong_secret_is_told_to_both_sides(server: Server) -> None:
    with pytest.raises(AuthenticationFailed, match="wrong cluster secret"):
        await dial(server.session, server.url, b"x" * 32, "test")
    assert isinstance(await refusal(server), AuthenticationFailed)


async def test_channel_of_another_purpose_is_refused(server: Server) -> None:
    with pytest.raises(AuthenticationFailed, match="not a 'test' channel"):
        await dial(server.session, server.url, SECRET, "other")
    assert isinstance(await refusal(server), AuthenticationFailed)


@pytest.mark.parametrize("side", ["dialer", "acceptor"])
async def test_another_wire_version_is_refused_and_both_hear_it(
    server: Server, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    async def dated_acceptor(socket: channel_module.WebSocket, secret: bytes, purpose: str) -> None:
        await socket.send_bytes(encode(Challenge(version=77, nonce=bytes(32))))
        await channel_module._next(socket)

    async def dated_dialer(socket: channel_module.WebSocket, secret: bytes, purpose: str) -> None:
        await channel_module._next(socket)
        await socket.send_bytes(encode(Proof(version=77, nonce=bytes(32), mac=bytes(32))))
        await channel_module._next(socket)

    if side == "acceptor":
        monkeypatch.setattr(channel_module, "_verify", dated_acceptor)
    else:
        monkeypatch.setattr(channel_module, "_prove", dated_dialer)
    with pytest.raises(VersionMismatch, match="77"):
        await dial(server.session, server.url, SECRET, "test")
    assert isinstance(await refusal(server), VersionMismatch)
    assert WIRE_VERSION != 77


async def test_a_mac_cannot_be_reflected(server: Server) -> None:
    """An acceptor without the secret that sends the dialer's own mac back gets nothing."""

    async def reflect(socket: web.WebSocketResponse) -> None:
        await socket.send_bytes(encode(Challenge(version=WIRE_VERSION, nonce=bytes(32))))
        proof = decode((await socket.receive()).data)
        assert isinstance(proof, Proof)
        await socket.send_bytes(encode(Accept(mac=proof.mac)))
        await socket.receive()

    runner = await impostor(server, reflect)
    with pytest.raises(AuthenticationFailed, match="does not hold our cluster secret"):
        await dial(server.session, server.url, SECRET, "test")
    await runner.cleanup()


async def test_an_old_proof_cannot_be_replayed(server: Server) -> None:
    proofs: list[bytes] = []

    async def record(socket: web.WebSocketResponse) -> None:
        await socket.send_bytes(encode(Challenge(version=WIRE_VERSION, nonce=bytes(32))))
        proofs.append((await socket.receive()).data)

    url = server.url
    runner = await impostor(server, record)
    with pytest.raises(PeerLost):
        await dial(server.session, server.url, SECRET, "test")
    await runner.cleanup()
    async with server.session.ws_connect(url) as socket:
        await socket.receive()
        await socket.send_bytes(proofs[0])
        closed = await socket.receive()
    assert (closed.type, closed.data) == (aiohttp.WSMsgType.CLOSE, 4001)
    assert isinstance(await refusal(server), AuthenticationFailed)


@pytest.mark.parametrize(
    "garbage",
    [b"", b"\xc1", b"\x00" * 5000, os.urandom(1000), encode(Pulse()), b"x" * (MAX_MESSAGE_BYTES + 10)],
    ids=["empty", "invalid", "long", "random", "other message", "oversized"],
)
async def test_garbage_before_authentication_is_refused_at_once(server: Server, garbage: bytes) -> None:
    async with server.session.ws_connect(server.url, max_msg_size=0) as socket:
        await socket.receive()
        with suppress(ConnectionError):
            await socket.send_bytes(garbage)
        closed = await asyncio.wait_for(socket.receive(), 2)
    assert closed.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR)
    assert isinstance(await refusal(server), ProtocolError)
    assert server.channels.empty()
    await server.pair()  # the next honest one gets in


async def test_a_silent_dialer_is_dropped(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "HANDSHAKE_BUDGET_S", 0.1)
    async with server.session.ws_connect(server.url) as socket:
        assert isinstance(await refusal(server), PeerLost)
        await socket.receive()
        closed = await asyncio.wait_for(socket.receive(), 2)
        assert closed.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR)


async def test_dialing_nobody_a_silent_one_or_a_web_server_fails_clearly(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ProtocolError, match="HTTP 404"):
        await dial(server.session, server.url + "/elsewhere", SECRET, "test")
    with pytest.raises(PeerLost, match="cannot reach"):
        await dial(server.session, "http://127.0.0.1:1/test", SECRET, "test")
    monkeypatch.setattr(channel_module, "HANDSHAKE_BUDGET_S", 0.1)
    runner = await impostor(server, lambda socket: asyncio.sleep(1))
    with pytest.raises(PeerLost, match="no answer in time"):
        await dial(server.session, server.url, SECRET, "test")
    await runner.cleanup()


async def test_going_away_in_the_handshake_is_a_lost_peer_not_a_refusal(server: Server) -> None:
    """A router that restarts at that moment must not make a worker give up for good."""
    runner = await impostor(server, lambda socket: socket.close())
    with pytest.raises(PeerLost):
        await dial(server.session, server.url, SECRET, "test")
    await runner.cleanup()


async def test_a_malformed_message_ends_the_channel(server: Server) -> None:
    dialer, acceptor = await server.pair()
    await dialer._socket.send_bytes(b"\x81\xa4type\xa4Nope")
    with pytest.raises(ProtocolError, match="malformed"):
        await acceptor.receive()
    assert acceptor.is_lost
    with pytest.raises(PeerLost):
        await asyncio.wait_for(dialer.receive(), 2)


async def test_text_is_not_a_message(server: Server) -> None:
    dialer, acceptor = await server.pair()
    await dialer._socket.send_str("hello")
    with pytest.raises(PeerLost, match="TEXT"):
        await acceptor.receive()


async def test_the_largest_message_passes_and_a_larger_one_does_not(server: Server) -> None:
    dialer, acceptor = await server.pair()
    empty = len(encode(reservation(0)))
    largest = reservation((MAX_MESSAGE_BYTES - empty - 8) // 5)  # two array headers grow by four bytes each
    dialer.post(largest)
    assert await acceptor.receive() == largest
    with pytest.raises(ProtocolError, match="exceeds"):
        dialer.post(reservation(MAX_MESSAGE_BYTES // 5 + 1))
    assert not dialer.is_lost
    await dialer._socket.send_bytes(b"x" * (MAX_MESSAGE_BYTES + 1))
    with pytest.raises(PeerLost, match="malformed frame"):
        await acceptor.receive()


def reservation(num_tokens: int) -> Reserve:
    """Return a message of about five bytes a token: a prompt and replayed tokens, both at most 2**20."""
    tokens = (1 << 30,) * num_tokens
    half = num_tokens // 2
    return Reserve(
        request_id=1,
        transfer_id=1,
        epoch=0,
        prefill_worker_id="p",
        prompt=tokens[:half],
        emitted=tokens[half:],
        sampling=SamplingParams(seed=1),
    )


@pytest.mark.parametrize("side", ["dialer", "acceptor"])
async def test_a_peer_that_does_not_read_is_cut_at_the_bound(server: Server, side: str) -> None:
    writer, silent = await server.pair()
    if side == "acceptor":
        writer, silent = silent, writer
    message = message_of(4096)
    num_posted, longest_s = 0, 0.0
    while not writer.is_lost and num_posted * 4096 < 4 * MAX_QUEUED_BYTES:
        started_s = time.perf_counter()
        writer.post(message)  # `silent` never calls receive
        longest_s = max(longest_s, time.perf_counter() - started_s)
        num_posted += 1
        if num_posted % 100 == 0:
            await asyncio.sleep(0)
    assert "does not read" in await writer.lost
    assert MAX_QUEUED_BYTES * 0.9 < num_posted * 4096 < MAX_QUEUED_BYTES * 1.6
    assert longest_s < 0.25
    assert writer._closer is not None
    done, _ = await asyncio.wait({writer._closer}, timeout=0.5)
    assert done, "the socket waits for a peer that never reads"
    with pytest.raises(PeerLost):
        while True:
            await asyncio.wait_for(silent.receive(), 2)


async def test_abort_ends_both_sides_at_once_and_wakes_the_reader(server: Server) -> None:
    dialer, acceptor = await server.pair()
    reading = asyncio.create_task(acceptor.receive())
    other = asyncio.create_task(dialer.receive())
    await asyncio.sleep(0.01)
    started_s = time.perf_counter()
    acceptor.abort("enough")
    acceptor.abort("again")
    assert await acceptor.lost == "enough"
    for task in (reading, other):
        with pytest.raises(PeerLost):
            await asyncio.wait_for(task, 2)
    assert time.perf_counter() - started_s < 0.5
    acceptor.post(message_of(1))
    dialer.post(message_of(1))


async def test_abort_reaches_a_peer_whose_buffers_are_full(server: Server) -> None:
    dialer, acceptor = await server.pair()
    for _ in range(2000):
        acceptor.post(message_of(4000))
    await asyncio.sleep(0.05)
    acceptor.abort("enough")
    num_received = 0
    with pytest.raises(PeerLost):
        while True:
            await asyncio.wait_for(dialer.receive(), 2)
            num_received += 1
    assert num_received < 2000  # what was queued is dropped, not flushed


async def test_a_cancelled_receive_loses_no_message(server: Server) -> None:
    dialer, acceptor = await server.pair()
    for number in range(50):
        reading = asyncio.create_task(acceptor.receive())
        await asyncio.sleep(0)
        if number % 2:
            dialer.post(Abort(transfer_id=number, reason=""))
            await asyncio.sleep(0.001)
        if not reading.done():
            reading.cancel()
        with suppress(asyncio.CancelledError):
            assert await reading == Abort(transfer_id=number, reason="")
            continue
        if number % 2:
            assert await acceptor.receive() == Abort(transfer_id=number, reason="")


CHILD = """
import asyncio, sys, aiohttp
from protocol.channel import dial
async def main():
    async with aiohttp.ClientSession() as session:
        channel = await dial(session, sys.argv[1], b"0123456789abcdef0123456789abcdef", "test")
        while True:
            await channel.receive()
asyncio.run(main())
"""


async def child_of(server: Server) -> tuple[asyncio.subprocess.Process, Channel]:
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", CHILD, server.url)
    return child, await asyncio.wait_for(server.channels.get(), 10)


async def test_the_kill_of_the_peer_is_noticed_at_once(server: Server) -> None:
    child, acceptor = await child_of(server)
    started_s = time.perf_counter()
    child.send_signal(signal.SIGKILL)
    with pytest.raises(PeerLost):
        await asyncio.wait_for(acceptor.receive(), 2)
    assert time.perf_counter() - started_s < 0.5
    await child.wait()


async def test_a_stopped_peer_is_noticed_by_pings(server: Server) -> None:
    server.ping_s = 0.2
    child, acceptor = await child_of(server)
    await asyncio.sleep(0.5)
    assert not acceptor.is_lost
    child.send_signal(signal.SIGSTOP)
    with pytest.raises(PeerLost):
        await asyncio.wait_for(acceptor.receive(), 3)
    child.kill()
    await child.wait()


def test_it_works_on_uvloop_too() -> None:
    async def talk() -> None:
        server = Server()
        runner = await serve(server, server.handle)
        dialer, acceptor = await server.pair()
        dialer.post(Pulse())
        assert await acceptor.receive() == Pulse()
        reading = asyncio.create_task(dialer.receive())
        acceptor.abort("enough")
        with pytest.raises(PeerLost):
            await asyncio.wait_for(reading, 2)
        with pytest.raises(AuthenticationFailed, match="wrong cluster secret"):
            await dial(server.session, server.url, b"x" * 32, "test")
        await server.close()
        await runner.cleanup()

    uvloop.run(talk())
