"""What the workloads plan: lengths, arrivals, shared beginnings, and never the same text twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.records import Slo
from bench.text import JUDGE, Writer
from bench.traces import Arrival, read_trace
from bench.workloads.catalog import WORKLOADS
from bench.workloads.closed import Closed
from bench.workloads.hiring import Hiring
from bench.workloads.interference import Interference
from bench.workloads.jobsearch import JobSearch
from bench.workloads.plan import Ask, ClosedLoop, OpenLoop, SteadyStreams, Workload
from bench.workloads.trace import Trace
from protocol.errors import ConfigError
from tests.bench.openai_server import count_tokens

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2225670,879,55
"""
MOONCAKE = """{"timestamp": 3000, "input_length": 1200, "output_length": 500, "hash_ids": [0, 1, 2]}
{"timestamp": 1000, "input_length": 1100, "output_length": 490, "hash_ids": [0, 1, 9]}
{"timestamp": 4000, "input_length": 30, "output_length": 1, "hash_ids": [5]}
"""


@pytest.fixture
def azure(tmp_path: Path) -> Path:
    path = tmp_path / "azure"
    path.write_text(AZURE)
    return path


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    path = tmp_path / "mooncake"
    path.write_text(MOONCAKE)
    return path


def asks_of(workload: Workload, seed: int = 1) -> tuple[Ask, ...]:
    """Return the requests of a workload with one plan."""
    (plan,) = workload.plans(seed)
    assert not isinstance(plan, SteadyStreams)
    return plan.asks


def prompt_of(ask: Ask) -> str:
    """Return the text of a request, whose length is checked on the way."""
    text = Writer().write(ask.parts)
    assert count_tokens(text) == ask.prompt_tokens
    return text


# --- traces ---


def test_an_azure_trace_is_recognised_and_read(azure: Path) -> None:
    first, second, third = read_trace(azure)
    assert first == Arrival(0.0, 374, 44)
    assert second.at_s == pytest.approx(4.314579, abs=1e-6) and (second.prompt_tokens, third.output_tokens) == (396, 55)


