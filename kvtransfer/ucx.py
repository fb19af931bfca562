"""The UCX transport: an authenticated message channel, and beside it a UCX connection that carries payload.

    decode                                                   prefill
       │ ── protocol.channel handshake (secret, version) ───────► │
       │ ── PeerHello(identity, fingerprint) ───────────────────► │   PeerRefused if the fingerprints differ
       │ ◄─ PeerReady(identity, payload port, one-time token) ─── │
       │ ── UCX connection, the token on its stream ────────────► │   forced shut after 2 s without a token
       │ ◄─ Credit(tags), and a payload under each tag ─────────► │   self-test, both ways: small, and a whole slot
       ▼                                                          ▼
    Endpoint                                                 Endpoint

The message channel is the fast witness of a dead process; pings on it find a stopped one.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import secrets
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Final

import aiohttp
import numpy as np
from aiohttp import web

from kvtransfer.config import TransferConfig
from kvtransfer.transport import Buffer, Completion, Endpoint, Identity, Listener, Transport, check_hello, check_ready
from kvtransfer.ucx_driver import TOKEN_BYTES, RawEndpoint, UcxApi, UcxDriver
from protocol.channel import Channel, accept, dial
from protocol.errors import BatonError, ConfigError, FingerprintMismatch, PeerLost, ProtocolError, TransferError
from protocol.wire import Credit, PeerAddress, PeerHello, PeerMessage, PeerReady, PeerRefused

log = logging.getLogger(__name__)

PURPOSE: Final = "peer"
TCP_ONLY: Final = {"TLS": "tcp,self", "RNDV_SCHEME": "put_zcopy"}
SHARED_MEMORY: Final = {"TLS": "posix,cma,tcp,self", "RNDV_SCHEME": "auto"}
# Read by UCX when ucxx is imported. What the user set stays.
DEFAULTS: Final = {
    "UCX_RNDV_THRESH": "8192",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
    "UCX_LOG_FILE": "/dev/stderr",  # UCX would mix its warnings into standard output
    "UCX_POSIX_ERROR_HANDLING": "y",  # without these two UCX drops shared memory, or copies it piecemeal
    "UCX_CMA_MEMORY_INVALIDATE": "y",
}
SMALL_TEST_BYTES: Final = 64


class UcxEndpoint(Endpoint):
    """A channel and a UCX endpoint that live and die together."""

    def __init__(self, channel: Channel, driver: UcxDriver, raw: RawEndpoint, peer_id: str, peer_instance: int) -> None:
        self.peer_id = peer_id
        self.peer_instance = peer_instance
        self._channel = channel
        self._driver = driver
        self._raw = raw
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        driver.watch(raw, lambda: self.abort("payload connection closed by peer"))
        channel.lost.add_done_callback(lambda lost: self.abort(lost.result()))

    @property
    def lost(self) -> asyncio.Future[str]:
        """Future with the reason."""
        return self._lost

    def post(self, message: PeerMessage) -> None:
        """Queue on the channel."""
        self._channel.post(message)

    async def receive(self) -> PeerMessage:
        """Return the channel's next message if peers may say it."""
        return await _receive_peer_message(self._channel)

    def post_receive(self, buffer: Buffer, tag: int) -> Completion:
        """Post a tagged receive."""
        return self._failed() if self._lost.done() else self._driver.receive(self._raw, buffer, tag)

    def send(self, buffer: Buffer, tag: int) -> Completion:
        """Post a tagged send."""
        return self._failed() if self._lost.done() else self._driver.send(self._raw, buffer, tag)

    def abort(self, reason: str) -> None:
        """Cut both connections."""
        if self._lost.done():
            return
        self._lost.set_result(reason)
        self._channel.abort(reason)
        self._driver.close_endpoint(self._raw)

    async def close(self) -> None:
        """Flush the channel, then cut."""
        await self._channel.close()
        self.abort("closed here")

    def _failed(self) -> Completion:
        done = Completion()
        done.finish(PeerLost(self._lost.result()))
        return done


