"""What only the UCX transport has: its settings, its secret, its workers, and its way round shared memory."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import pytest_asyncio
from msgspec.structs import replace

from kvtransfer import self_test, ucx, ucx_driver
from kvtransfer.agreement import path_of
from kvtransfer.config import TransferConfig
from kvtransfer.self_test import run_self_test
from kvtransfer.slots import SlotStore
from kvtransfer.transport import Endpoint, Identity, Listener
from kvtransfer.ucx import DEFAULTS, UcxEndpoint, UcxTransport
from kvtransfer.ucx_driver import UcxContext, UcxDriver
from kvtransfer.ways import CUDA_IPC, TCP_ONLY
from protocol.channel import Channel, dial
from protocol.errors import AuthenticationFailed, ConfigError, PeerLost, ProtocolError, TransferError
from protocol.wire import Credit, Grant, PeerHello, PeerReady, Pulse
from tests.contract.workers import SECRET, until
from tests.kvtransfer.memory_region import DeviceRegion, fingerprint

pytestmark = pytest.mark.ucx
ROOT = Path(__file__).resolve().parents[2]
CONFIG = TransferConfig(slot_bytes=65536, num_slots=4, connect_s=5.0)
US = Identity("d0", 2, fingerprint())


class Hall:
    """A listening transport, a dialing one, and what arrived."""

    def __init__(self) -> None:
        self.listening = UcxTransport(CONFIG, SECRET)
        self.dialing = UcxTransport(CONFIG, SECRET)
        self.accepted: asyncio.Queue[Endpoint] = asyncio.Queue()
        self.listener: Listener

    @property
    def url(self) -> str:
        """Where channels arrive."""
        return f"http://127.0.0.1:{self.listener.address.port}/peer"

    @property
    def context(self) -> UcxContext:
        """The listening side's first UCX context, the one for shared memory."""
        return next(iter(self.listening._contexts.values()))

    async def ready(self, session: aiohttp.ClientSession) -> Channel:
        """Go through the channel's handshake by hand, up to PeerReady."""
        channel = await dial(session, self.url, SECRET, "peer")
        channel.post(PeerHello(worker_id="d0", instance=2, fingerprint=fingerprint()))
        ready = await channel.receive()
        assert isinstance(ready, PeerReady) and ready.payload_host == "127.0.0.1"
        return channel


@pytest_asyncio.fixture
async def hall() -> AsyncIterator[Hall]:
    hall = Hall()
    hall.listener = await hall.listening.listen(Identity("p0", 1, fingerprint()), hall.accepted.put_nowait)
    yield hall
    for endpoint in [*hall.dialing._dialled]:
        endpoint.abort("test over")  # nobody reads here, so a polite close would wait for its budget
    await asyncio.sleep(0.01)
    await hall.dialing.close()
    await hall.listening.close()
    assert hall.listening.num_pending == hall.dialing.num_pending == 0


async def works(hall: Hall) -> UcxEndpoint:
    """Assert that an honest peer gets in and payload flows; return its end."""
    dialer = await hall.dialing.dial(hall.listener.address, US)
    acceptor = await asyncio.wait_for(hall.accepted.get(), 2)
    sent, received = np.arange(5000, dtype=np.uint8), np.zeros(5000, np.uint8)
    receiving = dialer.post_receive(received, 3)
    await asyncio.wait({acceptor.send(sent, 3), receiving}, timeout=5)
    receiving.result()
    assert (sent == received).all()
    assert isinstance(dialer, UcxEndpoint)
    return dialer


async def test_wrong_secret_is_refused(hall: Hall, caplog: pytest.LogCaptureFixture) -> None:
    intruder = UcxTransport(CONFIG, b"x" * 32)
    with pytest.raises(AuthenticationFailed, match="wrong cluster secret"):
        await intruder.dial(hall.listener.address, US)
    await intruder.close()
    await until(lambda: "wrong cluster secret" in caplog.text)
    assert hall.accepted.empty()
    await works(hall)


async def test_an_idle_connection_costs_nothing(hall: Hall) -> None:
    dialer = await works(hall)
    waiting = dialer.post_receive(np.zeros(10, np.uint8), 99)
    used_s = time.process_time()
    await asyncio.sleep(0.5)
    assert time.process_time() - used_s < 0.05
    assert not waiting.done()


