"""One server for all clients: colocated, with keys, two names and a low limit of unfinished requests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import openai
import pytest
import pytest_asyncio

from model.source import resolve
from tests.e2e.server import Server, serving

KEYS = {"sk-alice": "alice", "sk-bob": "bob", "sk-plain": ""}
MAX_NUM_REQUESTS = 8


@pytest.fixture(scope="session")
def server(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A router and one worker that runs both roles, with SmolLM2."""
    resolve("smollm2", cache_dir, print)
    folder = tmp_path_factory.mktemp("clients")
    keys = folder / "keys"
    keys.write_text("".join(f"{key} {tenant}\n" for key, tenant in KEYS.items()))
    names = ("--served-model-name", "smollm2", "--served-model-name", "gpt-4o-mini")
    access = ("--api-key-file", str(keys), "--allowed-origins", "*")
    limits = ("--max-num-requests", str(MAX_NUM_REQUESTS))
    with serving("smollm2", folder, cache_dir, "--mode", "colocated", *names, *access, *limits) as server:
        yield server


@pytest_asyncio.fixture
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's client, as users make it; it does not retry."""
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="sk-plain", max_retries=0) as client:
        yield client
