"""Each check switched off, and the suite must fail; `test_small.py` shows that it passes with them on."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import aiohttp
import pytest

from tests.e2e.server import Server
from tests.faults import bits
from tests.faults.heap import MUTATION, Heap, written_to
from tests.faults.ledger import Ledger, Record, Request
from tests.faults.mutated import busy_pid, flips, mutated, on, until_idle
from tests.faults.phases import Cluster
from tests.faults.trials import Trial, run_trial

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.ucx, pytest.mark.slow]

LEASE_TTL_S = 1.0


@pytest.fixture(scope="module")
def expected(one_pair: Server) -> dict[Request, list[int]]:
    found: dict[Request, list[int]] = {}

    async def ask(_: aiohttp.ClientSession, ledger: Ledger) -> None:
        found.update(await bits.oracles(ledger, bits.draw(1, 20)))

    on(one_pair, ask)
    return found


def test_flipped_bits_are_all_found_and_no_stream_notices(
    tmp_path: Path, cache_dir: Path, expected: dict[Request, list[int]]
) -> None:
    with mutated(tmp_path, cache_dir, "flip-bits") as server:
        reports = []

        async def ask(_: aiohttp.ClientSession, ledger: Ledger) -> None:
            reports.append(await bits.run(server, ledger, expected, 20, print))

        on(server, ask)
    assert reports[0].faults == [] and reports[0].num_found >= 20


def test_the_heap_of_a_router_tells_where_it_grows(tmp_path: Path, cache_dir: Path) -> None:
    with written_to(tmp_path / "heap"), mutated(tmp_path, cache_dir, MUTATION, "--num-kv-blocks", "200") as server:
        heap = Heap(tmp_path / "heap", server.children()["router"])

        async def ask(_: aiohttp.ClientSession, ledger: Ledger) -> None:
            await heap.look(0)
            assert (await ledger.stream(Request("one", 3, 0.0, 0))).num_ends == 1
            await heap.look(1)

        on(server, ask)
    assert len(list((tmp_path / "heap").iterdir())) == 2


def test_without_checksums_flipped_bits_are_not_found_and_change_tokens(
    tmp_path: Path, cache_dir: Path, expected: dict[Request, list[int]]
) -> None:
    with mutated(tmp_path, cache_dir, "flip-bits,no-checksum") as server:
        reports = []

        async def ask(_: aiohttp.ClientSession, ledger: Ledger) -> None:
            reports.append(await bits.run(server, ledger, expected, 20, print))

        on(server, ask)
    assert flips(server)[1] == 0
    assert [fault for fault in reports[0].faults if "bits were flipped and 0 found" in fault]


def test_without_replay_a_killed_decode_worker_loses_its_streams(tmp_path: Path, cache_dir: Path) -> None:
    with mutated(tmp_path, cache_dir, "no-replay", "--decode", "2", "--prefill", "2") as server:
        outcomes = []

        async def ask(http: aiohttp.ClientSession, _: Ledger) -> None:
            for seed in (1, 2):
                outcomes.append(await run_trial(server, http, Trial("decode-kill", seed)))

        on(server, ask)
    assert any("stream" in fault for outcome in outcomes for fault in outcome.faults)


def test_without_fencing_a_worker_that_wakes_up_doubles_tokens(tmp_path: Path, cache_dir: Path) -> None:
    # Long enough that the stream has moved before the worker itself would find that its router was silent.
    options = ("--decode", "2", "--lease-ttl-s", "2.5", "--heartbeat-s", "0.2")
    with mutated(tmp_path, cache_dir, "no-fencing,no-lease", *options) as server:
        faults: list[str] = []

        async def ask(_: aiohttp.ClientSession, ledger: Ledger) -> None:
            request = Request("The longest road in the country", 400, 0.0, 1)
            oracle = await ledger.oracle(request)
            await asyncio.to_thread(until_idle, server)
            record = Record(request)
            running = asyncio.create_task(ledger.stream(request, record))
            while len(record.token_ids) < 20:
                await asyncio.sleep(0.001)
            busy = await asyncio.to_thread(busy_pid, server)
            os.kill(busy, signal.SIGSTOP)
            num_before = len(record.token_ids)
            while len(record.token_ids) < num_before + 20:  # it has moved to the other one
                await asyncio.sleep(0.001)
            os.kill(busy, signal.SIGCONT)
            await running
            faults.extend(record.faults(oracle))

        on(server, ask)
    assert any("differs at token" in fault or "of 400 tokens" in fault for fault in faults), faults


@pytest.mark.parametrize("names", ["", "no-lease"])
def test_blocks_of_a_killed_router_come_back_because_leases_run_out(
    tmp_path: Path, cache_dir: Path, names: str
) -> None:
    options = ("--lease-ttl-s", str(LEASE_TTL_S), "--heartbeat-s", "0.2")
    with mutated(tmp_path, cache_dir, names, *options) as server:
        leased: list[int] = []

        async def ask(http: aiohttp.ClientSession, ledger: Ledger) -> None:
            cluster = Cluster(server, http, {"decode": 1, "prefill": 1})
            (decode,) = await cluster.workers("decode")
            record = Record(Request("The longest road in the country", 2000, 0.0, 1))
            running = asyncio.create_task(ledger.stream(record.request, record))
            while len(record.token_ids) < 5:
                await asyncio.sleep(0.001)
            os.kill(server.children()["router"], signal.SIGKILL)
            await running
            deadline_s = time.monotonic() + 3 * LEASE_TTL_S
            while time.monotonic() < deadline_s:
                census = await cluster.own_census(decode)
                assert census is not None
                leased.append(census["blocks"]["leased"])
                await asyncio.sleep(0.1)

        on(server, ask)
    assert leased[0] > 0
    assert (leased[-1] > 0) == (names == "no-lease")