async def test_what_is_posted_on_a_dead_endpoint_ends(hall: Hall) -> None:
    """The peer may be gone before its endpoint is used. UCX would keep what is posted then for ever."""
    context = UcxContext(hall.dialing._api, {**TCP_ONLY, "NET_DEVICES": "lo"})
    ours, theirs = context.open("127.0.0.1"), context.open("127.0.0.1")
    ours.connect(theirs.address)
    theirs.connect(ours.address)
    arrived = theirs.receive(np.zeros(10, np.uint8), 1)
    await asyncio.wait({ours.send(np.zeros(10, np.uint8), 1), arrived}, timeout=2)
    theirs.end()
    await until(lambda: not ours._endpoint.alive)
    posted = ours.receive(np.zeros(10, np.uint8), 5)
    await asyncio.wait({posted}, timeout=1)
    assert isinstance(posted.exception(), PeerLost)
    await context.close()
    assert context.num_pending == 0


async def test_a_dialer_that_leaves_in_the_handshake_is_noticed_at_once(
    hall: Hall, caplog: pytest.LogCaptureFixture
) -> None:
    async with aiohttp.ClientSession() as session:
        channel = await hall.ready(session)
        channel.abort("changed our mind")
        await until(lambda: "no connection with the peer" in caplog.text, budget_s=1)
        await channel.close()
    assert not hall.context._drivers


@pytest.mark.parametrize(
    ("secret", "changes", "reason"),
    [
        (b"x" * 32, {}, "without the cluster secret's proof"),
        (SECRET, {"worker": b"no address at all"}, "without the cluster secret's proof"),
        (SECRET, {"way": "tcp,self"}, "without the cluster secret's proof"),
        (SECRET, {"proof": b""}, "without the cluster secret's proof"),
        (SECRET, {"instances": (1, 2)}, "without the cluster secret's proof"),
        (SECRET, {"host": "fe80::1"}, "not 'fe80::1'"),
        (SECRET, {"host": "prefill.example"}, "not 'prefill.example'"),
    ],
)
async def test_ucx_sees_no_address_that_is_not_vouched_for(
    hall: Hall, caplog: pytest.LogCaptureFixture, secret: bytes, changes: dict[str, Any], reason: str
) -> None:
    """UCX aborts the process over bytes that are no address."""
    async with aiohttp.ClientSession() as session:
        channel = await hall.ready(session)
        instances, host = changes.pop("instances", (2, 1)), changes.pop("host", "127.0.0.1")
        honest = path_of(secret, instances, "posix,cma,self", b"of a worker", host)
        channel.post(replace(honest, **changes))
        with pytest.raises(PeerLost):
            await asyncio.wait_for(channel.receive(), 3)
        await channel.close()
    assert reason in caplog.text
    assert hall.accepted.empty() and not hall.context._drivers
    await works(hall)


async def test_a_peer_that_never_says_its_path_is_dropped(hall: Hall) -> None:
    hall.listening._config = TransferConfig(slot_bytes=65536, num_slots=4, connect_s=0.3)
    async with aiohttp.ClientSession() as session:
        channel = await hall.ready(session)
        with pytest.raises(PeerLost):
            while True:
                await asyncio.wait_for(channel.receive(), 3)
        await channel.close()
    assert hall.accepted.empty() and not hall.context._drivers
    await works(hall)


