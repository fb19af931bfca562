"""The generator against a server that streams in this process: who is sent what, when, and what is written down."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from bench.client import Budgets
from bench.generator import Listener, run_workload
from bench.records import Record, Run, Slo
from bench.servers import Server, base_url, reach
from bench.window import Progress
from bench.workloads.closed import Closed
from bench.workloads.hiring import Hiring
from bench.workloads.interference import Interference
from bench.workloads.jobsearch import JobSearch
from bench.workloads.plan import Ask
from protocol.errors import ConfigError
from tests.bench.openai_server import GAP_S, OpenAiServer, count_tokens, openai_server

CLOSED = Closed(concurrency=3, requests=8, prompt_tokens=20, output_tokens=6)
NUM_PROBES = 2
STREAMS = Interference(
    streams=3,
    steady_prompt_tokens=10,
    steady_output_tokens=30,
    long_tokens=60,
    every_s=0.2,
    window_s=0.6,
    settle_s=0.05,
    drain_s=5.0,
)


class Notebook(Listener):
    """Writes down what a generator says."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.progressed: list[Progress] = []
        self.prompts: list[tuple[Ask, str]] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, what: str, progress: Progress) -> None:
        self.progressed.append(progress)

    def prompt(self, server: Server, ask: Ask, text: str) -> None:
        self.prompts.append((ask, text))


@pytest.fixture
async def server() -> AsyncIterator[OpenAiServer]:
    async with openai_server() as server:
        yield server


def target(server: OpenAiServer, model: str = "plain", extra: Mapping[str, Any] | None = None) -> Server:
    """Return the server under a label."""
    return Server(server.url, model, "ours", extra_body=extra or {}, budgets=Budgets(silence_s=2.0))


def kinds(run: Run, kind: str) -> list[Record]:
    """Return measured records of one kind, in the order of sending."""
    return run.measured(kind)


# --- closed and open loops ---


async def test_a_closed_loop_answers_every_request_and_never_exceeds_its_streams(server: OpenAiServer) -> None:
    (run,) = await run_workload(CLOSED, target(server), 1)
    assert server.num_at_once == 3
    records = run.measured()
    assert [r.request_id for r in records] == [str(i) for i in range(8)]
    assert all(r.error is None and r.num_output_tokens == 6 and r.chunk_tokens == (1,) * 6 for r in records)
    assert all(r.num_prompt_tokens == r.planned_prompt_tokens == 20 for r in records)
    assert min(r.started_s for r in records) >= 0 and max(r.finished_s for r in records) <= run.duration_s
    assert run.duration_s >= 3 * 6 * GAP_S and run.client_cpu_s > 0 and run.client_lag_s >= 0
    assert (run.workload, run.server, run.model, run.seed, run.slo) == ("closed", "ours", "plain", 1, Slo())
    assert run.url == f"{server.url}/v1/completions" and run.parameters == CLOSED.parameters


async def test_warm_up_comes_before_the_window_and_does_not_count(server: OpenAiServer) -> None:
    (run,) = await run_workload(CLOSED, target(server), 1)
    warm = [r for r in run.records if r.is_warmup]
    assert len(warm) == 3 and all(r.finished_s <= 0 for r in warm)
    assert len(server.bodies) == NUM_PROBES + 3 + 8
    prompts = [body["prompt"] for body in server.bodies]
    assert len(set(prompts)) == len(prompts)


async def test_what_is_sent_is_greedy_and_of_an_exact_length(server: OpenAiServer) -> None:
    await run_workload(CLOSED, target(server), 1)
    body = server.bodies[-1]
    assert (body["temperature"], body["ignore_eos"], body["max_tokens"], body["stream"]) == (0, True, 6, True)
    assert body["stream_options"]["include_usage"] is True


async def test_extra_fields_are_added_and_null_takes_one_away(server: OpenAiServer) -> None:
    extra = {"ignore_eos": None, "generation_config": '{"eos_token_id": -1}', "temperature": 1}
    await run_workload(CLOSED, target(server, extra=extra), 1)
    assert "ignore_eos" not in server.bodies[-1]
    assert server.bodies[-1]["generation_config"] == '{"eos_token_id": -1}' and server.bodies[-1]["temperature"] == 1


async def test_an_open_loop_sends_when_requests_are_due(server: OpenAiServer) -> None:
    workload = JobSearch(rate=40.0, requests=20, output_tokens=20)
    (run,) = await run_workload(workload, target(server), 5)
    records = run.measured()
    assert len(records) == 20 and run.slo == JobSearch.slo
    late_s = sorted(r.started_s - (r.planned_s or 0.0) for r in records)
    assert late_s[0] >= 0 and late_s[10] < 0.05
    # Answers take 100 ms and requests come every 25 ms: they overlap, as they do not in a closed loop.
    assert server.num_at_once > 2


