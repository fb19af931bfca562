"""A few faults of each kind in every run; `make faults` runs many more. What fails prints how to run it again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pytest

from tests.e2e.client import session
from tests.e2e.server import Server, serving
from tests.faults import campaign, disconnects, everything, grammars, rolling, unread
from tests.faults.__main__ import COMMANDS, parser
from tests.faults.campaign import Round
from tests.faults.footprints import Footprint, Sample, Watch, slope_of
from tests.faults.ledger import Ledger, Record, Request
from tests.faults.load import Oracles, draw_pool
from tests.faults.overload import meets_slo
from tests.faults.phases import Cluster
from tests.faults.trials import NUM_DECODE, NUM_PREFILL, Trial, run_trial

REQUEST = Request("one", 3, 0.0, 0)
POOL = draw_pool(1, 8, (48, 96))

Oracle = dict[Request, list[int]]
Report = TypeVar("Report")


def end_to_end(test: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a test that runs a server."""
    for mark in (pytest.mark.e2e, pytest.mark.model, pytest.mark.ucx, pytest.mark.slow):
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("faults")
    options = ("--decode", str(NUM_DECODE), "--prefill", str(NUM_PREFILL), "--client-stall-s", f"{unread.STALL_S:g}")
    with serving("smollm2", folder, cache_dir, *options) as running:
        yield running


@pytest.fixture(scope="module")
def oracles(server: Server) -> Oracle:
    """What the pool answers, asked before the first fault."""

    async def ask() -> Oracle:
        async with session() as http:
            return await Oracles().ask(Ledger(http, server.url), POOL)

    return asyncio.run(ask())


async def on_cluster(server: Server, work: Callable[[Cluster, Ledger], Awaitable[Report]]) -> Report:
    async with aiohttp.ClientSession() as http:
        cluster = Cluster(server, http, {"decode": NUM_DECODE, "prefill": NUM_PREFILL})
        return await work(cluster, Ledger(http, server.url))


@end_to_end
@pytest.mark.parametrize("kind", campaign.ROUND_KINDS)
async def test_streams_go_on_token_for_token_under_faults(server: Server, oracles: Oracle, kind: str) -> None:
    what = Round(kind, 1, num_faults=2, width=4)
    report = await on_cluster(server, lambda cluster, ledger: campaign.run_round(cluster, ledger, oracles, what))
    assert report.faults == [], f"again by: {what}"
    assert report.num_faults >= 2 and report.num_streams > 0
    assert report.num_hits or kind.startswith("prefill"), "a fault that hits no stream shows nothing"


@end_to_end
async def test_clients_that_do_not_read_are_let_go_and_nobody_else_notices(server: Server) -> None:
    report = await on_cluster(server, lambda cluster, ledger: unread.run(cluster, ledger, 2, 12, lambda _: None))
    assert report.faults == [], "again by: python -m tests.faults unread 12 --seed 2"
    assert report.num_streams > 0 and report.asked.total() == 12


@end_to_end
async def test_a_single_trial_strikes_and_is_fine(server: Server) -> None:
    async with session() as http:
        outcomes = [await run_trial(server, http, Trial("decode-kill", seed)) for seed in (1,)]
    assert [(str(o.trial), o.faults) for o in outcomes if o.faults] == []
    assert any(o.was_struck for o in outcomes), "a fault that hits no stream shows nothing"


@end_to_end
async def test_clients_that_leave_hold_nothing_afterwards(server: Server) -> None:
    report = await on_cluster(server, lambda cluster, ledger: disconnects.run(cluster, ledger, 1, 60, print))
    assert report.faults == []
    assert sum(report.num_left.values()) + report.num_finished + report.num_refused == 48 + 12
    assert len(report.num_left) > 1, "all left in one phase"
    assert report.rest_s is not None


@end_to_end
async def test_rolling_restarts_are_not_seen(server: Server, oracles: Oracle) -> None:
    report = await on_cluster(server, lambda cluster, ledger: rolling.run(cluster, ledger, oracles, 1, 40, print))
    assert report.faults == []
    assert report.num_restarts > 0


@end_to_end
async def test_hostile_grammars_end_by_themselves_and_change_nothing_for_others(one_pair: Server) -> None:
    async with aiohttp.ClientSession() as http:
        cluster = Cluster(one_pair, http, {"decode": 1, "prefill": 1})
        report = await grammars.run(cluster, Ledger(http, one_pair.url), one_pair, 1, 1, print, num_tokens=160)
    # A machine that others use, too, tells nothing of 1.2x; what was to be ended here took 60x.
    report.weigh(4.0, 6.0)
    assert report.faults == [], report.summary()
    assert sum(report.ends.values()) > 2, report.summary()


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


@pytest.mark.parametrize(
    ("record", "is_allowed"),
    [
        (Record(REQUEST, [1, 2], errors=["error event: gone"], num_ends=1), True),
        (Record(REQUEST, [], errors=["HTTP 503: none"], num_ends=1), True),
        (Record(REQUEST, [1, 9], errors=["error event: gone"], num_ends=1), False),
        (Record(REQUEST, [1, 2], errors=["error event: gone", "error event: gone"], num_ends=2), False),
        (Record(REQUEST, [1, 2], errors=["connection: reset"]), False),
        (Record(REQUEST, [1, 2]), False),
        (Record(REQUEST, [1, 2], errors=["HTTP 500: bug"], num_ends=1), False),
    ],
)
def test_one_explicit_error_is_told_from_silence_and_from_wrong_tokens(record: Record, is_allowed: bool) -> None:
    assert record.is_explicit_failure([1, 2, 3]) is is_allowed


