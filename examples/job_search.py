"""Turn job searches typed in plain words into structured queries, each within a deadline.

    make serve                                                              in one terminal
    .venv/bin/python examples/job_search.py "remote python jobs over 80k"   in another
    .venv/bin/python examples/job_search.py                                 the sample's searches, with a summary

1. Every prompt begins with the same few worked examples, so that the server computes these once and keeps them.
2. The answer is JSON bound by a schema: enums, bounds of numbers, lengths of texts. It is short, so it is not streamed.
3. Searches of a file are sent one after the other, or `--concurrency` at once; latencies are held against
`--budget-ms`.
4. A schema binds the form and not the truth: skills and places that the search does not name are marked. Where the file
says what is expected, the share of right fields is printed.

Only HTTP is spoken here, so that this file runs against any OpenAI server that knows `response_format`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import aiohttp
import msgspec
from msgspec import UNSET, Meta, UnsetType
from rich.console import Console
from rich.markup import escape
from rich.table import Table

SAMPLE: Final = Path(__file__).parent / "searches.jsonl"
REQUEST_BUDGET_S: Final = 120.0
# The longest answer that the schema allows has fewer tokens, unless every character is a token of its own.
MAX_TOKENS: Final = 160

TASK: Final = "Turn the job search into a query as JSON. Leave out what the search does not say."

Title = Annotated[str, Meta(max_length=48)]
Skills = Annotated[list[Annotated[str, Meta(max_length=24)]], Meta(min_length=1, max_length=5)]
Place = Annotated[str, Meta(max_length=32)]
Salary = Annotated[int, Meta(ge=10_000, le=500_000)]


class Query(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A structured query. The one type binds what is generated, and checks it.

    What a search does not say is left out rather than written as null: half of the tokens, and so half of the time.
    Salaries are for a year, in whatever currency the market has.
    """

    title: Title
    skills: Skills | UnsetType = UNSET
    location: Place | UnsetType = UNSET
    remote: Literal["remote", "hybrid", "onsite"] | UnsetType = UNSET
    seniority: Literal["junior", "mid", "senior", "lead"] | UnsetType = UNSET
    salary_min: Salary | UnsetType = UNSET
    salary_max: Salary | UnsetType = UNSET


class Search(msgspec.Struct, frozen=True):
    """A line of a file: what was typed, and the fields that a person would have filled; null is for none."""

    search: str
    expected: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    """A search and what came back; `query` is None where the answer is not what the schema asks for."""

    search: Search
    query: Query | None
    text: str
    duration_s: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int


class ServerError(Exception):
    """The server refused a request."""


# All of the prompt but the search itself: computed once, so that more of them cost nothing per search.
EXAMPLES: Final = (
    (
        "senior backend engineer with go and grpc in Paris, 90k+",
        Query("Backend engineer", skills=["Go", "gRPC"], location="Paris", seniority="senior", salary_min=90_000),
    ),
    ("work from home as a translator", Query("Translator", remote="remote")),
    ("Lyon teacher", Query("Teacher", location="Lyon")),
    (
        "graduate civil engineer near Oslo, autocad, from 40000 to 50000",
        Query(
            "Civil engineer",
            skills=["AutoCAD"],
            location="Oslo",
            seniority="junior",
            salary_min=40_000,
            salary_max=50_000,
        ),
    ),
    ("head of sales, hybrid, Madrid", Query("Head of sales", location="Madrid", remote="hybrid", seniority="lead")),
    ("cook in the restaurant itself, up to 35k", Query("Cook", remote="onsite", salary_max=35_000)),
    ("truck driver in Hamburg", Query("Truck driver", location="Hamburg")),
    (
        "mid level tester using selenium, fully remote, 50k to 60k",
        Query("Tester", skills=["Selenium"], remote="remote", seniority="mid", salary_min=50_000, salary_max=60_000),
    ),
    ("something with biology in Prague, over 45k", Query("Biologist", location="Prague", salary_min=45_000)),
    ("plumber on site in Turin", Query("Plumber", location="Turin", remote="onsite")),
    ("hybrid copywriter roles in Ghent", Query("Copywriter", location="Ghent", remote="hybrid")),
    ("I want to lead a support team, at least 70k", Query("Support team lead", seniority="lead", salary_min=70_000)),
)


# --- asking ---


