"""Judge candidates against a hirer's qualifications: answers that obey a schema, each with evidence, as they stream.

    make serve                                            in one terminal
    .venv/bin/python examples/candidates.py               in another
    .venv/bin/python examples/candidates.py --decisions   and, beside it, probabilities that need no generation

1. The prompt of every candidate begins with the same words: task, job, qualifications, worked examples. The server
computes them once; `cached_tokens` in each answer's usage says so.
2. All candidates are asked at once. Each answer is JSON bound by a schema: for each qualification a quote from the
profile, a reason, and a verdict. The first candidate's answer is printed as it arrives.
3. A schema binds the form and not the truth: every quote is looked up in the profile, and marked where it is not there.
4. `--decisions` asks /v1/decisions for the same verdicts: a probability for each qualification, from prefill alone.

Only HTTP is spoken here: all but `--decisions`, which is Baton's own, runs against any OpenAI server that knows
`response_format`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import aiohttp
import msgspec
from msgspec import Meta
from rich.console import Console
from rich.markup import escape
from rich.table import Table

SAMPLE: Final = Path(__file__).parent / "hiring"
REQUEST_BUDGET_S: Final = 600.0
BUSY_BUDGET_S: Final = 120.0
MAX_QUOTE_CHARS: Final = 160
MAX_REASON_CHARS: Final = 80
# A bound and no expectation: an answer that keeps to the schema is not cut off by it.
MAX_TOKENS_OF_A_FINDING: Final = 250
NAMES: Final = ("Alex Arden", "Billie Brook", "Charlie Croft", "Dana Dale", "Eli Eyre", "Frankie Field", "Gray Glen")

TASK: Final = """\
You compare a candidate's profile with the qualifications that a hirer asks for. For each qualification copy the line \
of the profile that speaks of it, or leave the quote empty if no line does. Then give a short reason and your verdict: \
met, not met, or unclear."""


class Finding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the model says of one qualification: what stands before the verdict is what the verdict can rest on."""

    quote: Annotated[str, Meta(max_length=MAX_QUOTE_CHARS)]
    reason: Annotated[str, Meta(max_length=MAX_REASON_CHARS)]
    verdict: Literal["met", "not met", "unclear"]


class Qualification(msgspec.Struct, frozen=True):
    """What the hirer asks for."""

    id: str
    text: str


class Candidate(msgspec.Struct, frozen=True):
    """A profile in lines; `expected` holds a person's verdicts by qualification, to measure the model with."""

    name: str
    profile: list[str]
    expected: dict[str, str] = {}

    @property
    def text(self) -> str:
        """The profile as one text."""
        return "\n".join(self.profile)


class WorkedExample(msgspec.Struct, frozen=True):
    """A profile with the findings that a person would write."""

    profile: list[str]
    findings: dict[str, Finding]


@dataclass(frozen=True, slots=True)
class Case:
    """What all candidates are judged by."""

    job: str
    qualifications: list[Qualification]
    worked_examples: list[WorkedExample]


@dataclass(frozen=True, slots=True)
class Judgement:
    """One candidate's answer and what it took.

    Attributes:
        findings: by qualification; empty where the answer is not what the schema asks for.
        ttft_s, duration_s: until the first token, and until the last.
    """

    candidate: Candidate
    findings: dict[str, Finding]
    ttft_s: float
    duration_s: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int

    @property
    def tokens_per_s(self) -> float:
        """Output tokens a second after the first."""
        return (self.num_output_tokens - 1) / max(self.duration_s - self.ttft_s, 1e-9)


@dataclass(frozen=True, slots=True)
class Decided:
    """One candidate's probabilities by qualification, and what they took."""

    candidate: Candidate
    probabilities: dict[str, float]
    duration_s: float
    num_prompt_tokens: int
    num_cached_tokens: int


class ServerError(Exception):
    """The server cannot be reached, refused a request, or ended an answer with an error."""


# --- what is asked ---


