"""`python -m bench.decisions`: many questions about one state, read off prompts, against the ways without.

Each round takes a candidate's profile that the server has not seen, and asks 40 yes-or-no questions about it:

1. `/v1/decisions`, one request: its time, and the prompt tokens that prefill workers computed, from their own counters.
   The naive way computes every question's whole prompt: what `baton_prompt_tokens` counts.
2. The same answers as JSON text: one chat request with the profile and all questions, which generates as many tokens as
   the JSON of 40 answers has. The end of the text is ignored and its content is not looked at: only its time counts.
3. One question alone, of the same profile, which is cached by then: what a further question costs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

from bench.machine import machine
from bench.servers import Server, base_url, own_server, reach
from bench.text import WORDS, pieces

COUNT_BUDGET_S: Final = 30.0
COUNT_PAUSE_S: Final = 1.5
REQUEST_BUDGET_S: Final = 900.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured."""

    num_questions: int
    num_state_tokens: int
    num_rounds: int


@dataclass(frozen=True, slots=True)
class Round:
    """What one round took.

    Attributes:
        num_naive_tokens: of all questions' prompts, each whole.
        num_computed_tokens: that prefill workers computed for them.
    """

    decisions_s: float
    json_s: float
    one_more_s: float
    num_naive_tokens: int
    num_computed_tokens: int
    num_json_tokens: int


def questions(num_questions: int) -> list[dict[str, Any]]:
    """Return predicates about a candidate, each another."""
    skills, fields = WORDS["SKILL"], WORDS["FIELD"]
    return [
        {
            "type": "predicate",
            "name": f"q{i}",
            "instructions": f"Has the candidate worked with {skills[i % len(skills)]} in {fields[i % len(fields)]}?",
        }
        for i in range(num_questions)
    ]


class Rig:
    """Asks one server."""

    def __init__(self, server: Server, http: aiohttp.ClientSession) -> None:
        self._server = server
        self._http = http

    async def round(self, plan: Plan, number: int) -> Round:
        """Measure one round with a state of its own."""
        profile = "".join(pieces(f"decisions-{time.time_ns()}-{number}", plan.num_state_tokens))
        asked = questions(plan.num_questions)
        naive, computed = await self._settled()
        decisions_s = await self._decide(profile, asked)
        naive_after, computed_after = await self._settled(computed)
        one_more_s = await self._decide(profile, questions(plan.num_questions + 1)[-1:])
        json_s, num_json_tokens = await self._as_json(f"{profile} ", asked)
        return Round(decisions_s, json_s, one_more_s, naive_after - naive, computed_after - computed, num_json_tokens)

    async def _decide(self, profile: str, asked: list[dict[str, Any]]) -> float:
        body = {"model": self._server.model, "input": profile, "questions": asked}
        begin_s = time.monotonic()
        answer = await self._post("/v1/decisions", body)
        took_s = time.monotonic() - begin_s
        assert len(answer["answers"]) == len(asked)
        return took_s

    async def _as_json(self, profile: str, asked: list[dict[str, Any]]) -> tuple[float, int]:
        """Generate as much text as the answers are; another cache salt, so that nothing of the profile is cached."""
        lines = "\n".join(f"{one['name']}: {one['instructions']}" for one in asked)
        text = json.dumps({one["name"]: {"answer": True} for one in asked})
        counted = await self._post("/tokenize", {"prompt": text, "add_special_tokens": False})
        num_tokens = int(counted["count"])
        prompt = f"{profile}\n\n{lines}\nAnswer as JSON: an object with true or false for each question."
        body = {
            "model": self._server.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "cache_salt": "json",
        }
        begin_s = time.monotonic()
        answer = await self._post("/v1/chat/completions", body)
        took_s = time.monotonic() - begin_s
        assert answer["usage"]["completion_tokens"] == num_tokens
        return took_s, num_tokens

    async def _settled(self, before: int = -1) -> tuple[int, int]:
        """Return the counters once workers have told of what they did: when they stand still between heartbeats."""
        give_up_s, last = time.monotonic() + COUNT_BUDGET_S, (-1, -1)
        while time.monotonic() < give_up_s:
            found = await self._counters()
            if found == last and found[1] > before:
                return found
            last = found
            await asyncio.sleep(COUNT_PAUSE_S)
        raise TimeoutError(f"counters of {self._server.name} did not settle within {COUNT_BUDGET_S:.0f} s")

    async def _counters(self) -> tuple[int, int]:
        """Return prompt tokens of accepted prompts, and prompt tokens computed."""
        async with self._http.get(f"{self._server.url}/metrics") as response:
            text = await response.text()
        return _total(text, "baton_prompt_tokens_total"), _total(text, "baton_prefill_computed_tokens_total")

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        async with self._http.post(f"{self._server.url}{path}", json=body) as response:
            answer: dict[str, Any] = await response.json()
            if response.status != 200:
                raise RuntimeError(f"{path}: HTTP {response.status}: {answer}")
        return answer