async def test_a_damaged_self_test_refuses_the_connection(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = self_test.pattern_of
    monkeypatch.setattr(self_test, "pattern_of", lambda n, tag: honest(n, secrets.randbits(63)))
    with pytest.raises(PeerLost, match="no payload connection with p0"):
        await hall.dialing.dial(hall.listener.address, US)
    monkeypatch.undo()
    await asyncio.sleep(0.05)
    assert hall.accepted.empty()
    await works(hall)


async def test_tcp_takes_over_where_shared_memory_fails_its_test(
    hall: Hall, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if "UCX_TLS" in os.environ:
        pytest.skip("the user chose UCX's transports")
    tried: list[str] = []

    async def fail_on_shared_memory(endpoint: UcxEndpoint, slots: SlotStore) -> None:
        if not any(endpoint._driver in context._drivers for context in hall.listening._contexts.values()):
            tried.append(endpoint._driver._context._options["TLS"])
            if "posix" in tried[-1]:
                await endpoint.receive()
                raise TransferError("no ptrace permission")
        await run_self_test(endpoint, slots)

    monkeypatch.setattr(ucx, "run_self_test", fail_on_shared_memory)
    dialer = await works(hall)
    assert tried == ["posix,cma,self", "tcp,self"]
    assert "no ptrace permission" in caplog.text
    dialer.abort("cable")
    await works(hall)
    assert tried[2:] == ["tcp,self"]  # remembered


async def test_a_message_that_is_not_for_peers_ends_the_connection(hall: Hall) -> None:
    dialer = await works(hall)
    hall.accepted.put_nowait(acceptor := next(iter(hall.listener.endpoints)))  # type: ignore[attr-defined]
    dialer._channel.post(Pulse())
    with pytest.raises(ProtocolError, match="Pulse is not a message between workers"):
        await asyncio.wait_for(acceptor.receive(), 2)
    assert acceptor.lost.done()


async def test_words_before_the_hello_are_refused(hall: Hall, caplog: pytest.LogCaptureFixture) -> None:
    async with aiohttp.ClientSession() as session:
        for message in (Grant(transfer_id=1, num_blocks=1, num_cached_blocks=0), Credit(tags=(), slot_bytes=1)):
            channel = await dial(session, hall.url, SECRET, "peer")
            channel.post(message)
            with pytest.raises(PeerLost):
                await asyncio.wait_for(channel.receive(), 3)
            await channel.close()
    assert "expected PeerHello, got Grant" in caplog.text
    await works(hall)


async def test_a_cancelled_dial_leaves_nothing_open(hall: Hall) -> None:
    async def read() -> None:  # as whoever accepts an endpoint does
        while True:
            endpoint = await hall.accepted.get()
            with suppress(PeerLost):
                while True:
                    await endpoint.receive()

    reading = asyncio.create_task(read())
    for pause_s in (0.0, 0.001, 0.003, 0.01, 0.03):
        dialing = asyncio.create_task(hall.dialing.dial(hall.listener.address, US))
        await asyncio.sleep(pause_s)
        dialing.cancel()
        await asyncio.wait({dialing})
        if not dialing.cancelled():
            dialing.result().abort("too quick for this test")
    await until(lambda: not hall.dialing._dialled and hall.dialing.num_pending == 0)
    await until(lambda: not hall.listener.endpoints and hall.listening.num_pending == 0)  # type: ignore[attr-defined]
    reading.cancel()
    await asyncio.wait({reading})
    await works(hall)


async def test_a_host_that_nobody_can_dial_is_a_configuration_error() -> None:
    for host, reason in (
        ("192.0.2.1", "no network device has 192.0.2.1"),
        ("::1", "no IPv4 address"),
        ("no such host", "no IPv4 address"),
    ):
        transport = UcxTransport(TransferConfig(host=host), SECRET)
        with pytest.raises(ConfigError, match=reason):
            await transport.listen(US, lambda endpoint: None)
        await transport.close()


async def test_a_host_may_be_a_name() -> None:
    hall = Hall()
    hall.listening = UcxTransport(TransferConfig(host="localhost", slot_bytes=65536, num_slots=4), SECRET)
    hall.listener = await hall.listening.listen(Identity("p0", 1, fingerprint()), hall.accepted.put_nowait)
    assert hall.listener.address.host == "localhost"
    dialer = await works(hall)
    dialer.abort("done")
    await hall.dialing.close()
    await hall.listening.close()


def run_python(code: str, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**clean, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_settings_of_the_user_stay() -> None:
    code = "import os, kvtransfer.ucx as u; u.load_ucxx(); print(os.environ['UCX_RNDV_THRESH'])"
    assert run_python(code) == DEFAULTS["UCX_RNDV_THRESH"]
    assert run_python(code, UCX_RNDV_THRESH="16384") == "16384"
    code = (
        "import kvtransfer.ucx as u; from kvtransfer.transport import _host_slots; "
        "t = u.UcxTransport(u.TransferConfig(), b''); "
        "print([(w.staging, w.options) for w in t._ways('127.0.0.1', t._device('127.0.0.1'), _host_slots())])"
    )
    assert run_python(code, UCX_TLS="tcp,self") == "[('host', {})]"


def test_ucxx_is_imported_only_when_its_transport_is_opened() -> None:
    opened = "open_transport(TransferConfig(transport={!r}), b'')"
    code = (
        "import sys; from kvtransfer.transports import open_transport; from kvtransfer.config import TransferConfig; "
        "{}; print('ucxx' in sys.modules)"
    )
    assert run_python(code.format(opened.format("inproc"))) == "False"
    assert run_python(code.format(opened.format("ucx"))) == "True"


def test_a_missing_ucxx_is_a_clear_configuration_error() -> None:
    code = (
        "import sys; sys.modules['ucxx'] = None\n"
        "from kvtransfer.ucx import *\n"
        "try: UcxTransport(TransferConfig(), b'')\n"
        "except ConfigError as e: print(e)"
    )
    assert "needs the ucxx package" in run_python(code)


async def test_without_cudas_transports_slots_stay_in_host_memory_and_it_is_said_once(
    hall: Hall, caplog: pytest.LogCaptureFixture
) -> None:
    """Naming them is not enough: the UCX here knows their names and has none of them."""
    if "UCX_TLS" in os.environ:
        pytest.skip("the user chose UCX's transports")
    device = DeviceRegion(fingerprint(device="cuda"), 4)
    us = Identity("d0", 2, device.fingerprint, SlotStore(device, CONFIG))
    for _ in range(2):
        dialer = await hall.dialing.dial(hall.listener.address, us)
        assert dialer.agreement.kind == "host"
    told = [record.getMessage() for record in caplog.records if "stay in host memory" in record.getMessage()]
    assert told == ["KV slots stay in host memory: UCX offers no cuda_copy and no cuda_ipc here (GPU memory over "
                    f"{CUDA_IPC['TLS']})"]  # fmt: skip
    insisting = TransferConfig(slot_bytes=65536, num_slots=4, kv_staging="device")
    us = Identity("d0", 2, device.fingerprint, SlotStore(device, insisting))
    with pytest.raises(ConfigError, match="UCX offers no cuda_copy"):
        await hall.dialing.dial(hall.listener.address, us)


async def test_device_memory_on_a_connection_that_does_not_take_it_is_an_error_of_the_transfer(hall: Hall) -> None:
    dialer = await works(hall)
    (slot,) = DeviceRegion(fingerprint(), 4).new_slots(1, 65536, "cuda")
    for done in (dialer.send(slot, 1), dialer.post_receive(slot, 2)):
        await asyncio.wait({done}, timeout=1)
        assert isinstance(done.exception(), TransferError)
    assert not dialer.lost.done()


async def test_with_device_memory_the_driver_looks_by_itself_while_there_is_work(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ucx_driver, "LOOK_FOR_S", 0.2)
    turns: Counter[UcxDriver] = Counter()

    def counting(driver: UcxDriver) -> None:
        turns[driver] += 1
        progress(driver)

    progress = UcxDriver._reap
    monkeypatch.setattr(UcxDriver, "_reap", counting)
    dialer = await works(hall)
    monkeypatch.setattr(ucx_driver, "offered_device_transports", lambda context: frozenset({"cuda_copy"}))
    context = UcxContext(hall.dialing._api, {**CUDA_IPC, "NET_DEVICES": "lo"})
    looking, other, plain = context.open("127.0.0.1"), context.open("127.0.0.1"), dialer._driver
    looking.connect(other.address)
    waiting = [looking.receive(np.zeros(10, np.uint8), 5), dialer.post_receive(np.zeros(10, np.uint8), 6)]
    await asyncio.sleep(0.1)
    assert turns[looking] > 20 and turns[looking] > 2 * turns[plain]
    await asyncio.sleep(0.3)
    before = turns[looking]
    await asyncio.sleep(0.1)
    assert turns[looking] - before < 5  # idle, with a receive posted
    looking.end()
    await asyncio.wait(waiting[:1], timeout=1)
    await context.close()