def read_case(folder: Path) -> tuple[Case, list[Candidate]]:
    """Return what a folder holds: job.md, qualifications.json, candidates.json, perhaps worked_examples.json."""
    worked = folder / "worked_examples.json"
    case = Case(
        (folder / "job.md").read_text(),
        msgspec.json.decode((folder / "qualifications.json").read_bytes(), type=list[Qualification]),
        msgspec.json.decode(worked.read_bytes(), type=list[WorkedExample]) if worked.exists() else [],
    )
    return case, msgspec.json.decode((folder / "candidates.json").read_bytes(), type=list[Candidate])


def repeated(candidates: Sequence[Candidate], number: int) -> list[Candidate]:
    """Return `number` candidates: those given, then the same ones under other names with their lines turned around."""
    found = []
    for i in range(number):
        again, one = i // len(candidates), candidates[i % len(candidates)]
        if again:
            name = f"{NAMES[(i - len(candidates)) % len(NAMES)]} {i + 1}"
            start = again % len(one.profile)
            one = Candidate(name, [*one.profile[start:], *one.profile[:start]], one.expected)
        found.append(one)
    return found


def schema_of(case: Case, candidate: Candidate, has_exact_quotes: bool) -> dict[str, Any]:
    """Return the schema of an answer: a finding for each qualification, under its text and in order.

    The key repeats the qualification right before the model writes of it. With exact quotes, a quote can only be a
    line of this candidate's profile, or empty.
    """
    finding: dict[str, Any] = msgspec.json.schema_components([Finding])[1]["Finding"]
    if has_exact_quotes:
        quote = {"enum": ["", *candidate.profile]}
        finding = {**finding, "properties": {**finding["properties"], "quote": quote}}
    keys = [one.text for one in case.qualifications]
    return {
        "type": "object",
        "properties": dict.fromkeys(keys, finding),
        "required": keys,
        "additionalProperties": False,
    }


def messages_of(case: Case, candidate: Candidate) -> list[dict[str, str]]:
    """Return the chat: what all candidates share comes first, so that it is one prefix."""
    asked = "\n".join(f"- {one.text}" for one in case.qualifications)
    messages = [{"role": "system", "content": f"{TASK}\n\n{case.job}\n\n# Qualifications\n\n{asked}"}]
    for example in case.worked_examples:
        answer = {one.text: example.findings[one.id] for one in case.qualifications}
        messages.append({"role": "user", "content": "\n".join(example.profile)})
        messages.append({"role": "assistant", "content": msgspec.json.encode(answer).decode()})
    return [*messages, {"role": "user", "content": candidate.text}]


def body_of(case: Case, candidate: Candidate, options: argparse.Namespace) -> dict[str, Any]:
    """Return the request for one candidate's judgement."""
    schema = schema_of(case, candidate, options.exact_quotes)
    return {
        "model": options.model,
        "messages": messages_of(case, candidate),
        "temperature": 0,
        "max_tokens": MAX_TOKENS_OF_A_FINDING * len(case.qualifications),
        "stream": True,
        "stream_options": {"include_usage": True},
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "judgement", "schema": schema, "strict": True},
        },
    }


def decisions_body(case: Case, candidate: Candidate, model: str) -> dict[str, Any]:
    """Return the request for one candidate's decisions: the profile alone, since a question says all it needs."""
    options = [{"value": "Yes, the text says so"}, {"value": "No, the text does not say so"}]
    questions = [
        {
            "type": "choice",
            "name": one.id,
            "instructions": f"Does the candidate meet this? {one.text}",
            "choices": options,
        }
        for one in case.qualifications
    ]
    return {"model": model, "input": candidate.text, "questions": questions}


# --- what is answered ---


def findings_of(text: str, case: Case) -> dict[str, Finding]:
    """Return the findings by qualification; none where the text is not what the schema asks for."""
    try:
        found = msgspec.json.decode(text, type=dict[str, Finding])
    except msgspec.MsgspecError:
        return {}
    return {one.id: found[one.text] for one in case.qualifications} if len(found) == len(case.qualifications) else {}


