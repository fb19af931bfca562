"""The UCX transport: an authenticated message channel, and beside it a pair of UCX workers that carry payload.

    decode                                                   prefill
       │ ── protocol.channel handshake (secret, version) ───────► │
       │ ── PeerHello(identity, fingerprint, staging) ──────────► │   PeerRefused if the fingerprints differ
       │ ◄─ PeerReady(staging, host) ──────────────────────────── │
       │ ── PeerPath(way, address of a UCX worker) ─────────────► │   each end makes a worker for this link alone
       │ ◄─ PeerPath(the same way, address of a UCX worker) ───── │   and an endpoint of the other's address
       │ ◄─ Credit(tags), payload under each tag, Tested ───────► │   self-test, both ways: small, and a whole slot
       ▼                                                          ▼
    Endpoint                                                 Endpoint

UCX listens for nobody: there is no connection without an address, and addresses are said only on the channel. Payload
of somebody else cannot be taken for this peer's: a worker has one peer, and a receive matches one tag of 63 random
bits, which only the channel has told. Over TCP UCX opens a port per worker all the same (`kvtransfer.ports`), on one
network device (`kvtransfer.devices`); the peer alone may connect to it, and nobody once the self-test has passed.

The message channel is the witness of a dead process, over shared memory the only one; pings on it find a stopped one.
When it is lost both UCX endpoints are forced shut, and each buffer is free when UCX has ended its request.

The dialer tries one way after the other (`kvtransfer.ways`), each with a handshake of its own, until one passes the
self-test. What fails does so here, at registration, and never at a request.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import aiohttp
from aiohttp import web

from kvtransfer.agreement import check_hello, check_host, check_path, check_ready, hello_of, path_of, ready_of
from kvtransfer.config import TransferConfig
from kvtransfer.devices import Device, address_towards, device_of, resolve
from kvtransfer.self_test import run_self_test
from kvtransfer.slots import SlotStore
from kvtransfer.transport import Agreement, Buffer, Completion, Endpoint, Identity, Listener, Transport
from kvtransfer.ucx_driver import UcxApi, UcxContext, UcxDriver
from kvtransfer.ways import Way, ways_to
from protocol.channel import Channel, accept, dial
from protocol.door import GuardedRunner, Hearsay
from protocol.errors import BatonError, ConfigError, FingerprintMismatch, PeerLost, ProtocolError, TransferError
from protocol.wire import PeerAddress, PeerHello, PeerMessage, PeerPath, PeerReady, PeerRefused

log = logging.getLogger(__name__)

PURPOSE: Final = "peer"
# Read by UCX when ucxx is imported. What the user set stays.
DEFAULTS: Final = {
    "UCX_RNDV_THRESH": "8192",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
    "UCX_LOG_FILE": "stderr",  # else standard output; as a path it would be opened anew, and a log file emptied
    "UCX_POSIX_ERROR_HANDLING": "y",  # without these two UCX drops shared memory, or copies it piecemeal
    "UCX_CMA_MEMORY_INVALIDATE": "y",
}


class UcxEndpoint(Endpoint):
    """A channel and a UCX worker with one endpoint, that live and die together."""

    def __init__(self, channel: Channel, driver: UcxDriver, peer: PeerHello | PeerReady, agreement: Agreement) -> None:
        self.peer_id = peer.worker_id
        self.peer_instance = peer.instance
        self.agreement = agreement
        self._channel = channel
        self._driver = driver
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        driver.watch(lambda: self.abort("payload connection closed by peer"))
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
        return self._failed() if self._lost.done() else self._driver.receive(buffer, tag)

    def send(self, buffer: Buffer, tag: int) -> Completion:
        """Post a tagged send."""
        return self._failed() if self._lost.done() else self._driver.send(buffer, tag)

    def abort(self, reason: str) -> None:
        """Cut both."""
        if self._lost.done():
            return
        self._lost.set_result(reason)
        self._channel.abort(reason)
        self._driver.end()

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
        ConfigError: ucxx is not installed, or the network device named may not be used.
    """

    name = "ucx"

    def __init__(self, config: TransferConfig, secret: bytes) -> None:
        self._config = config
        self._secret = secret
        self._api = load_ucxx()
        self._contexts: dict[tuple[str, Device], UcxContext] = {}
        self._session: aiohttp.ClientSession | None = None
        self._listeners: list[UcxListener] = []
        self._hearsay = Hearsay(log)
        self._dialled: set[UcxEndpoint] = set()
        self._detours: dict[str, tuple[int, Way]] = {}  # instance of a worker, and the way to it that passed
        self._refused: set[str] = set()  # transports that do not take GPU memory; said once
        if config.device is not None:
            self._device(config.host)

    async def listen(self, identity: Identity, on_endpoint: Callable[[Endpoint], None]) -> Listener:
        """Open the message port on `config.host`. UCX opens nothing yet.

        Raises:
            ConfigError: the host cannot be listened on, or not be dialled, or is not to be used for payload.
        """
        ip = await _own_address(self._config.host)
        device = self._device(ip)
        self._context(self._ways(ip, device, identity.slots)[0], device)
        app = web.Application()
        runner = GuardedRunner(app, shutdown_timeout=1.0)
        listener = UcxListener(
            runner, PeerAddress(worker_id=identity.worker_id, instance=identity.instance, transport="ucx")
        )

        async def on_peer(request: web.Request) -> web.StreamResponse:
            return await self._accept(request, identity, device, listener, on_endpoint)

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
        """Connect and self-test, by the best way that passes."""
        try:
            ip = (await resolve(address.host))[0]
            device = self._device(address_towards(ip))
        except OSError as error:
            raise PeerLost(f"no way to worker {address.worker_id} at {address.host}: {error}") from error
        ways = self._ways(ip, device, identity.slots)
        instance, detour = self._detours.get(address.worker_id, (0, ways[0]))
        if instance == address.instance and detour in ways:
            ways = ways[ways.index(detour) :]
        best = ways[0]
        while True:
            try:
                endpoint = await self._connect(address, ip, device, identity, ways)
                break
            except _PayloadFailed as error:
                if len(ways) == 1:
                    raise PeerLost(f"no payload connection with {address.worker_id}: {error}") from error
                log.warning("payload to %s fails in %s (%s); trying %s", address.worker_id, ways[0], error, ways[1])
                ways = ways[1:]
        if ways[0] is not best:
            self._detours[address.worker_id] = (address.instance, ways[0])
        self._dialled.add(endpoint)
        endpoint.lost.add_done_callback(partial(self._forget, endpoint))
        return endpoint

    async def close(self) -> None:
        """Cut everything and wait until UCX holds no buffer."""
        await asyncio.gather(*(endpoint.close() for endpoint in self._dialled))
        await asyncio.gather(*(listener.close() for listener in self._listeners))
        if self._session is not None:
            await self._session.close()
        for context in self._contexts.values():
            await context.close()

    def _forget(self, endpoint: UcxEndpoint, _: asyncio.Future[str]) -> None:
        self._dialled.discard(endpoint)

    @property
    def num_pending(self) -> int:
        """Buffers UCX may still touch."""
        return sum(context.num_pending for context in self._contexts.values())

    def _device(self, own_address: str) -> Device:
        named = self._config.device or os.environ.get("UCX_NET_DEVICES")
        return device_of(
            own_address, named, allow_public=self._config.allow_public, is_users_choice="UCX_TLS" in os.environ
        )

    def _ways(self, ip: str, device: Device, slots: SlotStore) -> list[Way]:
        """Return the ways to a peer there, best first, less those in GPU memory that this UCX does not take.

        Raises:
            ConfigError: GPU memory is insisted on and UCX does not take it.
        """
        ways = ways_to(ip, slots.staging, is_users_choice="UCX_TLS" in os.environ)
        if slots.staging == "auto" and ways[0].staging != "host" and not self._takes_device_memory(ways[0], device):
            return ways[1:]
        if slots.staging == "device":
            self._require_device_memory(ways[0], device)
        return ways

    def _takes_device_memory(self, way: Way, device: Device) -> bool:
        try:
            self._require_device_memory(way, device)
        except ConfigError as error:
            if way.name not in self._refused:
                log.warning("KV slots stay in host memory: %s", error)
            self._refused.add(way.name)
            return False
        return True

    def _require_device_memory(self, way: Way, device: Device) -> None:
        missing = {"cuda_copy", "cuda_ipc"} & set(way.options.get("TLS", "cuda_copy").split(","))
        missing -= self._context(way, device).device_transports
        if missing:
            raise ConfigError(f"UCX offers no {' and no '.join(sorted(missing))} here ({way})")

    def _context(self, way: Way, device: Device) -> UcxContext:
        if (way.name, device) not in self._contexts:
            options = {**way.options, "NET_DEVICES": device.name}
            self._contexts[way.name, device] = UcxContext(self._api, options)
        return self._contexts[way.name, device]

    async def _connect(
        self, address: PeerAddress, ip: str, device: Device, identity: Identity, ways: list[Way]
    ) -> UcxEndpoint:
        """Connect by the first of these ways; in host memory by the first for it, if the peer will have it so."""
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, family=socket.AF_INET))
        url = f"http://{ip}:{address.port}/peer"
        try:
            async with asyncio.timeout(self._config.connect_s):
                channel = await dial(self._session, url, self._secret, PURPOSE, ping_s=2 * self._config.progress_s)
                try:
                    ready = await _introduce(channel, hello_of(identity, ways[0].staging))
                    agreement = check_ready(address, identity, ways[0].staging, ready)
                    check_host(ready.payload_host)
                except BaseException as error:
                    channel.abort(f"handshake failed: {error!r}")
                    raise
        except TimeoutError as error:
            raise PeerLost(f"worker {address.worker_id} does not answer in time") from error
        way = _way_for(agreement, ways)
        try:
            async with asyncio.timeout(self._config.connect_s):
                return await self._open_payload(channel, ready, agreement, identity, way, device)
        except TimeoutError as error:
            raise _PayloadFailed("self-test not finished in time") from error
        except TransferError as error:
            raise _PayloadFailed(str(error)) from error

    async def _open_payload(
        self, channel: Channel, ready: PeerReady, agreement: Agreement, identity: Identity, way: Way, device: Device
    ) -> UcxEndpoint:
        slots, instance = identity.slots, identity.instance
        driver = self._context(way, device).open(ready.payload_host)
        try:
            there = ready.instance
            channel.post(path_of(self._secret, (instance, there), way.name, driver.address, device.address))
            path = await _receive_path(channel)
            check_path(self._secret, (there, instance), path)
            driver.connect(path.worker)
            endpoint = UcxEndpoint(channel, driver, ready, agreement)
            await run_self_test(endpoint, slots)
        except BaseException as error:
            channel.abort(f"payload connection failed: {error!r}")
            driver.end()
            raise
        driver.shut_ports()
        return endpoint

    async def _accept(
        self,
        request: web.Request,
        identity: Identity,
        device: Device,
        listener: UcxListener,
        on_endpoint: Callable[[Endpoint], None],
    ) -> web.StreamResponse:
        """Serve one peer, from the handshake to its end."""
        try:
            channel = await accept(request, self._secret, PURPOSE, ping_s=2 * self._config.progress_s)
        except BatonError as error:
            self._hearsay.warn("refused a peer from %s: %s", request.remote, error)
            return web.Response(status=403)
        try:
            async with asyncio.timeout(self._config.connect_s):
                endpoint = await self._welcome(channel, identity, device)
        except (TimeoutError, BatonError) as error:
            log.warning("no connection with the peer from %s: %s", request.remote, str(error) or "not finished in time")
            await channel.close()
            return await channel.served()
        listener.endpoints.add(endpoint)
        endpoint.lost.add_done_callback(lambda _: listener.endpoints.discard(endpoint))
        on_endpoint(endpoint)
        return await channel.served()

    async def _welcome(self, channel: Channel, identity: Identity, device: Device) -> UcxEndpoint:
        hello = await _receive_peer_message(channel)
        if not isinstance(hello, PeerHello):
            raise ProtocolError(f"expected PeerHello, got {type(hello).__name__}")
        ways = self._ways(device.address, device, identity.slots)
        try:
            agreement = check_hello(identity, ways[0].staging, hello)
        except FingerprintMismatch as refusal:
            channel.post(PeerRefused(reason=str(refusal)[:4096]))
            raise
        channel.post(ready_of(identity, ways[0].staging, agreement.checksum, device.address))
        path, instances = await _receive_path(channel), (identity.instance, hello.instance)
        check_path(self._secret, instances[::-1], path)
        driver = self._context(_way_named(path.way, agreement, ways), device).open(path.host)
        try:
            driver.connect(path.worker)
            channel.post(path_of(self._secret, instances, path.way, driver.address, device.address))
            endpoint = UcxEndpoint(channel, driver, hello, agreement)
            await run_self_test(endpoint, identity.slots)
        except BaseException as error:
            channel.abort(f"payload connection failed: {error!r}")
            driver.end()
            raise
        driver.shut_ports()
        return endpoint


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


