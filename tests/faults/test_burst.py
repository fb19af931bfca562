"""The first traffic of a server, and of a worker that has just come back; `python -m tests.faults burst` does more."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest

from tests.e2e.server import serving
from tests.faults import burst
from tests.faults.ledger import Ledger
from tests.faults.phases import Cluster

MAX_WAIT_S = 4.0


@pytest.mark.e2e
@pytest.mark.model
@pytest.mark.ucx
@pytest.mark.slow
async def test_a_burst_on_a_fresh_server_is_shed_and_a_small_client_is_served_beside_it(
    tmp_path: Path, cache_dir: Path
) -> None:
    with serving("smollm2", tmp_path, cache_dir, "--max-wait-s", str(MAX_WAIT_S)) as server:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            cluster = Cluster(server, http, {"decode": 1, "prefill": 1})
            report = await burst.run(cluster, Ledger(http, server.url), server.url, 1, 2, MAX_WAIT_S, print)
    assert report.faults == [], report.summary()
