"""The router benchmark: three real processes, every stream checked, and figures that add up."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path

import pytest

from bench import router
from bench.router import Case, Plan, Sample, run_once, table
from bench.router_clients import BadStream, check_stream
from bench.router_counter import Counter
from bench.router_process import cpu_time
from bench.router_profile import AREAS, REST, area_of, shares
from bench.router_workers import Sequences
from protocol.request import FinishReason, SamplingParams
from protocol.wire import Prefill, Reserve
from tests.router.tiny import byte_level_gguf

WORDS = ["ab", "c"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A GGUF file with a small vocabulary and no weights: all that a router needs."""
    return str(byte_level_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf"))


@pytest.mark.slow
async def test_a_run_measures_every_case_on_real_processes(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "WARM_TOKENS_PER_STREAM", 2)
    cases = (Case(3, 200.0), Case(5, 0.0))
    samples = await run_once(Plan(model, cases, num_runs=1, num_tokens=300, window_s=10.0, ahead=2))
    assert [sample.case for sample in samples] == list(cases)
    for sample in samples:
        assert sample.num_tokens >= 300 and 0 < sample.cpu_s <= sample.window_s * (os.cpu_count() or 1)
    assert samples[0].num_tokens / samples[0].window_s == pytest.approx(600, rel=0.5), "the rate that was asked for"
    assert samples[1].num_tokens / samples[1].window_s > 600, "saturated is faster than that"


@pytest.mark.slow
def test_the_command_prints_a_table_and_a_breakdown(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router, "WARM_TOKENS_PER_STREAM", 2)
    out = tmp_path / "samples.json"
    options = ["--streams=8", "--rates=0", "--runs=1", "--tokens=2000", "--breakdown", f"--json={out}"]
    assert router.main([f"--model={model}", *options]) == 0
    printed = capsys.readouterr().out
    (sample,) = json.loads(out.read_text())
    assert f"{sample['cpu_s'] / sample['num_tokens'] * 1e6:.1f}" in printed
    assert all(area in printed for area, _ in AREAS)
    *parts, together = [float(line.rsplit(maxsplit=1)[1]) for line in printed.strip().splitlines()[-len(AREAS) - 3 :]]
    assert sum(parts) == pytest.approx(together, abs=0.06 * len(parts)), "the parts add up"


# --- what a client accepts ---


def _answer(*events: bytes, head: bytes = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream") -> bytes:
    frames = (b"%x\r\n%b\r\n" % (len(event), event) for event in events)
    return head + b"\r\n\r\n" + b"".join(frames) + b"0\r\n\r\n"


def _event(text: str, finish: str | None = None) -> bytes:
    choice = {"delta": {"content": text}, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def test_a_whole_stream_is_counted() -> None:
    good = _answer(_event("ab"), _event("c") + _event("ab"), _event("c", "length") + DONE)
    assert check_stream(good, WORDS) == 4


@pytest.mark.parametrize(
    "answer",
    [
        _answer(_event("ab"), _event("ab", "length"), DONE),  # one is missing
        _answer(_event("ab"), _event("ab"), _event("c", "length"), DONE),  # one came twice
        _answer(_event("ab"), _event("c", "stop"), DONE),
        _answer(_event("ab"), _event("c", "length")),
        _answer(_event("ab"), _event("c", "length"), DONE)[:-9],
        _answer(_event("ab", "length"), DONE, head=b"HTTP/1.1 503 Service Unavailable"),
    ],
)
def test_a_stream_with_a_fault_is_refused(answer: bytes) -> None:
    with pytest.raises(BadStream):
        check_stream(answer, WORDS)


# --- what a worker sends ---


def test_each_step_has_the_next_token_of_every_sequence() -> None:
    sequences, sampling = Sequences(), SamplingParams(seed=0)
    sequences.token_ids = (7, 8, 9)
    for number in (1, 2):
        prefill = Prefill(
            request_id=number,
            transfer_id=number,
            epoch=0,
            decode_worker_id="d",
            prompt=(1,),
            sampling=sampling,
            deadline_s=1.0,
        )
        assert sequences.first(prefill).token_id == 7
        sequences.join(
            Reserve(
                request_id=number, transfer_id=number, epoch=0, prefill_worker_id="p", prompt=(1,), sampling=sampling
            )
        )
    assert [(row.request_id, row.index, row.token_id) for row in sequences.step()] == [(1, 1, 8), (2, 1, 8)]
    sequences.leave(1)
    assert [(row.request_id, row.index, row.token_id) for row in sequences.step()] == [(2, 2, 9)]
    (last,) = sequences.step(is_last=True)
    assert (last.index, last.token_id, last.finish_reason) == (3, 7, FinishReason.LENGTH)
    assert len(sequences) == 0 and sequences.num_sent == 6


# --- measuring ---


def test_the_counter_is_seen_by_another_process(tmp_path: Path) -> None:
    counter = Counter.create(tmp_path / "counter")
    code = "import sys; from pathlib import Path; from bench.router_counter import Counter as C; "
    code += "c = C(Path(sys.argv[1])); c.add(40); c.add(2)"

    async def other() -> int:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, str(tmp_path / "counter"))
        return await process.wait()

    assert asyncio.run(other()) == 0 and counter.value == 42
    counter.close()


def test_cpu_time_is_that_of_the_process_asked_for() -> None:
    before, began_s = cpu_time(os.getpid()), time.process_time()
    while time.process_time() - began_s < 0.05:
        pass
    after = cpu_time(os.getpid())
    assert after.all_s - before.all_s == pytest.approx(time.process_time() - began_s, abs=0.01)
    assert cpu_time(os.getppid()).all_s != pytest.approx(after.all_s, abs=1e-6)


def test_the_table_shows_the_median_and_the_range() -> None:
    case = Case(64, 30.0)
    samples = [Sample(case, 1000, 1.0, cpu_us / 1e3, 0.5, 0.001) for cpu_us in (30.0, 50.0, 40.0)]
    (line,) = table(samples).splitlines()[1:]
    assert line.split() == ["64", "16", "1000", "40.0", "30.0-50.0", "2560", "50%", "920", "1000", "3"]


def test_a_request_is_what_a_short_one_costs_without_its_tokens() -> None:
    sample = Sample(Case(64, 30.0), num_tokens=1000, window_s=1.0, cpu_s=0.040, user_share=0.5, short_s=0.0005)
    assert sample.us_per_token == pytest.approx(40.0)
    assert sample.us_per_request == pytest.approx(500.0 - 2 * 40.0)


def test_every_file_on_a_tokens_way_has_its_area() -> None:
    assert area_of("/x/router/dispatch.py:Dispatch.tokens") == "order, placement"
    assert area_of("/x/router/event_stream.py:EventStream.offer") == "write"
    assert area_of("/x/baton/cli.py:main") == REST
    found = shares({"/x/router/text.py:a": 1, "/x/router/tokenizer.py:b": 2, "/x/baton/cli.py:main": 1})
    assert found["detokenise, stop strings"] == 0.75 and found[REST] == 0.25