def body_of(search: str, model: str) -> dict[str, Any]:
    """Return the request; examples first, so that all searches share them."""
    messages = [{"role": "system", "content": TASK}]
    for typed, query in EXAMPLES:
        messages.append({"role": "user", "content": typed})
        messages.append({"role": "assistant", "content": msgspec.json.encode(query).decode()})
    messages.append({"role": "user", "content": search})
    schema = msgspec.json.schema(Query)
    return {
        "model": model,
        "messages": messages,
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "response_format": {"type": "json_schema", "json_schema": {"name": "query", "schema": schema, "strict": True}},
    }


async def ask(http: aiohttp.ClientSession, search: Search, model: str) -> Answered:
    """Send one search.

    Raises:
        ServerError: it was refused.
        aiohttp.ClientError, TimeoutError: the server cannot be reached, or says nothing.
    """
    begun_s = time.perf_counter()
    async with http.post("v1/chat/completions", json=body_of(search.search, model)) as response:
        if response.status != 200:
            raise ServerError(f"HTTP {response.status}: {(await response.text())[:500]}")
        answer = await response.json()
    duration_s = time.perf_counter() - begun_s
    text, usage = answer["choices"][0]["message"]["content"], answer["usage"]
    try:
        query = msgspec.json.decode(text, type=Query)
    except msgspec.MsgspecError:
        query = None
    num_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Answered(search, query, text, duration_s, usage["prompt_tokens"], num_cached, usage["completion_tokens"])


async def ask_all(http: aiohttp.ClientSession, searches: Sequence[Search], model: str, limit: int) -> list[Answered]:
    """Send all searches, at most `limit` at once; answers in the searches' order."""
    gate = asyncio.Semaphore(limit)

    async def one(search: Search) -> Answered:
        async with gate:
            return await ask(http, search, model)

    return await asyncio.gather(*(one(search) for search in searches))


# --- showing ---


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that `percent` of all do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def table_of(answers: Sequence[Answered]) -> Table:
    """Return a row for each search."""
    legend = "red: not as expected; ?: not in the words of the search"
    table = Table(
        "search", "query", "ms", title="Searches", title_justify="left", caption=legend, caption_justify="left"
    )
    for one in answers:
        shown = escape(one.text) if one.query is None else query_line(one)
        table.add_row(escape(one.search.search), shown, f"{one.duration_s * 1000:.0f}")
    return table


def query_line(answered: Answered) -> str:
    """Return the query in one line; fields that differ from what is expected are red, left out ones too."""
    assert answered.query is not None, "only valid answers have a line"
    expected, shown = answered.search.expected or {}, []
    for name, value in msgspec.structs.asdict(answered.query).items():
        wrong = is_wrong(name, value, expected)
        if value is UNSET and not wrong:
            continue
        text = "none" if value is UNSET else ", ".join(value) if isinstance(value, list) else value
        mark = " [yellow]?[/]" if name in unsupported(answered) else ""
        shown.append((f"[red]{escape(f'{name}={text}')}[/]" if wrong else escape(f"{name}={text}")) + mark)
    return "  ".join(shown)


def unsupported(answered: Answered) -> list[str]:
    """Return the fields that a search should name in so many words and does not: what a service would ask about."""
    typed, found, query = answered.search.search.casefold(), [], answered.query
    if query is not None and query.skills is not UNSET and not all(one.casefold() in typed for one in query.skills):
        found.append("skills")
    if query is not None and query.location is not UNSET and query.location.casefold() not in typed:
        found.append("location")
    return found


def is_wrong(name: str, value: Any, expected: dict[str, Any]) -> bool:
    """Say whether a field differs from what a person expects; capitals do not count."""
    if name not in expected:
        return False
    return str(None if value is UNSET else value).casefold() != str(expected[name]).casefold()