def is_in(quote: str, candidate: Candidate) -> bool:
    """Say whether a quote occurs in the profile; capitals and spaces do not count."""
    return " ".join(quote.split()).casefold() in " ".join(candidate.text.split()).casefold()


# --- asking ---


@contextlib.asynccontextmanager
async def posted(http: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
    """Send a request and give its response; a server that is busy is asked again when it says.

    Raises:
        ServerError: it was refused, or the server stays busy for BUSY_BUDGET_S.
    """
    give_up_s = time.monotonic() + BUSY_BUDGET_S
    while True:
        async with http.post(path, json=body) as response:
            if response.status == 200:
                yield response
                return
            after = response.headers.get("Retry-After", "")
            wait_s = float(after) if after.isdecimal() else 1.0
            if response.status not in (429, 503) or time.monotonic() + wait_s > give_up_s:
                raise ServerError(f"HTTP {response.status}: {(await response.text())[:500]}")
        await asyncio.sleep(wait_s)


async def events_of(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """Yield the events of a stream until it says that it is done.

    Raises:
        ServerError: an event is an error, or the stream ends before it is done.
    """
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        event: dict[str, Any] = json.loads(data)
        if "error" in event:
            raise ServerError(f"the answer ended: {event['error']}")
        yield event
    raise ServerError("the answer ended before it was complete")


async def judge(
    http: aiohttp.ClientSession, case: Case, candidate: Candidate, body: dict[str, Any], show: Callable[[str], None]
) -> Judgement:
    """Ask for one judgement and hand each piece of it to `show` as it arrives.

    Raises:
        ServerError: there is none.
    """
    begun_s = time.perf_counter()
    pieces: list[str] = []
    first_s = last_s = begun_s
    usage: dict[str, Any] = {}
    async with posted(http, "v1/chat/completions", body) as response:
        async for event in events_of(response):
            usage = event.get("usage") or usage
            piece = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            if piece:
                last_s = time.perf_counter()
                first_s = first_s if pieces else last_s
                pieces.append(piece)
                show(piece)
    return Judgement(
        candidate,
        findings_of("".join(pieces), case),
        first_s - begun_s,
        last_s - begun_s,
        usage.get("prompt_tokens", 0),
        cached_tokens(usage, "prompt_tokens_details"),
        usage.get("completion_tokens", 0),
    )


async def decide(http: aiohttp.ClientSession, case: Case, candidate: Candidate, model: str) -> Decided:
    """Ask for one candidate's probabilities.

    Raises:
        ServerError: there are none.
    """
    begun_s = time.perf_counter()
    async with posted(http, "v1/decisions", decisions_body(case, candidate, model)) as response:
        answer = await response.json()
    duration_s, usage = time.perf_counter() - begun_s, answer["usage"]
    # The first option of each is "yes".
    yes = {one["name"]: one["probabilities"][0]["probability"] for one in answer["answers"]}
    return Decided(candidate, yes, duration_s, usage["input_tokens"], cached_tokens(usage, "input_tokens_details"))


def cached_tokens(usage: dict[str, Any], details: str) -> int:
    """Return how many tokens of the prompt the server had already; 0 where it does not say."""
    return int((usage.get(details) or {}).get("cached_tokens") or 0)


# --- showing ---


def findings_table(judgement: Judgement, case: Case) -> Table:
    """Return one candidate's findings, with a mark at quotes that the profile does not have."""
    title = f"{judgement.candidate.name}: findings"
    table = Table("qualification", "verdict", "quote", "reason", title=title, title_justify="left", show_lines=True)
    for one in case.qualifications:
        if (finding := judgement.findings.get(one.id)) is None:
            table.add_row(one.text, "[red]the answer is no valid JSON[/]", "", "")
            continue
        mark = "" if is_in(finding.quote, judgement.candidate) else "[red]not in the profile:[/] "
        table.add_row(one.text, finding.verdict, mark + (escape(finding.quote) or "-"), escape(finding.reason))
    return table


def verdicts_table(case: Case, judgements: Sequence[Judgement], decided: Sequence[Decided]) -> Table:
    """Return a row for each candidate: the verdicts, and the probabilities of `met` where they were asked for."""
    legend = "green: as expected, red: not; ?: no quote from the profile" + ("; number: P(met)" if decided else "")
    table = Table(title="Verdicts", title_justify="left", caption=legend, caption_justify="left")
    for head in ("candidate", *(one.id for one in case.qualifications)):
        table.add_column(head, no_wrap=True)
    for i, judgement in enumerate(judgements):
        candidate = judgement.candidate
        cells = []
        for one in case.qualifications:
            finding, expected = judgement.findings.get(one.id), candidate.expected.get(one.id)
            cell = "[red]invalid[/]" if finding is None else colored(finding.verdict, finding.verdict, expected)
            if finding is not None and finding.verdict == "met" and not has_evidence(finding, candidate):
                cell += " [yellow]?[/]"
            if decided:
                probability = decided[i].probabilities[one.id]
                cell += "\n" + colored(f"{probability:.2f}", verdict_of(probability), expected)
            cells.append(cell)
        table.add_row(candidate.name, *cells)
    return table


def colored(text: str, verdict: str, expected: str | None) -> str:
    """Return the text green where the verdict is the expected one, red where it is another."""
    return text if expected is None else f"[{'green' if verdict == expected else 'red'}]{text}[/]"


def verdict_of(probability: float) -> str:
    """Return the verdict that a probability comes to."""
    return "met" if probability > 0.5 else "not met"


def has_evidence(finding: Finding, candidate: Candidate) -> bool:
    """Say whether a finding quotes the profile."""
    return bool(finding.quote.strip()) and is_in(finding.quote, candidate)


def times_table(judgements: Sequence[Judgement], decided: Sequence[Decided]) -> Table:
    """Return what each candidate's answer took."""
    heads = ["candidate", "TTFT", "in all", "tokens/s", "in", "cached", "out"]
    legend = "in, cached, out: tokens of the prompt, those of them that were there already, tokens of the answer"
    table = Table(title="Times", title_justify="left", caption=legend, caption_justify="left")
    for head in heads + (["decisions", "in", "cached"] if decided else []):
        table.add_column(head, justify="left" if head == "candidate" else "right", no_wrap=True)
    for i, one in enumerate(judgements):
        counts = (one.num_prompt_tokens, one.num_cached_tokens, one.num_output_tokens)
        cells = [one.candidate.name, f"{one.ttft_s:.2f} s", f"{one.duration_s:.2f} s", f"{one.tokens_per_s:.1f}"]
        cells += [str(count) for count in counts]
        if decided:
            other = decided[i]
            cells += [f"{other.duration_s:.2f} s", str(other.num_prompt_tokens), str(other.num_cached_tokens)]
        table.add_row(*cells)
    return table


def num_right(verdicts: Sequence[tuple[str | None, str]]) -> int:
    """Count the verdicts that are the expected ones."""
    return sum(given == expected for given, expected in verdicts)


def show_summary(console: Console, judgements: Sequence[Judgement], decided: Sequence[Decided]) -> None:
    """Print what the tables add up to."""
    quotes = [(f.quote, one.candidate) for one in judgements for f in one.findings.values() if f.quote.strip()]
    num_found = sum(is_in(quote, candidate) for quote, candidate in quotes)
    num_valid = sum(bool(one.findings) for one in judgements)
    console.print(f"valid JSON: {num_valid}/{len(judgements)}   quotes that the profile has: {num_found}/{len(quotes)}")
    judged = [
        (one.findings[name].verdict if one.findings else None, expected)
        for one in judgements
        for name, expected in one.candidate.expected.items()
    ]
    if not judged:
        return
    likeliest = max(sum(expected == verdict for _, expected in judged) for verdict in ("met", "not met"))
    line = f"right verdicts: {num_right(judged)}/{len(judged)} written"
    if decided:
        chosen = [(verdict_of(o.probabilities[q]), e) for o in decided for q, e in o.candidate.expected.items()]
        line += f", {num_right(chosen)}/{len(chosen)} by probability"
    console.print(f"{line} (always saying the same would give {likeliest}/{len(judged)})")


# --- the command ---


async def judge_all(
    http: aiohttp.ClientSession,
    case: Case,
    candidates: Sequence[Candidate],
    options: argparse.Namespace,
    show: Callable[[str], None],
) -> list[Judgement]:
    """Ask for every candidate's judgement at once; `show` gets the pieces of the first one as they arrive."""
    gate = asyncio.Semaphore(options.concurrency)

    async def one(place: int, candidate: Candidate) -> Judgement:
        async with gate:
            body = body_of(case, candidate, options)
            return await judge(http, case, candidate, body, (lambda piece: None) if place else show)

    return await asyncio.gather(*(one(place, candidate) for place, candidate in enumerate(candidates)))


async def run(options: argparse.Namespace, console: Console) -> int:
    """Ask and print; return the exit code."""
    case, given = read_case(options.case)
    candidates = repeated(given, options.candidates or len(given))

    def show(text: str) -> None:
        if not options.json:
            console.print(text, end="", markup=False, highlight=False, soft_wrap=True)

    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    budget = aiohttp.ClientTimeout(total=REQUEST_BUDGET_S)
    async with aiohttp.ClientSession(options.url, headers=headers, timeout=budget) as http:
        begun_s, decided_s = time.perf_counter(), 0.0
        show(f"{candidates[0].name}, as the answer arrives:\n")
        judgements = await judge_all(http, case, candidates, options, show)
        show("\n\n")
        judged_s, decided = time.perf_counter() - begun_s, list[Decided]()
        if options.decisions:
            begun_s = time.perf_counter()
            decided = await asyncio.gather(*(decide(http, case, one, options.model) for one in candidates))
            decided_s = time.perf_counter() - begun_s
    if options.json:
        for i, one in enumerate(judgements):
            print(msgspec.json.encode({"judgement": one, "decided": decided[i] if decided else None}).decode())
    else:
        console.print(findings_table(judgements[0], case))
        console.print(verdicts_table(case, judgements, decided))
        console.print(times_table(judgements, decided))
        show_summary(console, judgements, decided)
        num_tokens = sum(one.num_output_tokens for one in judgements)
        line = f"{len(candidates)} candidates: {judged_s:.1f} s for {num_tokens} tokens of judgements"
        console.print(line + (f", {decided_s:.1f} s for decisions, which write none" if decided else ""))
    return 0 if all(one.findings for one in judgements) else 1


def arguments() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description="Judge candidates against a hirer's qualifications.")
    parser.add_argument("--candidates", type=at_least_one, help="how many; more than there are: with variations")
    parser.add_argument("--decisions", action="store_true", help="also ask /v1/decisions, and show both")
    parser.add_argument("--exact-quotes", action="store_true", help="allow only lines of the profile as quotes")
    parser.add_argument("--case", type=Path, default=SAMPLE, help="folder with job, qualifications and candidates")
    parser.add_argument("--concurrency", type=at_least_one, default=8, help="answers at once")
    parser.add_argument("--url", type=base_url, default="http://127.0.0.1:8000/", help="where the server is")
    parser.add_argument("--model", default="smollm2", help="as the server calls it")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each candidate, nothing else")
    parser.add_argument("--api-key", help="sent as a bearer token")
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


def main() -> int:
    """Run the example."""
    options = arguments()
    try:
        return asyncio.run(run(options, Console()))
    except (aiohttp.ClientConnectorError, ConnectionError) as error:
        print(f"no server at {options.url} ({error}); start one with: make serve", file=sys.stderr)
    except (ServerError, aiohttp.ClientError, TimeoutError, OSError, msgspec.MsgspecError) as error:
        print(f"candidates: {error or type(error).__name__}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
