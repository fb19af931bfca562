"""Figures against values worked out by hand, and laws that hold for any run."""

from __future__ import annotations

import random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.figures import figures, met, quantiles, quantiles_by_time
from bench.records import Record, Slo
from tests.bench.scenes import record, run, stream


def test_percentiles_interpolate_between_neighbours() -> None:
    found = quantiles([n / 1000 for n in range(101)])
    assert found.num_values == 101
    assert (found.p50_ms, found.p90_ms, found.p95_ms, found.p99_ms, found.max_ms) == pytest.approx(
        (50, 90, 95, 99, 100)
    )
    assert quantiles([0.001, 0.003]).p50_ms == pytest.approx(2.0)


def test_nothing_measured_gives_none_rather_than_zero() -> None:
    f = figures(run([]))
    for each in (f.ttft, f.tpot, f.itl, f.itl_by_time, f.e2e, f.worst_gap):
        assert (each.num_values, each.p50_ms, each.max_ms) == (0, None, None)
    assert (f.num_requests, f.output_tokens_per_s, f.requests_per_s, f.goodput_per_s) == (0, 0.0, 0.0, None)


def test_latencies_of_two_streams() -> None:
    first = record([1.0, 1.1, 1.3], started_s=0.5)
    second = record([2.0, 2.4], started_s=0.0, finished_s=2.5)
    f = figures(run([first, second]))
    assert (f.ttft.p50_ms, f.ttft.max_ms) == pytest.approx((1250, 2000))
    assert f.itl.num_values == 3
    assert (f.itl.p50_ms, f.itl.max_ms) == pytest.approx((200, 400))
    assert (f.tpot.p50_ms, f.tpot.max_ms) == pytest.approx((275, 400))
    assert (f.e2e.p50_ms, f.e2e.max_ms) == pytest.approx((1650, 2500))
    assert (f.worst_gap.p50_ms, f.worst_gap.max_ms) == pytest.approx((300, 400))
    assert (f.num_prompt_tokens, f.num_output_tokens) == (16, 5)


def test_a_chunk_of_several_tokens_is_one_gap_and_as_many_tokens() -> None:
    f = figures(run([record([1.0, 1.4], chunk_tokens=(1, 4))]))
    assert f.itl.num_values == 1 and f.itl.p50_ms == pytest.approx(400)
    assert f.tpot.p50_ms == pytest.approx(100)


def test_rates_count_what_came_inside_the_window() -> None:
    inside = record([1.0, 2.0, 3.0])
    over_the_end = record([9.5, 10.0, 10.5, 11.0], started_s=9.0)
    before = record([-1.0, 0.0, 0.5], started_s=-2.0)
    f = figures(run([inside, over_the_end, before], duration_s=10.0))
    assert f.output_tokens_per_s == pytest.approx((3 + 2 + 2) / 10)
    assert f.requests_per_s == pytest.approx(2 / 10)
    assert f.num_output_tokens == 10


def test_gaps_that_end_before_the_window_are_warm_up_and_those_after_its_end_count() -> None:
    f = figures(run([record([-3.0, -1.0, 0.5, 0.7], started_s=-4.0), record([9.9, 14.9], started_s=9.0)]))
    assert f.itl.num_values == 3
    assert f.itl.max_ms == pytest.approx(5000) and f.itl.p50_ms == pytest.approx(1500)


def test_warm_up_and_other_kinds_are_left_out() -> None:
    warm = msgspec.structs.replace(record([5.0, 9.0]), is_warmup=True)
    steady = stream(0.0, 0.1, [0.02] * 10, kind="steady", request_id="s")
    arrival = stream(1.0, 0.9, [0.03], kind="arrival", request_id="a")
    whole = run([warm, steady, arrival], workload="interference")
    assert figures(whole).num_requests == 2
    assert figures(whole, "steady").ttft.max_ms == pytest.approx(100)
    assert figures(whole, "arrival").ttft.max_ms == pytest.approx(900)
    assert figures(whole, "arrival").itl.num_values == 1
    assert figures(whole, "missing").num_requests == 0


def test_one_stall_is_small_by_count_and_large_by_time() -> None:
    gaps = np.asarray([0.02] * 399 + [5.0])
    assert quantiles(gaps).p99_ms == pytest.approx(20)
    by_time = quantiles_by_time(gaps)
    assert (by_time.p50_ms, by_time.p90_ms, by_time.p99_ms, by_time.max_ms) == pytest.approx((20, 5000, 5000, 5000))


def test_percentiles_by_time_of_equal_gaps_and_of_none() -> None:
    assert quantiles_by_time(np.full(7, 0.01)).p99_ms == pytest.approx(10)
    assert quantiles_by_time(np.empty(0)).p50_ms is None
    assert quantiles_by_time(np.zeros(3)).max_ms == 0.0


def test_failures_count_as_missed_and_stay_out_of_latencies() -> None:
    slo = Slo(ttft_s=0.5, tpot_s=0.1)
    good = record([0.4, 0.45, 0.5])
    slow_start = record([0.9, 0.95])
    slow_tokens = record([0.3, 0.7])
    failed = record([0.1, 9.0], error="HTTP 500")
    f = figures(run([good, slow_start, slow_tokens, failed], slo=slo, duration_s=2.0))
    assert (f.num_requests, f.num_errors) == (4, 1)
    assert (f.attainment.ttft, f.attainment.tpot, f.attainment.every) == (0.5, 0.5, 0.25)
    assert (f.attainment.itl_p99, f.attainment.e2e) == (None, None)
    assert f.goodput_per_s == pytest.approx(0.5) and f.requests_per_s == pytest.approx(1.5)
    assert f.itl.max_ms == pytest.approx(400)


