"""Start a server with mutations (mutations/README.md), ask it, and count what it says of bits."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

from tests.e2e.client import session
from tests.e2e.server import Server, serving, wait_until
from tests.faults.ledger import Ledger

FOLDER = Path(__file__).parent / "mutations"
_NAMES = ("PYTHONPATH", "BATON_TEST_MUTATION", "BATON_TEST_MUTATION_SEED")


@contextmanager
def mutations(*names: str, seed: int = 0) -> Iterator[None]:
    """Let servers that are started inside have these mutations; what they draw follows from the seed."""
    before = {name: os.environ.get(name) for name in _NAMES}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(FOLDER), *filter(None, [before["PYTHONPATH"]])])
    os.environ["BATON_TEST_MUTATION"] = ",".join(names)
    os.environ["BATON_TEST_MUTATION_SEED"] = str(seed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def mutated(tmp_path: Path, cache_dir: Path, names: str, *options: str) -> Iterator[Server]:
    """Run a server with mutations."""
    with mutations(*names.split(",")), serving("smollm2", tmp_path, cache_dir, *options) as server:
        yield server


def on(server: Server, ask: Callable[[aiohttp.ClientSession, Ledger], Awaitable[None]]) -> None:
    """Run an asynchronous part of a test with a client of its own."""

    async def run() -> None:
        async with session() as http:
            await ask(http, Ledger(http, server.url))

    asyncio.run(run())


def until_idle(server: Server) -> None:
    """Wait until heartbeats say that nobody runs a stream: what they say of an earlier one is no news of the next."""
    wait_until(lambda: not any(w["num_running"] for w in server.workers()), 10.0, "idle workers")


def busy_pid(server: Server) -> int:
    """Return the process of the one decode worker that runs the only stream, once its heartbeat has said so."""
    found: list[dict[str, Any]] = wait_until(
        lambda: [w for w in server.workers() if w["role"] == "decode" and w["num_running"]], 5.0, "a busy worker"
    )
    assert len(found) == 1
    return int(found[0]["pid"])


def flips(server: Server) -> tuple[int, int]:
    """Return how many bits were flipped, and how many pieces were found damaged."""
    log = server.log.read_bytes()
    return log.count(b"FLIPPED a bit"), log.count(b"arrived damaged (from")