def test_a_mooncake_trace_is_recognised_read_and_put_in_order(mooncake: Path) -> None:
    assert read_trace(mooncake) == [
        Arrival(0.0, 1100, 490, (0, 1, 9)),
        Arrival(2.0, 1200, 500, (0, 1, 2)),
        Arrival(3.0, 30, 1, (5,)),
    ]
    assert len(read_trace(mooncake, limit=2)) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "neither"),
        ("a,b\n1,2\n", "neither"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
        (AZURE + "yesterday,1,2\n", "line 5"),
        (AZURE + "2023-11-16 18:15:46\n", "line 5"),
        (MOONCAKE + '{"timestamp": 1}\n', "line 4"),
        (MOONCAKE + "{\n", "line 4"),
    ],
)
def test_what_is_no_trace_is_told_with_its_line(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "trace"
    path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_trace(path)


def test_a_missing_trace_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the trace"):
        read_trace(tmp_path / "none")


def test_equal_ids_become_equal_text(mooncake: Path) -> None:
    first, second, third = (prompt_of(ask) for ask in asks_of(Trace(mooncake)))
    shared = 2 * 512
    begin = Writer().write(asks_of(Trace(mooncake))[0].parts[:2])
    assert count_tokens(begin) == shared and first.startswith(begin) and second.startswith(begin)
    assert first[len(begin) :][:40] != second[len(begin) :][:40]
    assert count_tokens(third) == 30


@pytest.mark.parametrize("length_scale", [1.0, 0.3, 0.1, 0.01, 0.001, 2.0])
def test_a_trace_keeps_scaled_lengths_and_times(mooncake: Path, length_scale: float) -> None:
    asks = asks_of(Trace(mooncake, length_scale=length_scale, time_scale=0.5))
    assert [ask.prompt_tokens for ask in asks] == [max(1, round(n * length_scale)) for n in (1100, 1200, 30)]
    assert [ask.output_tokens for ask in asks] == [max(1, round(n * length_scale)) for n in (490, 500, 1)]
    assert [ask.due_s for ask in asks] == [0.0, 1.0, 1.5]
    for ask in asks:
        prompt_of(ask)


def test_requests_that_are_too_long_are_left_out(azure: Path) -> None:
    assert [ask.prompt_tokens for ask in asks_of(Trace(azure, longest_tokens=506))] == [374, 396][:2]
    assert [ask.prompt_tokens for ask in asks_of(Trace(azure, longest_tokens=420))] == [374]
    with pytest.raises(ConfigError, match="longest-tokens"):
        Trace(azure, longest_tokens=5).plans(1)


# --- the others ---


def test_closed_has_exact_lengths() -> None:
    (plan,) = Closed(concurrency=3, requests=7, prompt_tokens=50, output_tokens=9).plans(1)
    assert isinstance(plan, ClosedLoop) and plan.concurrency == 3 and len(plan.asks) == 7
    assert {ask.output_tokens for ask in plan.asks} == {9} and {ask.prompt_tokens for ask in plan.asks} == {50}
    assert len({prompt_of(ask) for ask in plan.asks}) == 7


def test_hiring_shares_few_jobs_among_many_candidates() -> None:
    asks = asks_of(Hiring(jobs=3, candidates=200))
    lengths = [ask.prompt_tokens for ask in asks]
    assert min(lengths) >= 2000 and max(lengths) <= 8000 and max(lengths) - min(lengths) > 4000
    assert {ask.output_tokens for ask in asks} == {1000}
    prompts = [prompt_of(ask) for ask in asks[:20]]
    begins = {text[:4000] for text in prompts}
    assert len(begins) == 3 and len(set(prompts)) == 20
    assert all(text.endswith(JUDGE[-30:].replace(" ,", ",").replace(" :", ":")) for text in prompts)


def test_hiring_with_a_rate_is_an_open_loop() -> None:
    (plan,) = Hiring(rate=2.0, candidates=10).plans(1)
    assert isinstance(plan, OpenLoop) and all(ask.due_s is not None for ask in plan.asks)


def test_job_searches_are_short_arrive_at_random_and_have_a_target() -> None:
    asks = asks_of(JobSearch(rate=4.0, requests=2000))
    assert min(ask.prompt_tokens for ask in asks) == 60 and max(ask.prompt_tokens for ask in asks) == 120
    dues = [ask.due_s or 0.0 for ask in asks]
    assert dues == sorted(dues) and dues[-1] == pytest.approx(500, rel=0.1)
    gaps = [b - a for a, b in zip(dues, dues[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert spread == pytest.approx(mean, rel=0.1), "a Poisson process"
    assert JobSearch.slo == Slo(e2e_s=0.6)
    prompt_of(asks[0])


def test_interference_has_a_phase_alone_and_one_with_arrivals() -> None:
    alone, beside = Interference(window_s=40, every_s=10, long_tokens=300).plans(1)
    assert isinstance(alone, SteadyStreams) and isinstance(beside, SteadyStreams)
    assert (alone.phase, alone.arrivals, beside.phase) == ("alone", (), "arrivals")
    assert [ask.due_s for ask in beside.arrivals] == [5, 15, 25, 35]
    assert {(ask.kind, ask.prompt_tokens) for ask in beside.arrivals} == {("arrival", 300)}


def test_steady_streams_end_at_different_times() -> None:
    plan, _ = Interference(streams=4, steady_output_tokens=1000).plans(1)
    assert isinstance(plan, SteadyStreams)
    assert [plan.steady(i).output_tokens for i in range(6)] == [250, 500, 750, 1000, 1000, 1000]
    assert {plan.steady(i).kind for i in range(6)} == {"steady"}


def test_no_text_is_ever_sent_twice_in_one_go() -> None:
    workloads: list[Workload] = [
        Closed(concurrency=1, requests=4, prompt_tokens=40),
        Closed(concurrency=4, requests=4, prompt_tokens=40),
        Interference(long_tokens=40, steady_prompt_tokens=40),
    ]
    asks: list[Ask] = []
    for workload in workloads:
        for seed in (1, 2):
            asks += workload.warmup(seed)
            for plan in workload.plans(seed):
                asks += [*plan.arrivals, *map(plan.steady, range(8))] if isinstance(plan, SteadyStreams) else plan.asks
    assert len({prompt_of(ask)[:80] for ask in asks}) == len(asks)


def test_the_same_seed_makes_the_same_prompts() -> None:
    first, again, other = (asks_of(Hiring(candidates=5), seed) for seed in (3, 3, 4))
    assert first == again and [ask.parts for ask in first] != [ask.parts for ask in other]


def test_scale_divides_lengths_and_nothing_else(azure: Path) -> None:
    assert Hiring().scaled(16) == replace(
        Hiring(), job_tokens=94, prompt_min_tokens=125, prompt_max_tokens=500, output_tokens=62
    )
    assert Closed(output_tokens=4).scaled(100) == Closed(output_tokens=1, prompt_tokens=5)
    assert Trace(azure).scaled(4).length_scale == 0.25


@pytest.mark.parametrize("kind", WORKLOADS.values(), ids=lambda kind: kind.name)
def test_a_run_can_record_every_setting(kind: type[Workload], azure: Path) -> None:
    workload = kind(path=azure) if kind is Trace else kind()
    assert all(isinstance(value, int | float | str) for value in workload.parameters.values())
    assert str(azure.parent) not in workload.stem(1), "the same trace elsewhere gives the same prompts"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"concurrency": 0}, "--concurrency: must be at least 1"),
        ({"prompt_tokens": -5}, "--prompt-tokens"),
        ({"requests": 0}, "--requests"),
    ],
)
def test_settings_out_of_bounds_are_told(settings: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Closed(**settings)


def test_a_rate_that_is_no_number_is_told() -> None:
    with pytest.raises(ConfigError, match="--rate"):
        JobSearch(rate=float("nan"))
