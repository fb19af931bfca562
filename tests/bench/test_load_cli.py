"""`baton bench` as a user meets it: what it prints, writes and returns."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from rich.console import Console

from baton.cli import main
from bench.arguments import BenchCall, build_parser, workload_of
from bench.console import ConsoleListener
from bench.records import Slo, load
from bench.window import Progress
from bench.workloads.closed import Closed
from bench.workloads.interference import Interference
from protocol.errors import ConfigError
from tests.bench.openai_server import OpenAiServer, openai_server

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL_CLOSED = ["--requests", "4", "--concurrency", "2", "--prompt-tokens", "20", "--output-tokens", "5"]


@pytest.fixture
async def server() -> AsyncIterator[OpenAiServer]:
    async with openai_server() as server:
        yield server


async def bench(*arguments: str) -> int:
    """Run the command in a thread, while this loop serves."""
    return await asyncio.to_thread(main, ["bench", *arguments])


def call(*arguments: str) -> BenchCall:
    """Parse a command line."""
    return BenchCall.of(build_parser("x").parse_args(arguments))


# --- running it ---


async def test_a_run_prints_a_table_and_writes_json_html_and_prompts(
    server: OpenAiServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / "new" / f"out.{name}" for name in ("json", "html", "jsonl")}
    code = await bench(
        *("closed", "--url", server.url, *SMALL_CLOSED, "--seeds", "3,5", "--label", "ours", "--slo", "ttft=1,e2e=2"),
        *("--json", str(files["json"]), "--html", str(files["html"]), "--write-prompts", str(files["jsonl"])),
    )
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "ours" in said.out and "TTFT" in said.out and "Traceback" not in said.err
    runs = load(files["json"]).runs
    assert [run.seed for run in runs] == [3, 5] and {run.model for run in runs} == {"plain"}
    assert runs[0].slo == Slo(ttft_s=1, e2e_s=2) and len(runs[0].measured()) == 4
    assert files["html"].read_text().lstrip().lower().startswith("<!doctype html>")
    rows = [json.loads(line) for line in files["jsonl"].read_text().splitlines()]
    assert len(rows) == 2 * (4 + 2)
    assert {row["prompt"] for row in rows} <= {body["prompt"] for body in server.bodies}
    assert rows[-1]["planned_prompt_tokens"] == 20 and rows[-1]["max_tokens"] == 5


async def test_two_servers_take_turns_and_get_ratios(
    server: OpenAiServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with openai_server() as other:
        code = await bench(
            *("closed", "--compare", f"first={server.url}", f"second={other.url}/v1", *SMALL_CLOSED, "--runs", "2"),
            *("--extra-body", 'second={"ignore_eos": null}', "--json", str(tmp_path / "x.json")),
        )
        assert code == 0
        assert "ignore_eos" in server.bodies[-1] and "ignore_eos" not in other.bodies[-1]
        ours, theirs = (sorted(b["prompt"] for b in s.bodies) for s in (server, other))
        assert ours == theirs, "both get the same prompts"
    runs = load(tmp_path / "x.json").runs
    assert [(run.server, run.seed) for run in runs] == [("first", 1), ("second", 1), ("first", 2), ("second", 2)]
    assert "×" in capsys.readouterr().out


async def test_saved_runs_are_shown_again(
    server: OpenAiServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(tmp_path / f"{label}.json") for label in "ab"]
    for label, path in zip("ab", paths, strict=True):
        assert (
            await bench("closed", "--url", server.url, *SMALL_CLOSED, "--label", f"server-{label}", "--json", path) == 0
        )
    capsys.readouterr()
    assert main(["bench", "report", *paths, "--html", str(tmp_path / "both.html")]) == 0
    said = capsys.readouterr().out
    assert "server-a" in said and "server-b" in said and "×" in said
    assert "server-b" in (tmp_path / "both.html").read_text()


async def test_a_failed_request_gives_exit_code_1(server: OpenAiServer, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--requests", "2", "--concurrency", "2", "--prompt-tokens", "9", "--output-tokens", "200"]
    assert await bench("closed", "--url", server.url, "--model", "refuses-later", *options) == 1
    said = capsys.readouterr()
    assert "2 requests failed, the first with: HTTP 422" in said.err and "2 failed" in said.out


async def test_the_small_set_measures_a_running_server(
    server: OpenAiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = (
        Closed(concurrency=1, requests=2, prompt_tokens=8, output_tokens=3),
        Interference(streams=2, long_tokens=20, every_s=0.1, window_s=0.2, settle_s=0.0),
    )
    monkeypatch.setattr("bench.cli.SMALL", tiny)
    monkeypatch.chdir(tmp_path)
    assert await bench("small", "--url", server.url) == 0
    written = tmp_path / "bench-report" / "bench-report.json"
    assert [run.workload for run in load(written).runs] == ["closed", "interference", "interference"]
    assert len(written.with_suffix(".html").read_text()) > 1000


async def test_ctrl_c_keeps_what_was_measured(server: OpenAiServer, tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    options = ["closed", "--url", server.url, *SMALL_CLOSED, "--runs", "500", "--json", str(out)]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "baton", "bench", *options),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        while len(server.bodies) < 40:
            await asyncio.sleep(0.02)
        process.send_signal(signal.SIGINT)
        told, errors = await process.communicate()
    assert process.returncode == 130, errors
    assert 1 <= len(load(out).runs) < 500 and b"TTFT" in told and b"Traceback" not in errors


# --- what cannot be used ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["closed"], "--url or --compare"),
        (["closed", "--url", "localhost:8000"], "no address"),
        (["closed", "--url", "http://127.0.0.1:9"], "http://127.0.0.1:9 cannot be reached"),
        (["closed", "--url", "http://h", "--compare", "a=http://h", "b=http://h"], "one of the two"),
        (["closed", "--compare", "a=http://h"], "two or more"),
        (["closed", "--compare", "a=http://h", "a=http://g"], "different labels"),
        (["closed", "--compare", "http://h", "http://g"], "LABEL=URL"),
        (["closed", "--url", "http://h", "--concurrency", "0"], "--concurrency: must be at least 1"),
        (["closed", "--url", "http://h", "--concurrency", "x"], "--concurrency"),
        (["closed", "--url", "http://h", "--scale", "0"], "--scale"),
        (["closed", "--url", "http://h", "--runs", "0"], "--runs"),
        (["closed", "--url", "http://h", "--seeds", ","], "--seeds"),
        (["closed", "--url", "http://h", "--seeds", "1,2,1"], "each seed once"),
        (["closed", "--compare", "a=http://h", "b=http://g", "--label", "c"], "--label"),
        (["small", "--api", "grpc"], "completions, chat"),
        (["closed", "--url", "http://h", "--api", "grpc"], "completions, chat"),
        (["closed", "--url", "http://h", "--extra-body", "[1]"], "--extra-body"),
        (["closed", "--url", "http://h", "--slo", "speed=1"], "'speed' is none of ttft, tpot, itl_p99, e2e"),
        (["closed", "--url", "http://h", "--slo", "ttft=fast"], "expected seconds"),
        (["closed", "--url", "http://h", "--silence-s", "-1"], "--silence-s"),
        (["closed", "--url", "http://h", "--html", "/proc/none/x.html"], "cannot write /proc/none/x.html"),
        (["closed", "--url", "http://h", "--json", "/"], "cannot write /"),
        (["trace", "--url", "http://h"], "--path"),
        (["trace", "--url", "http://h", "--path", "/nonexistent"], "cannot read the trace /nonexistent"),
        (["report", "/nonexistent.json"], "cannot read /nonexistent.json"),
        (["dance"], "dance"),
        ([], "WORKLOAD"),
    ],
)
def test_what_cannot_be_used_is_one_clear_line_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["bench", *arguments])
    except SystemExit as left:
        code = int(left.code or 0)
    said = capsys.readouterr()
    assert code == 2 and not said.out
    assert words in said.err.splitlines()[-1] and "Traceback" not in said.err


def test_the_command_is_listed_and_has_help() -> None:
    for arguments, words in ((["--help"], "bench"), (["bench", "closed", "--help"], "--prompt-tokens")):
        done = subprocess.run(
            [sys.executable, "-m", "baton", *arguments],
            cwd=ROOT,
            env={**os.environ, "COLUMNS": "100"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert words in done.stdout


# --- what options come to ---


def test_runs_follow_on_from_the_seeds() -> None:
    assert call("closed", "--url", "http://h", "--seeds", "4,9", "--runs", "4").seeds == (4, 9, 10, 11)
    assert call("closed", "--url", "http://h", "--seeds", "4,9").seeds == (4, 9)
    assert call("closed", "--url", "http://h", "--runs", "3").seeds == (1, 2, 3)


def test_values_may_be_given_for_one_server() -> None:
    parsed = call(
        *("closed", "--compare", "a=http://h:1", "b=http://h:2"),
        *("--model", "both", "--model", "b=other", "--api", "a=chat", "--extra-body", '{"x": "a=1"}'),
    )
    a, b = parsed.servers
    assert (a.label, a.url, a.model, a.api) == ("a", "http://h:1", "both", "chat")
    assert (b.label, b.url, b.model, b.api) == ("b", "http://h:2", "other", "completions")
    assert a.extra_body == b.extra_body == {"x": "a=1"}


def test_options_reach_a_server_that_is_yet_to_be_started() -> None:
    parsed = call("small", "--api", "chat", "--extra-body", '{"seed": 1}', "--request-s", "9")
    assert parsed.needs_server
    (server,) = parsed.at("http://h:1").servers
    assert (server.label, server.url, server.api, server.extra_body) == ("baton", "http://h:1", "chat", {"seed": 1})
    assert server.budgets.request_s == 9 and not parsed.at("http://h:1").needs_server


def test_an_slo_bounds_what_it_names() -> None:
    parsed = call("closed", "--url", "http://h", "--slo", "ttft=0.5, tpot=0.05,itl_p99=0.1,e2e=3")
    assert parsed.slo == Slo(ttft_s=0.5, tpot_s=0.05, itl_p99_s=0.1, e2e_s=3)
    assert call("closed", "--url", "http://h").slo is None


def test_a_workloads_options_are_its_fields() -> None:
    parsed = build_parser("x").parse_args(["interference", "--url", "http://h", "--every-s", "2.5", "--scale", "10"])
    assert workload_of(parsed) == Interference(every_s=2.5, long_tokens=150, steady_prompt_tokens=3)


def test_a_setting_that_cannot_be_is_a_config_error() -> None:
    parsed = build_parser("x").parse_args(["interference", "--url", "http://h", "--window-s", "nan"])
    with pytest.raises(ConfigError, match="--window-s"):
        workload_of(parsed)


# --- the progress line ---

PROGRESS = Progress(num_sent=5, num_done=3, num_failed=1, num_total=8, num_tokens=200, elapsed_s=10.0)


def test_progress_is_one_line_that_renews_itself_on_a_terminal() -> None:
    out = io.StringIO()
    listener = ConsoleListener(Console(file=out, force_terminal=True, width=200))
    listener.progress("x closed seed 1", PROGRESS)
    listener.progress("x closed seed 1", PROGRESS)
    assert out.getvalue().count("x closed seed 1: 10 s, 3 of 8 done, 2 running, 1 failed, 20 tokens/s") == 2
    assert "\n" not in out.getvalue() and out.getvalue().count("\r\x1b[2K") == 2
    listener.line("a remark [1]")
    assert out.getvalue().endswith("\r\x1b[2Ka remark [1]\n")


def test_progress_is_a_line_now_and_then_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    out, now_s = io.StringIO(), [100.0]
    monkeypatch.setattr("bench.console.time.monotonic", lambda: now_s[0])
    listener = ConsoleListener(Console(file=out, width=40))
    for _ in range(25):
        now_s[0] += 1.0
        listener.progress("a server with a long name, interference", PROGRESS)
    assert out.getvalue().count("\n") == 2 and "20 tokens/s" in out.getvalue()
