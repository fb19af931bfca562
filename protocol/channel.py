"""An authenticated, ordered stream of wire messages over one WebSocket.

    dialer                                   acceptor
       │ ───────── WebSocket upgrade ───────────► │
       │ ◄──── Challenge(version, nonce_a) ────── │
       │ ── Proof(version, nonce_d, mac_dial) ──► │   checked before anything else is read
       │ ◄───────── Accept(mac_accept) ────────── │   checked before anything is sent

Each mac is HMAC-SHA256 under the cluster secret over a label, the purpose of the channel and both nonces, so a mac can
neither be reflected nor used for another purpose. The channel authenticates; it does not encrypt: put it on a private
network.

Whoever refuses says why in the closing frame: the other side raises the same error with the same words.

Until the proof is checked the acceptor takes frames of MAX_HANDSHAKE_BYTES: a larger one is refused at its head, before
anything of it is kept, and so are fragments that add up to more. Nothing is ever compressed, and what says that it is
ends the conversation. How many may try, and for how long, is for the port to say (`protocol/door.py`).

Sending never waits (`post`): one writer task drains a bounded queue, and a peer that does not read is cut off when the
bound is reached, so that it can stall nobody else.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import socket
from collections.abc import Coroutine
from contextlib import suppress
from typing import Final, Protocol

import aiohttp
from aiohttp import web
from aiohttp.http import WebSocketReader

from protocol.door import trust
from protocol.errors import AuthenticationFailed, PeerLost, ProtocolError, VersionMismatch
from protocol.wire import (
    MAX_MESSAGE_BYTES,
    WIRE_VERSION,
    Accept,
    AnyMessage,
    Challenge,
    Message,
    Proof,
    decode,
    encode,
)

HANDSHAKE_BUDGET_S: Final = 5.0
CLOSE_BUDGET_S: Final = 1.0
MAX_QUEUED_BYTES: Final = 64 << 20
MAX_HANDSHAKE_BYTES: Final = 4096
# Closing frames of a refusal. Their text is limited to 123 bytes by the WebSocket standard.
REFUSALS: Final[dict[int, type[ProtocolError]]] = {
    4000: ProtocolError,
    4001: AuthenticationFailed,
    4002: VersionMismatch,
}
MAX_REASON_BYTES: Final = 120

WebSocket = aiohttp.ClientWebSocketResponse | web.WebSocketResponse
_OVER: Final = (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSING, aiohttp.WSMsgType.CLOSED)


class Conversation(Protocol):
    """What both kinds of channel do: this file's, and the one inside a process (`protocol/local_channel.py`)."""

    @property
    def is_lost(self) -> bool:
        """Whether the conversation is over."""

    def post(self, message: Message) -> None:
        """Queue a message; dropped if the conversation is over. Never blocks."""

    async def receive(self) -> AnyMessage:
        """Return the next message; cancel-safe. Raises PeerLost, ProtocolError."""

    async def close(self) -> None:
        """Send what is queued, then end the conversation."""

    def abort(self, reason: str) -> None:
        """End the conversation at once; idempotent."""


class Channel:
    """One end of an authenticated conversation. Made by `dial` and `accept`; used on one event loop.

    `post` keeps order and never blocks. `receive` is for one reader. `abort` is synchronous and safe in `finally`;
    `close` flushes first.
    """

    def __init__(self, web_socket: WebSocket, peer_host: str) -> None:
        self._socket = web_socket
        self.peer_host = peer_host
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._queued_bytes = 0
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._writer = asyncio.create_task(self._write())
        self._closer: asyncio.Task[None] | None = None
        self._is_closing = False

    @property
    def is_lost(self) -> bool:
        """Whether the conversation is over."""
        return self._lost.done()

    @property
    def lost(self) -> asyncio.Future[str]:
        """Future that resolves to the reason when the conversation is over; never cancel it."""
        return self._lost

    def post(self, message: Message) -> None:
        """Queue a message; dropped if the conversation is over. Never blocks, never raises for the network.

        Raises:
            ProtocolError: the message is too large (our own bug).
        """
        if self.is_lost:
            return
        data = encode(message)
        self._queued_bytes += len(data)
        if self._queued_bytes > MAX_QUEUED_BYTES:
            self.abort(f"peer does not read: {self._queued_bytes} bytes queued")
            return
        self._queue.put_nowait(data)

    async def receive(self) -> AnyMessage:
        """Return the next message. Cancel-safe.

        Raises:
            PeerLost: the conversation is over.
            ProtocolError: malformed message; the channel is aborted.
        """
        try:
            frame = await self._socket.receive()
        except (ConnectionError, RuntimeError) as error:
            self.abort(str(error))
            raise PeerLost(self._lost.result()) from error
        if frame.type is not aiohttp.WSMsgType.BINARY:
            self.abort("closed here" if self._is_closing else _end_of(frame))
            raise PeerLost(self._lost.result())
        try:
            return decode(frame.data)
        except ProtocolError as error:
            self.abort(str(error))
            raise

    async def served(self) -> web.StreamResponse:
        """Wait until the conversation is over; return what the aiohttp handler that called `accept` must return.

        Cancelled by the server's shutdown, it ends the conversation.
        """
        assert isinstance(self._socket, web.WebSocketResponse), "only the accepting side serves"
        try:
            await asyncio.wait({self._lost})
        finally:
            self.abort("server shut down")
        return self._socket

    async def close(self) -> None:
        """Send what is queued, then close; bounded by CLOSE_BUDGET_S."""
        self._is_closing = True
        if not self.is_lost:
            self._queue.put_nowait(None)
            await asyncio.wait({self._writer}, timeout=CLOSE_BUDGET_S)
        if not self.is_lost:
            with suppress(TimeoutError):
                await asyncio.wait_for(_finish(self._socket), CLOSE_BUDGET_S)
        self.abort("closed here")
        if self._closer is not None:
            await asyncio.wait({self._closer}, timeout=CLOSE_BUDGET_S)

    def abort(self, reason: str) -> None:
        """End the conversation at once, dropping what is queued; idempotent."""
        if self._lost.done():
            return
        self._lost.set_result(reason)
        self._writer.cancel()
        _cut(self._socket)
        self._closer = asyncio.create_task(_finish(self._socket))

    async def _write(self) -> None:
        while (data := await self._queue.get()) is not None:
            try:
                await self._socket.send_bytes(data)
            except (ConnectionError, RuntimeError) as error:
                self.abort(f"send failed: {error}")
                return
            self._queued_bytes -= len(data)


