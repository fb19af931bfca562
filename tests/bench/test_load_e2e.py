"""`baton bench` against a real `baton serve`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.cli import main
from bench.records import load
from tests.e2e.server import Server, serving

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving("smollm2", tmp_path_factory.mktemp("bench"), cache_dir, "--mode", "colocated") as server:
        yield server


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_real_server_counts_as_planned_and_streams_token_by_token(server: Server, tmp_path: Path, api: str) -> None:
    out = tmp_path / "runs.json"
    sizes = ["--requests", "4", "--concurrency", "2", "--prompt-tokens", "64", "--output-tokens", "12"]
    assert main(["bench", "closed", "--url", server.url, "--api", api, *sizes, "--json", str(out)]) == 0
    (run,) = load(out).runs
    records = run.measured()
    assert run.model == "smollm2" and len(records) == 4
    for record in records:
        assert record.num_prompt_tokens == record.planned_prompt_tokens == 64
        assert record.num_output_tokens == 12 == sum(record.chunk_tokens)
        assert len(record.chunk_s) >= 10 and record.error is None
        assert record.ttft_s is not None and 0 < record.ttft_s < record.e2e_s
