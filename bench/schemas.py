"""Answers of a running server against the schemas that they were asked for: `python -m bench.schemas --number 500`.

1. Each trial draws a schema from its own seed; half of the answers are greedy, half sampled with a seed.
2. The answer is streamed. One that was cut (`finish_reason` "length") is counted apart: it is no whole document.
3. Every other answer must parse, and obey its schema by the `jsonschema` package, formats included.

The exit code is 1 if any answer was invalid or a request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp
import jsonschema

from bench.random_schemas import Schema, random_schema

REQUEST_BUDGET_S = 300.0

FORMATS = jsonschema.FormatChecker(formats=("date", "ipv4", "uuid"))
_TIME = r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?([Zz]|[+-]([01]\d|2[0-3]):[0-5]\d)"


def is_time(value: object) -> bool:
    """Whether a string is a time of RFC 3339; other values are none of a format's business."""
    return not isinstance(value, str) or re.fullmatch(_TIME, value, re.ASCII) is not None


def is_date_time(value: object) -> bool:
    """Whether a string is a date and a time of RFC 3339."""
    if not isinstance(value, str):
        return True
    date, _, rest = value.replace("t", "T").partition("T")
    return bool(FORMATS.conforms(date, "date")) and is_time(rest)


# The package takes "time" for what draft 3 meant by it, and "date-time" for nothing: today both are RFC 3339's.
FORMATS.checks("time")(is_time)
FORMATS.checks("date-time")(is_date_time)


@dataclass(slots=True)
class Verdicts:
    """What became of the answers.

    Attributes:
        num_cut: ended by max_tokens, in the middle.
        faults: of invalid answers and failed requests, with what is needed to ask again.
    """

    num_valid: int = 0
    num_cut: int = 0
    num_tokens: int = 0
    wall_s: float = 0.0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Say it in a line, and a line for each fault."""
        num_whole = self.num_valid + len(self.faults)
        share = 100 * self.num_valid / num_whole if num_whole else 0.0
        head = (
            f"{self.num_valid} of {num_whole} whole answers are valid ({share:.1f} %); {self.num_cut} were cut by "
            f"max_tokens; {self.num_tokens} tokens in {self.wall_s:.1f} s"
        )
        return "\n".join([head, *self.faults])


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked: `number` trials from `seed` on, `concurrency` at a time."""

    url: str
    model: str
    number: int
    seed: int = 0
    concurrency: int = 8
    max_tokens: int = 400


async def run(plan: Plan) -> Verdicts:
    """Ask for everything, and judge it."""
    verdicts, gate, started_s = Verdicts(), asyncio.Semaphore(plan.concurrency), time.monotonic()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=REQUEST_BUDGET_S)) as http:

        async def one(trial: int) -> None:
            async with gate:
                await _try(http, plan, trial, verdicts)

        await asyncio.gather(*(one(plan.seed + i) for i in range(plan.number)))
    verdicts.wall_s = time.monotonic() - started_s
    return verdicts


async def _try(http: aiohttp.ClientSession, plan: Plan, trial: int, verdicts: Verdicts) -> None:
    dice = random.Random(trial)
    schema = random_schema(dice)
    body = _body(plan, schema, trial)
    try:
        text, reason, num_tokens = await _answer(http, plan.url, body)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        verdicts.faults.append(f"seed {trial}: {error!r}; schema {json.dumps(schema)}")
        return
    verdicts.num_tokens += num_tokens
    if reason == "length":
        verdicts.num_cut += 1
    elif fault := fault_of(text, schema):
        verdicts.faults.append(f"seed {trial}: {fault}; answer {text!r}; schema {json.dumps(schema)}")
    else:
        verdicts.num_valid += 1


def _body(plan: Plan, schema: Schema, trial: int) -> dict[str, Any]:
    question = f"Answer with a JSON document that describes a candidate. Its schema: {json.dumps(schema)}"
    return {
        "model": plan.model,
        "messages": [{"role": "user", "content": question}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "candidate", "schema": schema}},
        "max_tokens": plan.max_tokens,
        "temperature": 1.0 if trial % 2 else 0.0,
        "seed": trial,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _answer(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[str, str | None, int]:
    """Return text, finish reason and number of tokens. Raises ValueError for an answer that is none."""
    text, reason, num_tokens = "", None, 0
    async with http.post(f"{url}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            raise ValueError(f"status {response.status}: {(await response.text())[:400]}")
        async for line in response.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise ValueError(str(chunk["error"]))
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
                reason = choice["finish_reason"] or reason
            if chunk.get("usage"):
                num_tokens = chunk["usage"]["completion_tokens"]
    if reason is None:
        raise ValueError("the stream ended without a finish reason")
    return text, reason, num_tokens


def fault_of(text: str, schema: Schema) -> str | None:
    """Return why a text does not obey a schema; None if it does."""
    try:
        jsonschema.validate(json.loads(text), schema, format_checker=FORMATS)
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error).splitlines()[0]
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.schemas", description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--number", type=int, default=500, help="schemas to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the first schema; the next ones follow")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=400)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    given = parser.parse_args(arguments)
    plan = Plan(given.url.rstrip("/"), given.model, given.number, given.seed, given.concurrency, given.max_tokens)
    verdicts = asyncio.run(run(plan))
    print(json.dumps(asdict(verdicts)) if given.json else verdicts)
    return 1 if verdicts.faults else 0


if __name__ == "__main__":
    sys.exit(main())