class UcxListener(Listener):
    """The aiohttp server that channels of peers arrive at."""

    def __init__(self, runner: web.AppRunner, address: PeerAddress) -> None:
        self.address = address
        self._runner = runner
        self.endpoints: set[UcxEndpoint] = set()

    async def close(self) -> None:
        """Stop listening and cut what came from here."""
        await asyncio.gather(*(endpoint.close() for endpoint in self.endpoints))
        await self._runner.cleanup()


class UcxTransport(Transport):
    """Transport between processes and hosts.

    Raises:
        ConfigError: ucxx is not installed, or UCX refuses its settings.
    """

    name = "ucx"

    def __init__(self, config: TransferConfig, secret: bytes) -> None:
        self._config = config
        self._secret = secret
        self._api = load_ucxx()
        self._drivers: dict[str, UcxDriver] = {}
        self._session: aiohttp.ClientSession | None = None
        self._listeners: list[UcxListener] = []
        self._dialled: set[UcxEndpoint] = set()
        self._needs_tcp: set[str] = set()  # workers whose shared memory failed the self-test

    async def listen(self, identity: Identity, on_endpoint: Callable[[Endpoint], None]) -> Listener:
        """Open the message port on `config.host` and the payload port.

        Raises:
            ConfigError: the host cannot be listened on, or not be dialled.
        """
        ip = await _resolve(self._config.host)
        self._driver(self._settings(self._config.host)[0]).listen()
        app = web.Application()
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        listener = UcxListener(
            runner, PeerAddress(worker_id=identity.worker_id, instance=identity.instance, transport="ucx")
        )

        async def on_peer(request: web.Request) -> web.StreamResponse:
            return await self._accept(request, identity, listener, on_endpoint)

        app.router.add_get("/peer", on_peer)
        await runner.setup()
        try:
            await web.TCPSite(runner, ip, 0).start()
        except OSError as error:
            await runner.cleanup()
            raise ConfigError(f"transfer host {self._config.host!r} cannot be listened on: {error}") from error
        listener.address = PeerAddress(
            worker_id=identity.worker_id,
            instance=identity.instance,
            transport="ucx",
            host=self._config.host,
            port=int(runner.addresses[0][1]),
        )
        self._listeners.append(listener)
        return listener

    async def dial(self, address: PeerAddress, identity: Identity) -> Endpoint:
        """Connect and self-test; where shared memory fails its test, once more over TCP."""
        settings = self._settings(address.host)
        if address.worker_id in self._needs_tcp:
            settings = settings[-1:]
        for number, options in enumerate(settings):
            try:
                endpoint = await self._connect(address, identity, options)
            except _PayloadFailed as error:
                if number + 1 == len(settings):
                    raise PeerLost(f"no payload connection with {address.worker_id}: {error}") from error
                log.warning("payload to %s fails over %s (%s); trying TCP", address.worker_id, options["TLS"], error)
                continue
            if number > 0:
                self._needs_tcp.add(address.worker_id)
            self._dialled.add(endpoint)
            endpoint.lost.add_done_callback(partial(self._forget, endpoint))
            return endpoint
        raise AssertionError("settings are never empty")

    async def close(self) -> None:
        """Cut everything and wait until UCX holds no buffer."""
        await asyncio.gather(*(endpoint.close() for endpoint in self._dialled))
        await asyncio.gather(*(listener.close() for listener in self._listeners))
        if self._session is not None:
            await self._session.close()
        for driver in self._drivers.values():
            await driver.close()

    def _forget(self, endpoint: UcxEndpoint, _: asyncio.Future[str]) -> None:
        self._dialled.discard(endpoint)

    @property
    def num_pending(self) -> int:
        """Buffers UCX may still touch."""
        return sum(driver.num_pending for driver in self._drivers.values())

    def _settings(self, host: str) -> list[dict[str, str]]:
        if "UCX_TLS" in os.environ:
            return [{}]
        return [SHARED_MEMORY, TCP_ONLY] if _is_loopback(host) else [TCP_ONLY]

    def _driver(self, options: dict[str, str]) -> UcxDriver:
        name = options.get("TLS", "user")
        if name not in self._drivers:
            self._drivers[name] = UcxDriver(self._api, options)
        return self._drivers[name]

    async def _connect(self, address: PeerAddress, identity: Identity, options: dict[str, str]) -> UcxEndpoint:
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, family=socket.AF_INET))
        url = f"http://{address.host}:{address.port}/peer"
        try:
            async with asyncio.timeout(self._config.connect_s):
                channel = await dial(self._session, url, self._secret, PURPOSE, ping_s=2 * self._config.progress_s)
                try:
                    ready = await _introduce(channel, address, identity)
                except BaseException as error:
                    channel.abort(f"handshake failed: {error!r}")
                    raise
        except TimeoutError as error:
            raise PeerLost(f"worker {address.worker_id} does not answer in time") from error
        try:
            async with asyncio.timeout(self._config.connect_s):
                return await self._open_payload(channel, ready, options)
        except TimeoutError as error:
            raise _PayloadFailed("self-test not finished in time") from error
        except TransferError as error:
            raise _PayloadFailed(str(error)) from error

    async def _open_payload(self, channel: Channel, ready: PeerReady, options: dict[str, str]) -> UcxEndpoint:
        try:
            driver = self._driver(options)
            raw = await driver.connect(channel.peer_host, ready.payload_port, ready.payload_token)
            endpoint = UcxEndpoint(channel, driver, raw, ready.worker_id, ready.instance)
            await self._self_test(endpoint, endpoint.receive())
        except BaseException as error:
            channel.abort(f"payload connection failed: {error!r}")  # takes the endpoint with it
            raise
        return endpoint

    async def _accept(
        self,
        request: web.Request,
        identity: Identity,
        listener: UcxListener,
        on_endpoint: Callable[[Endpoint], None],
    ) -> web.StreamResponse:
        """Serve one peer, from the handshake to its end."""
        try:
            channel = await accept(request, self._secret, PURPOSE, ping_s=2 * self._config.progress_s)
        except BatonError as error:
            log.warning("refused a peer from %s: %s", request.remote, error)
            return web.Response(status=403)
        try:
            async with asyncio.timeout(self._config.connect_s):
                endpoint = await self._welcome(channel, identity)
        except (TimeoutError, BatonError) as error:
            log.warning("no connection with the peer from %s: %s", request.remote, str(error) or "not finished in time")
            await channel.close()
            return await channel.served()
        listener.endpoints.add(endpoint)
        endpoint.lost.add_done_callback(lambda _: listener.endpoints.discard(endpoint))
        on_endpoint(endpoint)
        return await channel.served()

    async def _welcome(self, channel: Channel, identity: Identity) -> UcxEndpoint:
        hello = await _receive_peer_message(channel)
        if not isinstance(hello, PeerHello):
            raise ProtocolError(f"expected PeerHello, got {type(hello).__name__}")
        if (refusal := check_hello(identity, hello)) is not None:
            channel.post(PeerRefused(reason=refusal[:4096]))
            identity.fingerprint.require_equal(hello.fingerprint, f"worker {hello.worker_id}")
        driver = self._driver(self._settings(self._config.host)[0])
        token = secrets.token_bytes(TOKEN_BYTES)
        expected = driver.expect(token)
        ready = PeerReady(
            worker_id=identity.worker_id,
            instance=identity.instance,
            payload_port=driver.listen(),
            payload_token=token,
        )
        channel.post(ready)
        # Read on meanwhile, or a dialer that left would be noticed only when the budget is spent.
        credit = asyncio.create_task(_receive_peer_message(channel))
        try:
            await asyncio.wait({expected, credit}, return_when=asyncio.FIRST_COMPLETED)
            if credit.done():
                credit.result()
            raw = await asyncio.shield(expected)
            endpoint = UcxEndpoint(channel, driver, raw, hello.worker_id, hello.instance)
            await self._self_test(endpoint, credit)
        except BaseException as error:
            credit.cancel()
            if not expected.cancel() and not expected.cancelled():
                driver.close_endpoint(expected.result())
            channel.abort(f"payload connection failed: {error!r}")
            raise
        return endpoint

    async def _self_test(self, endpoint: UcxEndpoint, credit: Awaitable[PeerMessage]) -> None:
        """Move a small payload and a whole slot both ways; the first use of a connection is slow, so not later."""
        sizes = (SMALL_TEST_BYTES, self._config.slot_bytes)
        tags = tuple(secrets.randbits(63) for _ in sizes)
        received = [np.zeros(size, np.uint8) for size in sizes]
        arrivals = [endpoint.post_receive(b, t) for b, t in zip(received, tags, strict=True)]
        endpoint.post(Credit(tags=tags, slot_bytes=self._config.slot_bytes))
        theirs = await credit
        if not isinstance(theirs, Credit) or len(theirs.tags) != len(sizes):
            raise ProtocolError(f"expected the self-test's Credit, got {type(theirs).__name__}")
        peer_sizes = (SMALL_TEST_BYTES, theirs.slot_bytes)
        sends = [
            endpoint.send(_test_pattern(min(n, self._config.slot_bytes), t), t)
            for n, t in zip(peer_sizes, theirs.tags, strict=True)
        ]
        await asyncio.wait([*arrivals, *sends])
        for done in (*arrivals, *sends):
            done.result()
        for buffer, tag in zip(received, tags, strict=True):
            filled = min(buffer.nbytes, max(theirs.slot_bytes, SMALL_TEST_BYTES))
            if not np.array_equal(buffer[:filled], _test_pattern(filled, tag)):
                raise TransferError("self-test payload arrived damaged")