def _way_for(agreement: Agreement, ways: list[Way]) -> Way:
    """Return the first way in the memory agreed on: host memory goes by a UCX that never heard of CUDA."""
    return next((way for way in ways if (way.staging == "host") == (agreement.kind == "host")), ways[0])


def _way_named(name: str, agreement: Agreement, ways: list[Way]) -> Way:
    """Return the way that the dialer tries; of one that is not known here, the last, which asks least of both ends."""
    fitting = [way for way in ways if (way.staging == "host") == (agreement.kind == "host")] or ways
    return next((way for way in fitting if way.name == name), fitting[-1])


async def _introduce(channel: Channel, hello: PeerHello) -> PeerReady:
    channel.post(hello)
    answer = await _receive_peer_message(channel)
    if isinstance(answer, PeerRefused):
        raise FingerprintMismatch(answer.reason)
    if not isinstance(answer, PeerReady):
        raise ProtocolError(f"expected PeerReady, got {type(answer).__name__}")
    return answer


async def _receive_peer_message(channel: Channel) -> PeerMessage:
    message = await channel.receive()
    if not isinstance(message, PeerMessage):
        reason = f"{type(message).__name__} is not a message between workers"
        channel.abort(reason)
        raise ProtocolError(reason)
    return message


async def _receive_path(channel: Channel) -> PeerPath:
    message = await _receive_peer_message(channel)
    if not isinstance(message, PeerPath):
        raise ProtocolError(f"expected PeerPath, got {type(message).__name__}")
    return message


async def _own_address(host: str) -> str:
    """Return the IPv4 address to listen on, and to be dialled at."""
    try:
        found = await resolve(host)
    except OSError as error:
        raise ConfigError(f"transfer-host: {host!r} has no IPv4 address: {error}") from error
    if len(found) != 1:
        raise ConfigError(f"transfer-host: {host!r} means several addresses ({', '.join(found)}): give one")
    return found[0]