def _total(text: str, name: str) -> int:
    return round(sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(rf"{name}[ {{]", line)))


def report(plan: Plan, rounds: Sequence[Round]) -> str:
    """Return the figures as lines: medians over rounds, with their range where time is meant."""
    naive, computed = (
        statistics.median(getattr(one, name) for one in rounds) for name in ("num_naive_tokens", "num_computed_tokens")
    )
    lines = [
        f"{plan.num_questions} questions, a state of {plan.num_state_tokens} tokens, {len(rounds)} rounds",
        f"prompt tokens in the naive way     {naive:10,.0f}",
        f"prompt tokens computed             {computed:10,.0f}   {computed / naive:.3f} of the naive way",
        f"time of /v1/decisions              {_range(rounds, 'decisions_s')}",
        f"time of the answers as JSON text   {_range(rounds, 'json_s')}   ({rounds[0].num_json_tokens} output tokens)",
        f"time of one question more          {_range(rounds, 'one_more_s')}",
    ]
    ratio = statistics.median(one.json_s / one.decisions_s for one in rounds)
    return "\n".join([*lines, f"JSON text / decisions              {ratio:10.2f}"])


def _range(rounds: Sequence[Round], name: str) -> str:
    values = sorted(getattr(one, name) for one in rounds)
    return f"{statistics.median(values):10.3f} s ({values[0]:.3f} to {values[-1]:.3f})"


async def measure(plan: Plan, url: str, model: str) -> list[Round]:
    """Measure every round on the server at `url`; raises ConfigError if nobody answers there."""
    server = await reach(Server(url, model, "server"))
    budget = aiohttp.ClientTimeout(total=REQUEST_BUDGET_S)
    async with aiohttp.ClientSession(timeout=budget) as http:
        rig = Rig(server, http)
        await rig.round(Plan(2, 100, 1), -1)  # what is slow the first time
        found = []
        for number in range(plan.num_rounds):
            print(f"round {number + 1} of {plan.num_rounds}", file=sys.stderr, flush=True)
            found.append(await rig.round(plan, number))
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(prog="python -m bench.decisions", description="Many questions about one state.")
    parser.add_argument("--url", type=base_url, help="a running server; without it one of our own is started")
    parser.add_argument("--model", default="smollm2", help="the model of our own server [%(default)s]")
    parser.add_argument("--questions", type=int, default=40, metavar="N", help="of one state [%(default)s]")
    parser.add_argument("--state-tokens", type=int, default=2000, metavar="N", help="its length [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="each with a new state [%(default)s]")
    return parser.parse_args(arguments)


@contextlib.contextmanager
def _server(options: argparse.Namespace) -> Iterator[str]:
    if options.url is not None:
        yield options.url
    else:
        with own_server(options.model) as url:
            yield url


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    options = parse(arguments)
    plan = Plan(options.questions, options.state_tokens, options.rounds)
    with _server(options) as url:
        rounds = asyncio.run(measure(plan, url, "" if options.url is not None else options.model))
    print(f"{machine()}\n{report(plan, rounds)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
