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
`response_format`. How the answers are shown stands in examples/candidates_report.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
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
