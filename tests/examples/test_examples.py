"""Each example in one command against a running server, and what it makes of answers by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from examples import candidates, job_search
from tests.e2e.server import Server, serving

ROOT = Path(__file__).resolve().parent.parent.parent
HIRING = ROOT / "examples" / "hiring"
RUN_BUDGET_S = 240.0


@pytest.fixture(scope="module")
def server(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """What `make serve` starts."""
    with serving("smollm2", tmp_path_factory.mktemp("examples"), cache_dir) as running:
        yield running


def example(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run an example as the README says."""
    command = [sys.executable, f"examples/{name}.py", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=RUN_BUDGET_S, check=False)


def lines_of(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """Return what an example printed with --json."""
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# --- against a server ---


@pytest.mark.e2e
@pytest.mark.model
@pytest.mark.slow
def test_candidates_are_judged_and_decided_and_share_their_prefix(server: Server) -> None:
    options = ("--candidates", "2", "--decisions", "--exact-quotes", "--json", "--url", server.url)
    found = lines_of(example("candidates", *options))
    case, given = candidates.read_case(HIRING)
    ids = {one.id for one in case.qualifications}
    assert [line["judgement"]["candidate"]["name"] for line in found] == [one.name for one in given[:2]]
    for line, candidate in zip(found, given, strict=False):
        findings = msgspec.convert(line["judgement"]["findings"], dict[str, candidates.Finding])
        assert findings.keys() == ids
        assert all(finding.quote in ("", *candidate.profile) for finding in findings.values())
        assert line["decided"]["probabilities"].keys() == ids
        assert all(0 <= probability <= 1 for probability in line["decided"]["probabilities"].values())
    # Whichever came second found what the first had left: all but the profile.
    most = max(line["judgement"]["num_cached_tokens"] for line in found)
    assert most > min(line["judgement"]["num_prompt_tokens"] for line in found) // 2


@pytest.mark.e2e
@pytest.mark.model
@pytest.mark.slow
def test_a_candidate_is_shown_as_the_answer_streams(server: Server) -> None:
    done = example("candidates", "--candidates", "1", "--url", server.url)
    assert done.returncode == 0, done.stderr
    streamed = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    assert candidates.findings_of(streamed, candidates.read_case(HIRING)[0])
    assert "valid JSON: 1/1" in done.stdout


@pytest.mark.e2e
@pytest.mark.model
def test_searches_become_queries(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "searches.jsonl"
    file.write_text('{"search": "remote nurse"}\n{"search": "cook in Rome, 30k to 40k"}\n')
    found = lines_of(example("job_search", "--file", str(file), "--json", "--url", server.url))
    assert [line["search"] for line in found] == ["remote nurse", "cook in Rome, 30k to 40k"]
    assert all(msgspec.convert(line["query"], job_search.Query) for line in found)


@pytest.mark.e2e
@pytest.mark.model
def test_one_search_is_shown_with_its_latency(server: Server) -> None:
    done = example("job_search", "senior python developer in Berlin", "--url", server.url)
    assert done.returncode == 0, done.stderr
    assert "valid JSON 1/1" in done.stdout
    assert "p95" in done.stdout


@pytest.mark.e2e
@pytest.mark.model
@pytest.mark.parametrize("name", ["candidates", "job_search"])
def test_what_a_server_refuses_is_said(server: Server, name: str) -> None:
    done = example(name, "--model", "another", "--url", server.url)
    assert done.returncode == 1
    assert "HTTP 404" in done.stderr


# --- without one ---


@pytest.mark.parametrize("name", ["candidates", "job_search"])
def test_an_absent_server_is_said(name: str) -> None:
    done = example(name, "--url", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert "make serve" in done.stderr


@pytest.mark.parametrize("name", ["candidates", "job_search"])
def test_a_url_that_is_none_is_refused(name: str) -> None:
    done = example(name, "--url", "localhost:8000")
    assert done.returncode == 2
    assert "--url: must begin with http" in done.stderr


def test_a_url_may_end_in_the_version_of_the_api() -> None:
    for text in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
        assert candidates.base_url(text) == job_search.base_url(text) == "http://h:1/"
    assert candidates.base_url("https://h/gateway/v1") == "https://h/gateway/"


def test_quotes_are_looked_up_whatever_their_spaces_and_capitals() -> None:
    one = candidates.Candidate("A", ["Speaks  German.", "Writes Python."])
    assert candidates.is_in("speaks german.", one)
    assert not candidates.is_in("Speaks Italian.", one)
    empty = candidates.Finding(" ", "", "met")
    assert not candidates.has_evidence(empty, one)


def test_candidates_are_repeated_with_other_words_in_front() -> None:
    _, given = candidates.read_case(HIRING)
    found = candidates.repeated(given, 2 * len(given) + 1)
    assert found[: len(given)] == given
    assert len({one.text for one in found}) == len({one.name for one in found}) == len(found)
    assert [one.expected for one in found[len(given) : 2 * len(given)]] == [one.expected for one in given]
    assert len(candidates.repeated(given, 1)) == 1


def test_what_is_no_judgement_has_no_findings() -> None:
    case, _ = candidates.read_case(HIRING)
    finding = {"quote": "", "reason": "", "verdict": "met"}
    whole = {one.text: finding for one in case.qualifications}
    assert len(candidates.findings_of(json.dumps(whole), case)) == len(case.qualifications)
    for text in ("", "{", json.dumps(dict(list(whole.items())[1:])), json.dumps({**whole, "x": finding})):
        assert candidates.findings_of(text, case) == {}
    assert candidates.findings_of(json.dumps(whole).replace("met", "perhaps"), case) == {}


def test_the_samples_are_whole() -> None:
    case, given = candidates.read_case(HIRING)
    ids = {one.id for one in case.qualifications}
    assert all(one.expected.keys() == ids for one in given)
    for worked in case.worked_examples:
        one = candidates.Candidate("worked", worked.profile)
        assert worked.findings.keys() == ids
        assert all(candidates.is_in(finding.quote, one) for finding in worked.findings.values())
    searches = job_search.read_searches(job_search.SAMPLE)
    names = set(job_search.Query.__struct_fields__)
    assert all(set(search.expected or {}) <= names for search in searches)


def test_percentiles_are_values_that_were_seen() -> None:
    values = [float(value) for value in range(1, 21)]
    assert job_search.percentile(values, 50) == 10
    assert job_search.percentile(values, 95) == 19
    assert job_search.percentile([7.0], 95) == 7


def test_a_field_is_wrong_where_another_was_expected() -> None:
    expected = {"location": "Berlin", "salary_min": None}
    assert not job_search.is_wrong("location", "berlin", expected)
    assert job_search.is_wrong("salary_min", 10_000, expected)
    assert not job_search.is_wrong("salary_min", msgspec.UNSET, expected)
    assert not job_search.is_wrong("title", "anything", expected)


def test_a_field_that_the_search_does_not_name_is_unsupported() -> None:
    search = job_search.Search("React engineer in Leipzig")
    query = job_search.Query("Engineer", skills=["react"], location="Linz")
    assert job_search.unsupported(job_search.Answered(search, query, "", 0.0, 0, 0, 0)) == ["location"]
    query = job_search.Query("Engineer", skills=["React", "Go"], location="Leipzig")
    assert job_search.unsupported(job_search.Answered(search, query, "", 0.0, 0, 0, 0)) == ["skills"]
    assert job_search.unsupported(job_search.Answered(search, None, "", 0.0, 0, 0, 0)) == []
