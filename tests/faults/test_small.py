"""A few trials of each kind in every run; `make faults` runs many more. A failing trial prints how to run it again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.client import session
from tests.e2e.server import Server, serving
from tests.faults.ledger import Record, Request
from tests.faults.trials import KINDS, NUM_DECODE, NUM_PREFILL, Outcome, Trial, run_trial

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.ucx, pytest.mark.slow]

REQUEST = Request("one", 3, 0.0, 0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("faults")
    with serving("smollm2", folder, cache_dir, "--decode", str(NUM_DECODE), "--prefill", str(NUM_PREFILL)) as running:
        yield running


@pytest.mark.parametrize("kind", KINDS)
def test_streams_go_on_token_for_token(server: Server, kind: str) -> None:
    async def trials() -> list[Outcome]:
        async with session() as http:
            return [await run_trial(server, http, Trial(kind, seed)) for seed in (1, 2)]

    outcomes = asyncio.run(trials())
    assert [(str(o.trial), o.faults) for o in outcomes if o.faults] == []
    assert any(o.was_struck for o in outcomes), "a fault that hits no stream shows nothing"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (Record(REQUEST, [1, 2, 3], num_ends=1, is_done=True), None),
        (Record(REQUEST, [1, 2], num_ends=1, is_done=True), "has 2 of 3 tokens"),
        (Record(REQUEST, [1, 2, 2, 3], num_ends=1, is_done=True), "differs at token 2"),
        (Record(REQUEST, [1, 9, 3], num_ends=1, is_done=True), "differs at token 1"),
        (Record(REQUEST, [1, 2, 3], num_ends=0), "0 terminal records, without"),
        (Record(REQUEST, [1, 2, 3], num_ends=2, is_done=True), "2 terminal records"),
        (Record(REQUEST, [1, 2, 3], errors=["error event: gone"], num_ends=1, is_done=True), "gone"),
    ],
)
def test_the_ledger_sees_what_is_lost_doubled_different_or_unended(record: Record, words: str | None) -> None:
    found = record.faults([1, 2, 3])
    assert found == [] if words is None else words in " ".join(found)