def test_the_gap_around_a_fault_is_the_longest_wait_that_overlaps_it() -> None:
    record = Record(REQUEST, [1, 2, 3, 4], times_s=[1.0, 1.1, 2.6, 9.0])
    assert record.gap_around_s(1.2, 1.5) == pytest.approx(1.5)
    assert record.gap_around_s(0.5, 0.9) is None


def test_a_stream_that_is_late_or_cut_misses_its_objectives() -> None:
    times_s = [1.0, 1.05, 1.1]
    whole = Record(REQUEST, [1, 2, 3], times_s=times_s, num_ends=1, is_done=True, begun_s=0.5)
    late = Record(REQUEST, [1, 2, 3], times_s=times_s, num_ends=1, is_done=True, begun_s=-2.0)
    cut = Record(REQUEST, [1, 2], times_s=times_s[:2], num_ends=1, is_done=True, begun_s=0.5)
    assert [meets_slo(record) for record in (whole, late, cut)] == [True, False, False]


def test_a_slope_is_told_from_noise_and_from_a_step() -> None:
    noise = [(37 * i * i) % 101 for i in range(400)]
    flat = slope_of([(25 * i, 1_000_000 + 50 * n) for i, n in enumerate(noise)])
    leak = slope_of([(25 * i, 1_000_000 + 50 * n + 400 * i) for i, n in enumerate(noise)])
    pages = slope_of([(25 * i, 4096 * (25 * i * 20 // 4096)) for i in range(400)])
    step = slope_of([(25 * i, 1_000_000 + 900_000 * (i > 170)) for i in range(400)])
    assert flat.is_flat and flat.low < 0 < flat.high
    assert not leak.is_flat and leak.low < 400 / 25 < leak.high
    assert not pages.is_flat and pages.low <= 20 <= pages.high, "20 bytes a request, a page at a time"
    assert step.is_flat and step.median == 0.0
    assert slope_of([]).is_flat


def test_steps_must_not_add_up() -> None:
    watch = Watch()
    for number in range(100):
        for name, step in (("small 1", 1 << 20), ("large 2", 9 << 20)):
            taken = Footprint((1 << 20) + step * (number > 60), 0, 10, 5, 1, 7)
            watch.samples.setdefault(name, []).append(Sample(100 * number, taken))
    watch.weigh(10_000, ["small", "large"])
    assert watch.faults == ["large 2 has 9.0 MiB more than when warm"]


def test_what_grows_is_named_and_what_dies_too() -> None:
    watch = Watch()
    for number in range(40):
        for name, grows in (("steady 1", 0), ("leaky 2", number)):
            taken = Footprint(1 << 20, 0, 10 + grows, 5, 1 + grows, 7 + grows)
            watch.samples.setdefault(name, []).append(Sample(100 * number, taken))
    watch.samples["dead 3"] = watch.samples["steady 1"][:5]
    watch.samples["dead 4"] = watch.samples["steady 1"][20:]
    watch.weigh(4000, ["steady", "leaky", "dead", "absent"])
    assert [fault for fault in watch.faults if fault.startswith("steady")] == []
    assert {word for fault in watch.faults if fault.startswith("leaky") for word in fault.split()} >= {
        "descriptors",
        "segments",
        "tasks",
    }
    assert {fault.split()[0] for fault in watch.faults if "did not live" in fault} == {"dead", "absent"}


def test_pools_follow_from_their_seed() -> None:
    assert draw_pool(3, 6, (8, 16)) == draw_pool(3, 6, (8, 16)) != draw_pool(4, 6, (8, 16))
    assert len(set(draw_pool(3, 60, (8, 16)))) == 60


def test_the_big_version_is_made_of_command_lines_that_exist() -> None:
    found = {name: parser().parse_args(words) for name, words in everything.plan(1000)}
    assert (found["decode-kills"].rounds * found["decode-kills"].faults, found["decode-kills"].kinds) == (
        1000,
        ["decode-kill"],
    )
    assert found["prefill-kills"].trials == 300
    assert found["other-kills"].rounds * found["other-kills"].faults == 100
    assert [found[name].number for name in ("disconnects", "unread", "rolling", "bits", "soak", "siege")] == [
        *(10000, 4000, 1000, 1000, 10000, 10000)
    ]
    assert found["overload"].seconds == 120.0 and found["grammars"].turns == 20
    assert {args.command for args in found.values()} == set(COMMANDS) - {"trials"}
    assert parser().parse_args(["all", "--trials", "5", "--only", "bits"]).only == ["bits"]


def test_a_campaign_that_is_wrong_or_cannot_run_fails_the_whole_and_the_others_run() -> None:
    asked, said = list[str](), list[str]()

    def perform(words: Sequence[str]) -> tuple[str, bool]:
        asked.append(words[0])
        if words[0] == "bits":
            raise OSError("no server")
        return f"{words[0]} as planned", words[0] == "soak"

    args = parser().parse_args(["all", "--trials", "1"])
    assert everything.run(args, perform, said.append) == 1
    assert asked == [words[0] for _, words in everything.plan(1)]
    wrong = [line.split()[1] for line in said[-1].splitlines() if line.startswith("WRONG")]
    assert wrong == ["bits,", "soak,"]
    assert everything.run(parser().parse_args(["all", "--only", "rolling"]), perform, said.append) == 0