async def dial(
    session: aiohttp.ClientSession, url: str, secret: bytes, purpose: str, ping_s: float | None = None
) -> Channel:
    """Connect to `url` and prove the secret both ways. Cancel-safe.

    Args:
        session: makes the connection; it stays open.
        url: `http://host:port/path` of the other side.
        secret: the cluster secret.
        purpose: kind of channel, equal on both sides.
        ping_s: if given, a peer that is silent for this long is pinged and dropped unless it answers in half of it.

    Raises:
        PeerLost: nobody answers, the other side goes away, or the handshake exceeds HANDSHAKE_BUDGET_S.
        AuthenticationFailed: the other side does not hold the secret, or says we do not.
        VersionMismatch: the other side speaks another wire version.
        ProtocolError: what answers does not speak this protocol.
    """
    closing = aiohttp.ClientWSTimeout(ws_close=CLOSE_BUDGET_S)
    try:
        async with asyncio.timeout(HANDSHAKE_BUDGET_S):
            web_socket = await session.ws_connect(
                url, max_msg_size=MAX_MESSAGE_BYTES + 1, compress=0, heartbeat=ping_s, timeout=closing
            )
            await _shaken(web_socket, _prove(web_socket, secret, purpose))
    except aiohttp.WSServerHandshakeError as error:
        raise ProtocolError(f"{url} is not a Baton endpoint: HTTP {error.status}") from error
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        raise PeerLost(f"cannot reach {url}: {str(error) or 'no answer in time'}") from error
    peername = web_socket.get_extra_info("peername")
    return Channel(web_socket, str(peername[0]) if peername else "")


async def accept(request: web.Request, secret: bytes, purpose: str, ping_s: float | None = None) -> Channel:
    """Upgrade an HTTP request and let the dialer prove the secret first. The handler returns `await served()`.

    Args:
        request: the upgrade request.
        secret: as for `dial`.
        purpose: as for `dial`.
        ping_s: as for `dial`.

    Raises:
        AuthenticationFailed, VersionMismatch, ProtocolError, PeerLost: the socket is closed; say it in the log.
    """
    if request.body_exists:
        raise ProtocolError("a request for a channel has no body")
    web_socket = _Threshold(ping_s)
    try:
        async with asyncio.timeout(HANDSHAKE_BUDGET_S):
            await web_socket.prepare(request)
            await _shaken(web_socket, _verify(web_socket, secret, purpose))
    except web.HTTPException as error:
        raise ProtocolError("the request is not for a channel") from error
    except (TimeoutError, OSError) as error:
        raise PeerLost(f"handshake not finished: {str(error) or 'no answer in time'}") from error
    return Channel(web_socket, request.remote or "")


class _Threshold(web.WebSocketResponse):
    """The acceptor's end: its frames have the size of a handshake's until the proof is checked.

    aiohttp has no way to let the limit of a reader grow, so that it gets another reader. That is safe in between: a
    dialer that has sent its proof says nothing before it is accepted, but for a ping, which is whole in one read.
    """

    def __init__(self, ping_s: float | None) -> None:
        super().__init__(max_msg_size=MAX_HANDSHAKE_BYTES + 1, compress=False, heartbeat=ping_s, timeout=CLOSE_BUDGET_S)

    def widen(self) -> None:
        """Take whole messages from now on."""
        request = self._req
        assert request is not None and self._reader is not None, "the handshake went over it"
        connection = request.protocol
        if connection._payload_parser is not self._parser:
            return  # the connection is lost already
        self._parser = WebSocketReader(self._reader, MAX_MESSAGE_BYTES + 1, compress=False, decode_text=True)
        connection._payload_parser = self._parser
        trust(request)