class _PayloadFailed(Exception):
    """The channel works and the payload connection does not: another setting may."""


def load_ucxx() -> UcxApi:
    """Set UCX's defaults and import ucxx.

    Raises:
        ConfigError: it is not installed, or its libraries do not load.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if not Path("/proc/driver/nvidia/version").exists():
        os.environ.setdefault("UCX_RNDV_FRAG_MEM_TYPE", "host")  # ucxx sets "cuda", which needs a GPU
    try:
        from ucxx import exceptions, types
        from ucxx._lib import libucxx
        from ucxx._lib.arr import Array
    except (ImportError, OSError) as error:
        raise ConfigError(f"transport ucx needs the ucxx package (ucxx-cu13), which does not load: {error}") from error
    return UcxApi(
        libucxx, Array, types.Tag, types.TagMaskFull, exceptions.UCXError, exceptions.UCXMessageTruncatedError
    )


async def _introduce(channel: Channel, address: PeerAddress, identity: Identity) -> PeerReady:
    hello = PeerHello(worker_id=identity.worker_id, instance=identity.instance, fingerprint=identity.fingerprint)
    channel.post(hello)
    answer = await _receive_peer_message(channel)
    if isinstance(answer, PeerRefused):
        raise FingerprintMismatch(answer.reason)
    if not isinstance(answer, PeerReady):
        raise ProtocolError(f"expected PeerReady, got {type(answer).__name__}")
    check_ready(address, answer)
    return answer


async def _receive_peer_message(channel: Channel) -> PeerMessage:
    message = await channel.receive()
    if not isinstance(message, PeerMessage):
        reason = f"{type(message).__name__} is not a message between workers"
        channel.abort(reason)
        raise ProtocolError(reason)
    return message


def _test_pattern(num_bytes: int, tag: int) -> Buffer:
    return np.resize(np.frombuffer(tag.to_bytes(8, "little") + b"baton", np.uint8), num_bytes)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _resolve(host: str) -> str:
    """Return the IPv4 address to listen on: ucxx's own listener knows no other kind."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, family=socket.AF_INET)
    except OSError as error:
        raise ConfigError(f"transfer host {host!r} has no IPv4 address: {error}") from error
    ip = str(found[0][4][0])
    if ipaddress.ip_address(ip).is_unspecified:
        raise ConfigError(f"transfer host must be an address that decode workers can dial, not {host!r}")
    return ip
