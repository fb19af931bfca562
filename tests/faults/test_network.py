"""Cables that are cut and mended between router, prefill and decode, each on a host of its own."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.client import session
from tests.e2e.server import Server, wait_until
from tests.e2e.sockets import Socket, listening
from tests.e2e.test_sockets import table
from tests.faults import network
from tests.faults.ledger import Ledger, Record, Request
from tests.faults.mutated import until_idle
from tests.faults.network import Cluster

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.ucx, pytest.mark.slow]

STREAM = Request("The longest road in the country", 400, 0.8, 7)
LONG = Request(" ".join(f"item {i}" for i in range(500)), 8, 0.0, 0)
NUM_PREFILL = NUM_DECODE = 2
BETWEEN_HOSTS, LOOPBACK = "`prefill`, `decode` on two hosts", "127.0.0.1"


@pytest.fixture(scope="module")
def possible() -> None:
    if reason := network.why_not():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def expected(possible: None, one_pair: Server) -> dict[Request, list[int]]:
    """What a server on one host answers."""

    async def ask(url: str) -> dict[Request, list[int]]:
        async with session() as http:
            ledger = Ledger(http, url)
            return {request: await ledger.oracle(request) for request in (STREAM, LONG)}

    return asyncio.run(ask(one_pair.url))


@pytest.fixture(scope="module")
def hosts(
    tmp_path_factory: pytest.TempPathFactory, cache_dir: Path, expected: dict[Request, list[int]]
) -> Iterator[Cluster]:
    with network.cluster(tmp_path_factory.mktemp("hosts"), cache_dir, NUM_PREFILL, NUM_DECODE) as running:
        yield running


def stream(cluster: Cluster, request: Request, fault: Callable[[Record], Awaitable[None]]) -> Record:
    """Stream a request while something happens to the network."""

    async def run() -> Record:
        async with session() as http:
            record = Record(request)
            running = asyncio.create_task(Ledger(http, cluster.server.url).stream(request, record))
            await fault(record)
            return await running

    return asyncio.run(run())


def busy(cluster: Cluster, role: str) -> str:
    """Return the worker that holds the only request, once its heartbeat has said so."""
    found = wait_until(
        lambda: [w for w in cluster.server.workers() if w["role"] == role and (w["num_running"] or w["queued_tokens"])],
        5.0,
        f"a busy {role} worker",
    )
    assert len(found) == 1
    return str(found[0]["worker_id"])


async def tokens(record: Record, num_tokens: int) -> None:
    while len(record.token_ids) < num_tokens:
        await asyncio.sleep(0.001)


def whole(cluster: Cluster) -> None:
    wait_until(lambda: len(cluster.server.workers()) == NUM_PREFILL + NUM_DECODE, 30.0, "everybody back")
    until_idle(cluster.server)


async def nothing(_: Record) -> None:
    return


def test_streams_across_hosts_are_those_of_one_host(hosts: Cluster, expected: dict[Request, list[int]]) -> None:
    for request in (STREAM, LONG):
        assert stream(hosts, request, nothing).faults(expected[request]) == []
    assert "tcp" in hosts.log("decode-0") + hosts.log("prefill-0") or hosts.server.total(
        "baton_kv_transfer_bytes_total"
    )


def off_loopback() -> list[Socket]:
    """Return the TCP sockets on which processes of these tests listen for other hosts."""
    return [one for one in listening(os.getpid()).elements() if one.kind == "tcp" and one.where != LOOPBACK]


def test_between_hosts_each_worker_listens_on_what_security_md_says(hosts: Cluster) -> None:
    whole(hosts)
    found = Counter((one.process, one.where) for one in off_loopback())
    addresses = {worker_id: host.address for worker_id, host in hosts.hosts.items()}
    links = {"prefill": NUM_DECODE, "decode": NUM_PREFILL}
    want = Counter({("router", f"{network.NETWORK}.1"): 1})
    for worker_id, address in addresses.items():
        role = worker_id.partition("-")[0]
        want[role, address] = links[role] + sum(
            number for process, kind, where, number, of_what in table(BETWEEN_HOSTS)
            if process == role and where != LOOPBACK and of_what == "a process"
        )  # fmt: skip
    assert found == want


@pytest.mark.parametrize("words", [b"", b"A", os.urandom(45), b"A" * 10_000], ids=len)
def test_a_stranger_finds_no_way_to_ucx(hosts: Cluster, expected: dict[Request, list[int]], words: bytes) -> None:
    """From the router's host, which is no peer; and from the peer's, once they are linked."""
    whole(hosts)
    ports = {(one.where, one.port) for one in off_loopback() if one.process == "decode"}
    assert len(ports) == NUM_DECODE * NUM_PREFILL
    inside = ("ip", "netns", "exec", hosts.hosts["prefill-0"].namespace)
    code = (
        "import socket, sys; s = socket.socket(); s.settimeout(0.5); s.connect((sys.argv[1], int(sys.argv[2]))); "
        "s.sendall(bytes.fromhex(sys.argv[3])); print('connected')"
    )
    for address, port in ports:
        for where in ((), inside):
            command = [*where, sys.executable, "-c", code, address, str(port), words.hex()]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert "timed out" in done.stderr and "connected" not in done.stdout
    assert stream(hosts, LONG, nothing).faults(expected[LONG]) == []


def test_a_cable_that_is_cut_for_less_than_the_lease_moves_nothing(
    hosts: Cluster, expected: dict[Request, list[int]]
) -> None:
    whole(hosts)
    gone = hosts.log("router").count("is gone")

    async def cut(record: Record) -> None:
        await tokens(record, 30)
        host = hosts.hosts[await asyncio.to_thread(busy, hosts, "decode")]
        host.down()
        await asyncio.sleep(1.0)
        host.up()

    record = stream(hosts, STREAM, cut)
    assert record.faults(expected[STREAM]) == [] and record.longest_gap_s > 0.9
    assert hosts.log("router").count("is gone") == gone


def test_a_cable_that_stays_cut_moves_the_stream(hosts: Cluster, expected: dict[Request, list[int]]) -> None:
    whole(hosts)
    gone = hosts.log("router").count("is gone")

    async def cut(record: Record) -> None:
        await tokens(record, 30)
        host = hosts.hosts[await asyncio.to_thread(busy, hosts, "decode")]
        host.down()
        await asyncio.sleep(6.0)
        host.up()

    record = stream(hosts, STREAM, cut)
    assert record.faults(expected[STREAM]) == []
    assert 2.0 < record.longest_gap_s < 6.0, "after the lease, not after the cable"
    assert hosts.log("router").count("is gone") == gone + 1
    whole(hosts)


def test_a_prompt_whose_prefill_worker_is_cut_off_is_computed_elsewhere(
    hosts: Cluster, expected: dict[Request, list[int]]
) -> None:
    whole(hosts)

    async def cut(_: Record) -> None:
        await asyncio.sleep(0.4)
        host = hosts.hosts[await asyncio.to_thread(busy, hosts, "prefill")]
        host.down()
        await asyncio.sleep(8.0)
        host.up()

    # Tokens that end otherwise keep it from being the prompt of an earlier test, which is cached.
    request = Request("again " + LONG.prompt, 8, 0.0, 0)
    record = stream(hosts, request, cut)
    whole(hosts)
    assert record.num_ends == 1 and record.is_done and record.errors == []
    assert record.token_ids == stream(hosts, request, nothing).token_ids


def test_delay_and_loss_change_no_token(hosts: Cluster, expected: dict[Request, list[int]]) -> None:
    if reason := network.why_no_netem():
        pytest.skip(reason)
    whole(hosts)
    for host in hosts.hosts.values():
        host.shape("delay", "25ms", "loss", "1%")
    for request in (STREAM, LONG):
        assert stream(hosts, request, nothing).faults(expected[request]) == []