def show_summary(console: Console, answers: Sequence[Answered], budget_ms: float) -> None:
    """Print latencies, tokens, and where anything is expected the share of right fields."""
    latencies = [one.duration_s * 1000 for one in answers]
    p50, p95 = percentile(latencies, 50), percentile(latencies, 95)
    num_valid = sum(one.query is not None for one in answers)
    num_within = sum(ms <= budget_ms for ms in latencies)
    cached = percentile([one.num_cached_tokens for one in answers], 50)
    prompt = percentile([one.num_prompt_tokens for one in answers], 50)
    output = percentile([one.num_output_tokens for one in answers], 50)
    verdict = "[green]kept[/]" if p95 <= budget_ms else "[red]missed[/]"
    console.print(
        f"valid JSON {num_valid}/{len(answers)}   p50 {p50:.0f} ms   p95 {p95:.0f} ms   "
        f"budget {budget_ms:.0f} ms {verdict} ({num_within}/{len(answers)} searches within it)"
    )
    console.print(f"median tokens: {prompt:.0f} in, {cached:.0f} of them from the prefix cache; {output:.0f} out")
    judged = [(one.search.expected, one.query) for one in answers if one.search.expected]
    if not judged:
        return
    shares = [(name, *share_right(name, judged)) for name in Query.__struct_fields__]
    text = "   ".join(f"{name} {num_right}/{num_all}" for name, num_right, num_all in shares if num_all)
    console.print(f"right fields: {text}")
    values = [value for expected, _ in judged for value in (expected or {}).values()]
    total = sum(num_right for _, num_right, _ in shares)
    console.print(
        f"in all {total}/{len(values)} (leaving everything out would give {values.count(None)}/{len(values)})"
    )


def share_right(name: str, judged: Sequence[tuple[dict[str, Any] | None, Query | None]]) -> tuple[int, int]:
    """Return how often a field is right, and how often it is expected."""
    pairs = [(expected, query) for expected, query in judged if expected and name in expected]
    right = [query is not None and not is_wrong(name, getattr(query, name), expected) for expected, query in pairs]
    return sum(right), len(pairs)


# --- the command ---


def arguments() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description="Turn job searches in plain words into structured queries.")
    parser.add_argument("search", nargs="?", help="one search; without it, every search of --file")
    parser.add_argument("--file", type=Path, default=SAMPLE, help="JSON lines with `search` and perhaps `expected`")
    parser.add_argument("--url", type=base_url, default="http://127.0.0.1:8000/", help="where the server is")
    parser.add_argument("--model", default="smollm2", help="as the server calls it")
    parser.add_argument("--api-key", help="sent as a bearer token")
    parser.add_argument("--concurrency", type=at_least_one, default=1, help="searches at once")
    parser.add_argument("--budget-ms", type=float, default=600.0, help="what the 95th percentile is held against")
    parser.add_argument("--json", action="store_true", help="print answers as JSON lines and nothing else")
    return parser.parse_args()


def base_url(text: str) -> str:
    """Return what every path of the API is behind, for argparse; /v1 at its end may be given or not."""
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError("must begin with http:// or https://")
    return text.rstrip("/").removesuffix("/v1") + "/"


def at_least_one(text: str) -> int:
    """Return a whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be a whole number above 0")
    return int(text)


def read_searches(path: Path) -> list[Search]:
    """Return the searches of a file, one in each line that is not empty."""
    return [msgspec.json.decode(line, type=Search) for line in path.read_bytes().splitlines() if line.strip()]


async def run(options: argparse.Namespace, console: Console) -> int:
    """Ask and print; return the exit code."""
    searches = [Search(options.search)] if options.search else read_searches(options.file)
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    budget = aiohttp.ClientTimeout(total=REQUEST_BUDGET_S)
    async with aiohttp.ClientSession(options.url, headers=headers, timeout=budget) as http:
        # Unmeasured, as a service would at its start: the examples are in the prefix cache, the schema is compiled.
        await ask(http, Search("hello"), options.model)
        answers = await ask_all(http, searches, options.model, options.concurrency)
    if options.json:
        for one in answers:
            query = None if one.query is None else msgspec.to_builtins(one.query)
            line = {"search": one.search.search, "query": query, "unsupported": unsupported(one)}
            print(json.dumps({**line, "ms": round(one.duration_s * 1000, 1)}, ensure_ascii=False))
    elif options.search:
        console.print_json(answers[0].text if answers[0].query else json.dumps(answers[0].text))
        show_summary(console, answers, options.budget_ms)
    else:
        console.print(table_of(answers))
        show_summary(console, answers, options.budget_ms)
    return 0 if all(one.query is not None for one in answers) else 1


def main() -> int:
    """Run the example."""
    options = arguments()
    try:
        return asyncio.run(run(options, Console()))
    except (aiohttp.ClientConnectorError, ConnectionError) as error:
        print(f"no server at {options.url} ({error}); start one with: make serve", file=sys.stderr)
    except (ServerError, aiohttp.ClientError, TimeoutError, OSError, msgspec.MsgspecError) as error:
        print(f"job_search: {error or type(error).__name__}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
