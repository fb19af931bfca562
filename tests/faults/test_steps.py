"""What hits a worker from within: a step that hangs, a step that fails, clocks that jump, messages that come late."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.e2e.server import Server, wait_until
from tests.faults.ledger import Ledger, Record, Request
from tests.faults.mutated import busy_pid, mutated, on, until_idle
from tests.faults.trials import NUM_DECODE, NUM_PREFILL, Trial, run_trial

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.ucx, pytest.mark.slow]

REQUEST = Request("The longest road in the country", 900, 0.8, 3)  # it must still run when its worker is found busy
STALL_S = 2.0
SUCCESSOR_BUDGET_S = 60.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("steps")
    options = ("--decode", "2", "--stall-s", str(STALL_S))
    with mutated(folder, cache_dir, "hang-step,fail-step", *options) as running:
        yield running


def struck(server: Server, number: signal.Signals) -> tuple[list[str], int]:
    """Stream a request while the decode worker that runs it gets a signal; return what was wrong, and its pid."""
    faults, pids = list[str](), list[int]()

    async def ask(_: aiohttp.ClientSession, ledger: Ledger) -> None:
        oracle, record = await ledger.oracle(REQUEST), Record(REQUEST)
        await asyncio.to_thread(until_idle, server)
        running = asyncio.create_task(ledger.stream(REQUEST, record))
        while len(record.token_ids) < 20:
            await asyncio.sleep(0.001)
        pids.append(await asyncio.to_thread(busy_pid, server))
        os.kill(pids[0], number)
        await running
        faults.extend(record.faults(oracle))

    on(server, ask)
    return faults, pids[0]


def is_succeeded(server: Server, pid: int) -> bool:
    decodes = [worker["pid"] for worker in server.workers() if worker["role"] == "decode"]
    return len(decodes) == 2 and pid not in decodes and not Path(f"/proc/{pid}").exists()


def test_a_hanging_step_is_noticed_though_its_heart_beats(server: Server) -> None:
    faults, pid = struck(server, signal.SIGUSR1)
    assert faults == []
    assert "has work but made no progress for" in server.log.read_text()
    wait_until(lambda: is_succeeded(server, pid), SUCCESSOR_BUDGET_S, "its process has ended and has a successor")


def test_a_failing_step_ends_its_process_and_no_stream(server: Server) -> None:
    before = server.log.stat().st_size
    faults, pid = struck(server, signal.SIGUSR2)
    assert faults == []
    wait_until(lambda: is_succeeded(server, pid), SUCCESSOR_BUDGET_S, "its process has ended and has a successor")
    said = server.log.read_text()[before:]
    assert "the device is broken, says a mutation" in said and "ended with exit code 1;" in said


def test_jumping_wall_clocks_and_late_messages_change_no_token(tmp_path: Path, cache_dir: Path) -> None:
    options = ("--decode", str(NUM_DECODE), "--prefill", str(NUM_PREFILL))
    with mutated(tmp_path, cache_dir, "wall-clock,delay-control", *options) as server:
        outcomes = []

        async def ask(http: aiohttp.ClientSession, _: Ledger) -> None:
            outcomes.append(await run_trial(server, http, Trial("decode-kill", 1)))

        on(server, ask)
    assert [(str(o.trial), o.faults) for o in outcomes if o.faults] == []
    assert outcomes[0].was_struck
    said = server.log.read_text()
    assert "LATE messages" in said and "JUMPING clocks" in said
