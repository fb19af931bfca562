"""The only worker of a role dies: its streams wait for its successor, and where none comes they end with one error."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.e2e.client import session
from tests.e2e.server import Server
from tests.faults.by_hand import roles
from tests.faults.ledger import Ledger, Record, Request
from tests.faults.phases import Cluster

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.ucx, pytest.mark.slow]

STREAM = Request("The longest road in the country", 200, 0.8, 7)
LONG = Request(" ".join(f"item {i}" for i in range(600)), 8, 0.0, 0)
ENDLESS = Request("The longest road in the country", 4000, 0.0, 7)
WAIT_S = 2.0
# Generous: a hang lasts for ever, and a busy machine does not.
END_BUDGET_S = WAIT_S + 20.0


async def tokens(record: Record, num_tokens: int) -> None:
    while len(record.token_ids) < num_tokens and not record.ended_s:
        await asyncio.sleep(0.001)


async def test_a_stream_waits_for_the_successor_of_the_only_decode_worker(one_pair: Server) -> None:
    async with session() as http:
        ledger, cluster = Ledger(http, one_pair.url), Cluster(one_pair, http, {"decode": 1, "prefill": 1})
        assert await cluster.aftermath() == []
        oracle, record = await ledger.oracle(STREAM), Record(STREAM)
        running = asyncio.create_task(ledger.stream(STREAM, record))
        await tokens(record, 20)
        (worker,) = await cluster.workers("decode")
        cluster.kill(worker)
        await running
        assert record.faults(oracle) == []
        assert await cluster.aftermath() == []


async def test_a_prompt_waits_for_the_successor_of_the_only_prefill_worker(one_pair: Server) -> None:
    async with session() as http:
        ledger, cluster = Ledger(http, one_pair.url), Cluster(one_pair, http, {"decode": 1, "prefill": 1})
        assert await cluster.aftermath() == []
        (worker,) = await cluster.workers("prefill")
        record = Record(LONG)
        running = asyncio.create_task(ledger.stream(LONG, record))
        while not ((census := await cluster.own_census(worker)) and census["num_placements"]) and not record.times_s:
            await asyncio.sleep(0.002)
        cluster.kill(worker)
        struck_before_a_token = not record.times_s
        await running
        assert struck_before_a_token, "the prompt was over before the worker died"
        # Asked afterwards: nobody may have had its blocks before.
        assert record.faults(await ledger.oracle(LONG)) == []
        assert await cluster.aftermath() == []


async def test_without_a_successor_there_is_one_error_and_never_a_hang(tmp_path: Path, cache_dir: Path) -> None:
    options = [f"--placement-wait-s={WAIT_S:g}"]
    with roles(tmp_path, cache_dir, ["prefill-0", "decode-0"], options) as cluster:
        async with session() as http:
            ledger, begun = Ledger(http, cluster.server.url), Record(ENDLESS)
            running = asyncio.create_task(ledger.stream(ENDLESS, begun))
            await tokens(begun, 20)
            _kill(cluster.workers["prefill-0"])
            without_prefill = await asyncio.wait_for(ledger.stream(LONG), END_BUDGET_S)
            assert begun.errors == [], "what is being decoded needs no prefill worker"
            _kill(cluster.workers["decode-0"])
            without_anybody = await asyncio.wait_for(ledger.stream(LONG), END_BUDGET_S)
            await asyncio.wait_for(running, END_BUDGET_S)
    for refused in (without_prefill, without_anybody):
        assert refused.status == 503 and refused.retry_after, (refused.status, refused.errors)
        assert refused.ended_s - refused.begun_s > WAIT_S / 2, "it did not wait for a worker"
    assert begun.is_explicit_failure(begun.token_ids), (begun.errors, begun.num_ends)
    assert begun.errors[0].startswith("error event") and len(begun.token_ids) >= 20


def _kill(process: subprocess.Popen[bytes]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
