"""Servers that several files share, as each start costs seconds. Tests leave them whole, and wait until they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.server import Server, serving

CLIENT_STALL_S = 8.0


@pytest.fixture(scope="session")
def one_pair(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[Server]:
    """What `make serve` runs, one prefill and one decode worker; a client that does not read is cut soon."""
    folder = tmp_path_factory.mktemp("one-pair")
    with serving("smollm2", folder, cache_dir, "--client-stall-s", str(CLIENT_STALL_S)) as running:
        yield running


@pytest.fixture(scope="session")
def two_decodes(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[Server]:
    """One prefill and two decode workers."""
    with serving("smollm2", tmp_path_factory.mktemp("two-decodes"), cache_dir, "--decode", "2") as running:
        yield running