async def test_hiring_sends_the_shared_beginning_again_and_again(server: OpenAiServer) -> None:
    workload = Hiring(jobs=2, candidates=8).scaled(20)
    (run,) = await run_workload(workload, target(server), 1)
    prompts = [body["prompt"] for body in server.bodies if body["max_tokens"] == 50]
    assert len(prompts) == 8 and len({text[:300] for text in prompts}) == 2
    assert all(r.num_prompt_tokens == r.planned_prompt_tokens for r in run.measured())


# --- failures and remarks ---


async def test_nothing_is_remarked_on_where_all_is_well(server: OpenAiServer) -> None:
    notebook = Notebook()
    await run_workload(CLOSED, target(server), 1, listener=notebook)
    assert notebook.lines == []


async def test_a_server_that_fails_a_probe_is_not_measured(server: OpenAiServer) -> None:
    with pytest.raises(ConfigError, match="refused a probe: the worker is gone"):
        await run_workload(CLOSED, target(server, "error-event"), 1)


async def test_requests_that_fail_under_load_keep_their_reason(server: OpenAiServer) -> None:
    notebook = Notebook()
    workload = Closed(concurrency=2, requests=4, prompt_tokens=20, output_tokens=400)
    impatient = replace(target(server), budgets=Budgets(request_s=0.3))
    (run,) = await run_workload(workload, impatient, 1, listener=notebook)
    assert [r.error for r in run.measured()] == ["gave up waiting: the request's budget is spent"] * 4
    assert all(r.chunk_s and len(r.chunk_s) == len(r.chunk_tokens) for r in run.measured())
    assert "4 requests failed" in notebook.lines[-1]


async def test_a_server_that_refuses_a_field_is_told_in_one_line(server: OpenAiServer) -> None:
    with pytest.raises(ConfigError, match=r"ours at http.* refused a probe: HTTP 422: .*unknown field ignore_eos"):
        await run_workload(CLOSED, target(server, "refuses"), 1)


async def test_a_server_that_is_not_there_is_told_in_one_line() -> None:
    with pytest.raises(ConfigError, match="ours at http://127.0.0.1:9 cannot be reached: Connect call failed"):
        await run_workload(CLOSED, Server("http://127.0.0.1:9", "m", "ours"), 1)


async def test_the_model_is_the_servers_first_where_none_is_named(server: OpenAiServer) -> None:
    assert (await reach(Server(server.url, "", "ours"))).model == "plain"