async def _shaken(web_socket: WebSocket, handshake: Coroutine[None, None, None]) -> None:
    """Run a handshake; on failure tell the other side why, and leave no socket behind."""
    try:
        await handshake
    except ProtocolError as error:
        code = next((code for code, kind in REFUSALS.items() if type(error) is kind), 4000)
        with suppress(ConnectionError, RuntimeError):
            await web_socket.close(code=code, message=str(error).encode()[:MAX_REASON_BYTES])
        raise
    except BaseException:
        _cut(web_socket)
        await _finish(web_socket)
        raise


async def _prove(web_socket: WebSocket, secret: bytes, purpose: str) -> None:
    challenge = await _next(web_socket)
    if not isinstance(challenge, Challenge):
        raise ProtocolError(f"expected Challenge, got {type(challenge).__name__}")
    if challenge.version != WIRE_VERSION:
        raise VersionMismatch(f"one side speaks wire version {challenge.version}, the other {WIRE_VERSION}")
    nonce = secrets.token_bytes(32)
    mac = _mac(secret, "dial", purpose, challenge.nonce, nonce)
    await web_socket.send_bytes(encode(Proof(version=WIRE_VERSION, nonce=nonce, mac=mac)))
    accepted = await _next(web_socket)
    if not isinstance(accepted, Accept):
        raise ProtocolError(f"expected Accept, got {type(accepted).__name__}")
    if not hmac.compare_digest(accepted.mac, _mac(secret, "accept", purpose, challenge.nonce, nonce)):
        raise AuthenticationFailed("the other side does not hold our cluster secret")


async def _verify(web_socket: _Threshold, secret: bytes, purpose: str) -> None:
    nonce = secrets.token_bytes(32)
    await web_socket.send_bytes(encode(Challenge(version=WIRE_VERSION, nonce=nonce)))
    proof = await _next(web_socket)
    if not isinstance(proof, Proof):
        raise ProtocolError(f"expected Proof, got {type(proof).__name__}")
    if proof.version != WIRE_VERSION:
        raise VersionMismatch(f"one side speaks wire version {proof.version}, the other {WIRE_VERSION}")
    if not hmac.compare_digest(proof.mac, _mac(secret, "dial", purpose, nonce, proof.nonce)):
        raise AuthenticationFailed(f"wrong cluster secret, or not a {purpose!r} channel")
    web_socket.widen()
    await web_socket.send_bytes(encode(Accept(mac=_mac(secret, "accept", purpose, nonce, proof.nonce))))


async def _next(web_socket: WebSocket) -> AnyMessage:
    frame = await web_socket.receive()
    if frame.type is aiohttp.WSMsgType.BINARY:
        if len(frame.data) > MAX_HANDSHAKE_BYTES:
            raise ProtocolError(f"{len(frame.data)} bytes before authentication")
        return decode(frame.data)
    if frame.type is aiohttp.WSMsgType.CLOSE and frame.data in REFUSALS:
        raise REFUSALS[frame.data](f"refused by the other side: {frame.extra}")
    if frame.type in _OVER:
        raise ConnectionResetError("closed during the handshake")
    raise ProtocolError(f"not a Baton handshake: {_end_of(frame)}")


def _end_of(frame: aiohttp.WSMessage) -> str:
    """Say why a frame that is no message ends the conversation."""
    if frame.type is aiohttp.WSMsgType.ERROR:
        return f"malformed frame: {frame.data}"
    if frame.type is aiohttp.WSMsgType.CLOSE and frame.extra:
        return f"closed by peer: {frame.extra}"
    return "closed by peer" if frame.type in _OVER else f"peer sent {frame.type.name} instead of bytes"


def _cut(web_socket: WebSocket) -> None:
    """Shut the TCP connection under a WebSocket: reads end, writes fail, what is buffered is dropped.

    aiohttp has no abort, and its close waits for a peer that may never read. A socket object over the same descriptor
    works with every event loop, and needs no further one where none are left; closing it stays the loop's.
    """
    of_loop = web_socket.get_extra_info("socket")
    if of_loop is None or of_loop.fileno() < 0:
        return
    with suppress(OSError):
        ours = socket.socket(fileno=of_loop.fileno())
        try:
            ours.shutdown(socket.SHUT_RDWR)
        finally:
            ours.detach()


async def _finish(web_socket: WebSocket) -> None:
    """Close a WebSocket that may be broken already, so that aiohttp lets go of its connection."""
    with suppress(ConnectionError, RuntimeError):
        await web_socket.close()


def _mac(secret: bytes, label: str, purpose: str, nonce_a: bytes, nonce_d: bytes) -> bytes:
    parts = [label.encode(), purpose.encode(), nonce_a, nonce_d]
    message = b"".join(len(p).to_bytes(4, "little") + p for p in parts)
    return hmac.new(secret, message, hashlib.sha256).digest()
