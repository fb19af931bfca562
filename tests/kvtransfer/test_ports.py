"""The TCP ports that UCX opens by itself, in the hands of strangers; and what a link leaves behind."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from kvtransfer.ports import Ports, descriptors
from kvtransfer.ucx import load_ucxx
from kvtransfer.ucx_driver import UcxContext, UcxDriver
from kvtransfer.ways import SHARED_MEMORY, TCP_ONLY
from tests.e2e.sockets import Socket, listening

pytestmark = pytest.mark.ucx
# What UCX's TCP wire begins with; 45 bytes with a message of it behind ended a worker.
MAGIC = struct.pack("<Q", 0xCAFEBABE12345678)
GARBAGE = {
    "nothing": b"",
    "short": b"A",
    "45 bytes": MAGIC + os.urandom(37),
    "10 kB": struct.pack("<QB", 1 << 40, 0) + b"A" * 10_000,
    "10 kB of its own": MAGIC + b"A" * 10_000,
}


def own_ports() -> set[int]:
    """Return the TCP ports of this process, which has other listeners of its own in some runs."""
    return {one.port for one in listening(os.getpid()) if isinstance(one, Socket) and one.kind == "tcp"}


class Pair:
    """Two UCX workers of this process that are linked over one way."""

    def __init__(self, options: dict[str, str]) -> None:
        self.context = UcxContext(load_ucxx(), {**options, "NET_DEVICES": "lo"})
        self.before = own_ports()
        self.ends = self.link()
        self.ports = own_ports() - self.before

    def link(self) -> tuple[UcxDriver, UcxDriver]:
        """Open and connect two."""
        one, other = self.context.open("127.0.0.1"), self.context.open("127.0.0.1")
        one.connect(other.address)
        other.connect(one.address)
        return one, other

    async def works(self, num_bytes: int = 300_000) -> None:
        """Assert that payload flows."""
        sent, received = np.arange(num_bytes, dtype=np.uint8), np.zeros(num_bytes, np.uint8)
        done = {self.ends[0].send(sent, 7), self.ends[1].receive(received, 7)}
        finished, _ = await asyncio.wait(done, timeout=5)
        assert finished == done
        assert (sent == received).all()


@pytest_asyncio.fixture
async def over_tcp() -> AsyncIterator[Pair]:
    pair = Pair(TCP_ONLY)
    await pair.works()
    yield pair
    await pair.context.close()
    assert pair.context.num_pending == 0


def knock(port: int, words: bytes, source: str = "127.0.0.1") -> socket.socket | None:
    """Connect and say something; return the connection, or None where the kernel drops us."""
    caller = socket.socket()
    caller.settimeout(0.15)
    caller.bind((source, 0))
    try:
        caller.connect(("127.0.0.1", port))
        caller.sendall(words)
    except OSError:
        caller.close()
        return None
    return caller


async def test_a_port_is_on_one_device_and_only_the_peers_address_gets_through(over_tcp: Pair) -> None:
    assert len(over_tcp.ports) == 2
    assert {one.where for one in listening(os.getpid()) if one.port in over_tcp.ports} == {"127.0.0.1"}
    for port in over_tcp.ports:
        assert knock(port, b"", source="127.0.0.2") is None
        caller = knock(port, b"")
        assert caller is not None
        caller.close()
    await over_tcp.works()


@pytest.mark.parametrize("words", GARBAGE.values(), ids=GARBAGE)
async def test_strangers_do_not_reach_a_port_that_is_shut(over_tcp: Pair, words: bytes) -> None:
    for end in over_tcp.ends:
        end.shut_ports()
    before = len(descriptors())
    for port in over_tcp.ports:
        assert await asyncio.to_thread(knock, port, words) is None
        assert await asyncio.to_thread(knock, port, words, "127.0.0.2") is None
    await over_tcp.works()
    used_s = time.process_time()
    await asyncio.sleep(0.5)
    assert time.process_time() - used_s < 0.1
    assert len(descriptors()) == before


async def test_silent_connections_in_great_number_find_nobody(over_tcp: Pair) -> None:
    for end in over_tcp.ends:
        end.shut_ports()
    before, callers = len(descriptors()), []
    for _ in range(200):
        callers.append(caller := socket.socket())
        caller.setblocking(False)
        caller.connect_ex(("127.0.0.1", next(iter(over_tcp.ports))))
    await asyncio.sleep(0.2)
    assert len(descriptors()) == before + 200  # their own ends, which are in this process
    assert all(caller.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\x02" for caller in callers), "SYN_SENT"
    for caller in callers:
        caller.close()
    await over_tcp.works()


async def test_shared_memory_has_no_port() -> None:
    pair = Pair(SHARED_MEMORY)
    await pair.works()
    assert pair.ports == set()
    assert not pair.ends[0]._ports._names
    await pair.context.close()


async def test_a_link_leaves_nothing_behind_however_it_ends() -> None:
    """Quiet, with receives posted, and with messages on their way in either direction: descriptors stay flat."""
    for options in (SHARED_MEMORY, TCP_ONLY):
        none = len(descriptors())
        pair = Pair(options)
        width, sizes = len(descriptors()) - none, []  # of two workers and their context
        for number in range(24):
            one, other = pair.ends
            buffers = [np.zeros(2 << 20, np.uint8) for _ in range(6)]
            waiting = [one.receive(buffers[0], 100)]
            if number % 4 > 0:
                waiting += [one.send(buffers[1], 1), one.send(buffers[2], 2), other.receive(buffers[3], 1)]
            if number % 4 > 1:
                waiting += [other.send(buffers[4], 3), one.receive(buffers[5], 3)]
            await asyncio.sleep(0.001 * (number % 3))
            for end in (one, other) if number % 2 else (other, one):
                end.end()
            await asyncio.wait(waiting, timeout=2)
            assert all(done.done() for done in waiting), number
            await asyncio.wait({one.ended, other.ended}, timeout=2)
            assert one.ended.done() and other.ended.done()
            sizes.append(len(descriptors()))
            pair.ends = pair.link()
            await pair.works()
        # At most both ends' workers were kept, each of them once; the rest was destroyed every time.
        assert len(pair.context._idle) <= 2
        assert max(sizes) - none <= width, (sizes, none, width)
        await pair.context.close()


def test_only_listening_sockets_are_filtered() -> None:
    before = descriptors()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as other, Path("/dev/null").open():
        ports = Ports(descriptors() - before)
        assert ports._names == {server.fileno(): server.getsockname()}
        ports.shut()
        assert knock(server.getsockname()[1], b"") is None
        ports.admit("127.0.0.3")
        assert knock(server.getsockname()[1], b"") is None
        caller = knock(server.getsockname()[1], b"", source="127.0.0.3")
        assert caller is not None
        caller.close()
        number = server.detach()
        os.close(number)
        os.dup2(other.fileno(), number)  # the number is another socket's now
        ports.shut()
        os.close(number)