@pytest.mark.parametrize("text", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_addresses_may_be_written_in_several_ways(text: str) -> None:
    assert base_url(text) == "http://h:1"


async def test_answers_that_end_early_are_remarked_on(server: OpenAiServer) -> None:
    notebook = Notebook()
    await run_workload(CLOSED, target(server, extra={"max_tokens": 2}), 1, listener=notebook)
    assert "8 answers are shorter than asked for" in notebook.lines[-1]


# --- calibration ---


async def test_a_servers_constant_is_taken_off_and_lengths_stay_exact(server: OpenAiServer) -> None:
    notebook = Notebook()
    (run,) = await run_workload(CLOSED, replace(target(server), api="chat"), 1, listener=notebook)
    assert "adds 12 tokens to a prompt" in notebook.lines[0]
    assert all(r.num_prompt_tokens == r.planned_prompt_tokens == 20 for r in run.measured())
    assert run.url.endswith("/v1/chat/completions")


async def test_another_tokenizer_is_corrected_for_and_both_counts_are_kept(server: OpenAiServer) -> None:
    notebook = Notebook()
    workload = Closed(concurrency=2, requests=4, prompt_tokens=200, output_tokens=2)
    (run,) = await run_workload(workload, target(server, "half-words"), 1, listener=notebook)
    assert "1.500 tokens of a word" in notebook.lines[0]
    assert all(r.planned_prompt_tokens == 200 for r in run.measured())
    assert all(abs((r.num_prompt_tokens or 0) - 200) <= 2 for r in run.measured())
    assert count_tokens(server.bodies[-1]["prompt"]) == 130


async def test_a_server_that_counts_nothing_is_taken_as_it_is(server: OpenAiServer) -> None:
    notebook = Notebook()
    (run,) = await run_workload(CLOSED, target(server, "no-usage"), 1, listener=notebook)
    assert "counts no prompt tokens" in notebook.lines[0]
    assert all(r.num_prompt_tokens is None and r.num_output_tokens == 6 for r in run.measured())


# --- interference ---


async def test_both_phases_keep_their_streams_running_to_the_end(server: OpenAiServer) -> None:
    alone, beside = await run_workload(STREAMS, target(server), 1)
    assert (alone.parameters["phase"], beside.parameters["phase"]) == ("alone", "arrivals")
    assert not kinds(alone, "arrival") and len(kinds(beside, "arrival")) == 3
    for run in (alone, beside):
        steady = kinds(run, "steady")
        assert len(steady) > 3, "streams that ended were started again"
        for at_s in (0.1, 0.3, 0.55):
            assert sum(r.started_s <= at_s <= r.finished_s for r in steady) >= 2
        assert sum(r.finished_s >= 0.6 for r in steady) >= 3, "all of them ran when the time was over"
        assert all(r.error is None for r in run.records) and 0.6 <= run.duration_s < 2
    assert [r.planned_s for r in kinds(beside, "arrival")] == pytest.approx([0.1, 0.3, 0.5])


async def test_streams_run_before_the_window_opens(server: OpenAiServer) -> None:
    alone, _ = await run_workload(replace(STREAMS, steady_output_tokens=400), target(server), 1)
    begun = [r for r in kinds(alone, "steady") if r.started_s < 0]
    assert len(begun) == 3 and all(r.chunk_s[0] < 0 for r in begun)


async def test_the_last_gap_is_seen_to_its_end(server: OpenAiServer) -> None:
    """The window closes in the middle of a gap of 600 ms: all of it counts."""
    workload = replace(STREAMS, streams=2, steady_output_tokens=300, window_s=0.1, settle_s=0.0, every_s=0.05)
    # Its third token takes 600 ms, the window closes 100 ms after all streams have had their first.
    alone, _ = await run_workload(workload, target(server, "jittery"), 1)
    assert alone.duration_s > 0.4
    assert all(max(r.gaps_s) > 0.59 and len(r.chunk_s) == 3 for r in kinds(alone, "steady"))


async def test_a_gap_that_outlasts_every_budget_still_counts(server: OpenAiServer) -> None:
    workload = replace(STREAMS, streams=1, steady_output_tokens=300, window_s=0.1, settle_s=0.0, drain_s=0.3)
    quiet = replace(target(server, extra={"model": "stalls-later"}), budgets=Budgets())
    alone, _ = await run_workload(workload, quiet, 1)
    (record,) = kinds(alone, "steady")
    assert record.error is None and record.chunk_tokens == (1, 1, 0)
    assert 0.3 <= record.gaps_s[-1] < 2 and record.num_output_tokens == 2


async def test_an_arrival_that_is_never_answered_is_an_error(server: OpenAiServer) -> None:
    workload = replace(STREAMS, long_output_tokens=5000, drain_s=0.2)
    _, beside = await run_workload(workload, target(server), 1)
    assert {r.error for r in kinds(beside, "arrival")} == {"not answered within 0.2 s after the window"}
    assert all(r.error is None for r in kinds(beside, "steady"))


async def test_streams_that_are_refused_are_records_and_not_thousands(server: OpenAiServer) -> None:
    workload = replace(STREAMS, steady_output_tokens=1000)
    alone, _ = await run_workload(workload, target(server, "refuses-later"), 1)
    assert all("HTTP 422" in (r.error or "") for r in kinds(alone, "steady"))
    assert len(server.bodies) < 30


# --- what the caller hears, and leaving ---


async def test_prompts_are_published_as_they_are_sent(server: OpenAiServer) -> None:
    notebook = Notebook()
    await run_workload(CLOSED, target(server), 1, listener=notebook)
    assert {text for _, text in notebook.prompts} == {body["prompt"] for body in server.bodies[NUM_PROBES:]}
    assert notebook.progressed[-1].num_done == notebook.progressed[-1].num_total == 8


async def test_equal_seeds_send_equal_prompts_and_others_do_not(server: OpenAiServer) -> None:
    books = [Notebook(), Notebook(), Notebook()]
    for seed, book in zip((1, 1, 2), books, strict=True):
        await run_workload(CLOSED, target(server), seed, listener=book)
    first, again, other = ([text for _, text in book.prompts] for book in books)
    assert first == again and not set(first) & set(other)


async def test_cancelling_a_run_leaves_no_request_behind(server: OpenAiServer) -> None:
    task = asyncio.create_task(run_workload(replace(STREAMS, window_s=60.0), target(server), 1))
    while server.num_running < 3 or len(server.bodies) < NUM_PROBES + 4 + 3:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    while server.num_running:
        await asyncio.sleep(0.01)
