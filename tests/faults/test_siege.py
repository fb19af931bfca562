"""Two tenants, kills and hostile clients for some seconds; `python -m tests.faults siege` goes on for longer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.e2e.server import serving
from tests.faults import siege
from tests.faults.besiegers import Ends, end_of
from tests.faults.ledger import Ledger, Record, Request
from tests.faults.load import Oracles
from tests.faults.phases import Cluster
from tests.faults.siege import Phase, SiegeReport

REQUEST = Request("one", 3, 0.0, 0)


@pytest.mark.e2e
@pytest.mark.model
@pytest.mark.ucx
@pytest.mark.slow
async def test_a_siege_costs_the_innocent_neither_tokens_nor_streams(tmp_path: Path, cache_dir: Path) -> None:
    options = ("--decode", "2", "--prefill", "2", "--num-kv-blocks", "600", *siege.options(tmp_path))
    with serving("smollm2", tmp_path, cache_dir, *options) as server:
        async with siege.session(siege.LARGE) as http:
            oracles = await Oracles().ask(Ledger(http, server.url), siege.pool(1, 10))
            cluster = Cluster(server, http, {"decode": 2, "prefill": 2})
            report = await siege.run(cluster, oracles, 1, 80, print)
    # A machine that others use, too, tells nothing of 1.3x.
    report.weigh(10.0, siege.SMALL_LONGEST_S)
    assert report.faults == [], report.summary()
    assert report.kinds and report.peace.num_streams > 0 and len(report.siege.small_ttfts_s) > 0, report.summary()
    assert {end.partition(":")[0].partition(" ")[0] for end in report.ends.counts} == {"grammar", "unread", "leaver"}


@pytest.mark.parametrize(
    ("record", "end", "is_fine"),
    [
        (Record(REQUEST, [1], num_ends=1, is_done=True), "finished", True),
        (Record(REQUEST, [1], errors=["error event: too dear"], num_ends=1), "error event", True),
        (Record(REQUEST, [], errors=["HTTP 400: too dear"], num_ends=1), "HTTP 400", True),
        (Record(REQUEST, [], errors=["HTTP 500: bug"], num_ends=1), "undefined", False),
        (Record(REQUEST, [1]), "undefined", False),
        (Record(REQUEST, [1], num_ends=1), "undefined", False),
        (Record(REQUEST, [1], errors=["error event: x", "error event: x"], num_ends=2), "undefined", False),
    ],
)
def test_the_ends_that_a_hostile_request_may_have(record: Record, end: str, is_fine: bool) -> None:
    found, fault = end_of(record)
    assert (found, fault is None) == (end, is_fine)


def test_a_siege_is_held_against_peace() -> None:
    def report(slow_s: float, ttft_s: float) -> SiegeReport:
        gaps = [0.010] * 98 + [slow_s] * 2
        return SiegeReport(Phase(100, [0.010] * 100), Phase(100, gaps, [0.1] * 18 + [ttft_s] * 2), ends=Ends(Counter()))

    for slow_s, ttft_s, words in ((0.012, 0.2, []), (0.014, 0.2, ["ITL grew to 1.40x"]), (0.012, 3.0, ["TTFT is 3.0"])):
        found = report(slow_s, ttft_s)
        found.weigh(siege.ITL_TARGET, siege.SMALL_P95_TARGET_S)
        assert len(found.faults) == len(words) and all(w in f for w, f in zip(words, found.faults, strict=True))


def test_innocent_requests_follow_from_their_seed_and_some_obey_a_pattern() -> None:
    drawn = siege.pool(3, 20)
    assert drawn == siege.pool(3, 20) != siege.pool(4, 20)
    assert sum(bool(request.regex) for request in drawn) == 4