def test_a_bound_is_met_at_its_very_value_and_needs_a_first_token() -> None:
    slo = Slo(ttft_s=0.5, tpot_s=0.25, itl_p99_s=0.25, e2e_s=1.0)
    assert met(record([0.5, 0.75], finished_s=1.0), slo) == dict.fromkeys(("ttft", "tpot", "itl_p99", "e2e"), True)
    assert met(record([0.2], finished_s=0.2), slo)["tpot"]
    assert met(record([], finished_s=0.2), slo) == {"ttft": False, "tpot": True, "itl_p99": True, "e2e": True}
    assert met(record([0.5]), Slo()) == {}


def test_the_bound_on_gaps_looks_at_each_request_of_its_own() -> None:
    one_stall = stream(0.0, 0.1, [0.01] * 20 + [1.0], kind="request", request_id="r")
    rare_stall = stream(0.0, 0.1, [0.01] * 400 + [1.0], kind="request", request_id="r")
    slo = Slo(itl_p99_s=0.1)
    assert not met(one_stall, slo)["itl_p99"] and met(rare_stall, slo)["itl_p99"]


def test_without_bounds_there_is_no_attainment_and_no_goodput() -> None:
    f = figures(run([record([0.1, 0.2])]))
    assert f.attainment.every is None and f.goodput_per_s is None


def test_overhead_of_the_client_and_requests_that_left_late() -> None:
    late = [msgspec.structs.replace(record([9.0], started_s=n + 0.002 * n), planned_s=float(n)) for n in range(3)]
    f = figures(run([*late, record([1.0])], duration_s=4.0))
    assert f.client.cpu_share == pytest.approx(0.1) and f.client.lag_p99_ms == pytest.approx(1.2)
    assert f.client.sent_late_p99_ms == pytest.approx(3.96)
    assert figures(run([record([1.0])])).client.sent_late_p99_ms is None


def test_prompts_that_the_server_counted_otherwise_are_told() -> None:
    requests = [record([1.0], counted=n) for n in (8, 9, 5, None)]
    f = figures(run([*requests, record(counted=0, error="refused")]))
    assert (f.prompts.num_compared, f.prompts.num_mismatched, f.prompts.worst_tokens) == (3, 2, -3)
    assert f.num_prompt_tokens == 8 + 9 + 5 + 8


def test_a_window_of_no_length_divides_by_nothing() -> None:
    f = figures(run([record([0.0])], slo=Slo(ttft_s=1.0), duration_s=0.0))
    assert (f.output_tokens_per_s, f.requests_per_s, f.goodput_per_s, f.client.cpu_share) == (0, 0, 0, 0)


_STREAMS = st.lists(
    st.builds(
        lambda start, ttft, gaps, fails: record(
            np.cumsum([start + ttft, *gaps]).tolist(), started_s=start, error="no" if fails else None
        ),
        st.floats(-1, 9),
        st.floats(0, 2),
        st.lists(st.floats(0, 1), max_size=8),
        st.booleans(),
    ),
    max_size=8,
)
_LATENCIES = ("ttft", "tpot", "itl", "itl_by_time", "e2e", "worst_gap")


def _all_values(records: list[Record]) -> list[float]:
    f = figures(run(records, slo=Slo(ttft_s=1.0, tpot_s=0.3)))
    rates = [f.output_tokens_per_s, f.requests_per_s, f.attainment.every or 0.0, f.goodput_per_s or 0.0]
    return [*rates, *(getattr(f, name).p99_ms or 0.0 for name in _LATENCIES)]


@settings(max_examples=40, deadline=None)
@given(_STREAMS)
def test_percentiles_rise_and_lie_within_what_was_measured(records: list[Record]) -> None:
    f = figures(run(records, slo=Slo(ttft_s=1.0)))
    for name in _LATENCIES:
        q = getattr(f, name)
        if q.num_values:
            steps = [q.p50_ms, q.p90_ms, q.p95_ms, q.p99_ms, q.max_ms]
            assert all(b >= a - 1e-9 for a, b in zip(steps, steps[1:], strict=False))
    if f.itl.num_values:
        assert f.itl.max_ms == f.itl_by_time.max_ms == f.worst_gap.max_ms
        assert f.itl_by_time.num_values == f.itl.num_values
    assert (f.goodput_per_s or 0.0) <= f.requests_per_s
    assert f.attainment.every is None or f.attainment.every <= 1 - f.num_errors / f.num_requests + 1e-9


@settings(max_examples=40, deadline=None)
@given(_STREAMS, st.randoms(use_true_random=False))
def test_the_order_of_records_does_not_matter(records: list[Record], rng: random.Random) -> None:
    shuffled = rng.sample(records, len(records))
    assert _all_values(shuffled) == pytest.approx(_all_values(records))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(1e-4, 10), min_size=1, max_size=60))
def test_gaps_up_to_a_percentile_by_time_fill_that_share_of_the_time(gaps: list[float]) -> None:
    q, values = quantiles_by_time(np.asarray(gaps)), np.asarray(gaps)
    for percent, bound_ms in ((50, q.p50_ms), (90, q.p90_ms), (99, q.p99_ms)):
        assert bound_ms is not None
        up_to = values[values <= bound_ms / 1e3 * (1 + 1e-12)].sum()
        below = values[values < bound_ms / 1e3 * (1 - 1e-12)].sum()
        assert up_to >= percent / 100 * values.sum() - 1e-9 >= below - 2e-9
