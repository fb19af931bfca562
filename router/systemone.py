"""`/v1/systemone` in System One's shape: a state, and a map of typed questions about it.

    noul     is it true?       noul: the probability of yes
    choice   which option?     choice, confidence, a probability for each option
    score    which level?      score (the mean level, from 0), legend, confidence, a probability for each level

State, instructions and descriptions may be text or JSON. `option_mass` is ours: see router/questions.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from protocol.errors import InvalidRequest
from router.api import Short
from router.deciding import MAX_QUESTIONS, AskedState, Inquiry, Verdict
from router.decisions import MAX_LEVELS, json_text
from router.question_prompts import Asked
from router.questions import MAX_OPTIONS, Distribution, Option, Question, choice, score, yes_no
from router.responses import encode_json

Words = str | dict[str, Any] | list[Any]


class NoulCriteria(msgspec.Struct, frozen=True, kw_only=True):
    """What yes and no mean."""

    yes: Words | None = msgspec.field(default=None, name="true")
    no: Words | None = msgspec.field(default=None, name="false")


class Noul(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="noul"):
    """Yes or no; instructions, criteria or both."""

    instructions: Words | None = None
    criteria: NoulCriteria | None = None


class Choice(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="choice"):
    """One option of several: each name with a description, or null."""

    criteria: Annotated[dict[str, Words | None], Meta(min_length=2, max_length=MAX_OPTIONS)]
    instructions: Words | None = None


class Score(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="score"):
    """A level of a scale, from the lowest."""

    criteria: Annotated[list[Words], Meta(min_length=2, max_length=MAX_LEVELS)]
    instructions: Words | None = None


class SystemOneRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of /v1/systemone."""

    state: Words
    questions: Annotated[dict[Short, Noul | Choice | Score], Meta(min_length=1, max_length=MAX_QUESTIONS)]
    model: Annotated[str, Meta(max_length=1024)] | None = None
    cache_salt: Short | None = None


def inquiry_of(request: SystemOneRequest) -> Inquiry:
    """Return what is asked.

    Raises:
        InvalidRequest: it cannot be asked; names the field.
    """
    asked = tuple(
        Asked(_question(question, f"questions.{name}"), f"questions.{name}")
        for name, question in request.questions.items()
    )
    return Inquiry(request.model, (AskedState(_words(request.state), asked, "state"),), request.cache_salt or "")


def parts(request: SystemOneRequest, verdict: Verdict, model: str) -> Iterator[bytes]:
    """Give the body of the response, an answer at a time; `model` is the name that is served."""
    yield b'{"answers":{'
    for place, ((name, question), found) in enumerate(zip(request.questions.items(), verdict.answers, strict=True)):
        yield (b"," if place else b"") + encode_json({name: _answer(question, found)})[1:-1]
    rest = encode_json(
        {
            "model": request.model or model,
            "usage": {
                "input_tokens": verdict.usage.num_input_tokens,
                "input_tokens_details": {"cached_tokens": verdict.usage.num_cached_tokens},
                "output_tokens": 0,
                "total_tokens": verdict.usage.num_input_tokens,
            },
        }
    )
    yield b"}," + rest[1:]


def _answer(question: Noul | Choice | Score, found: Distribution) -> dict[str, Any]:
    if isinstance(question, Noul):
        return {"type": "noul", "noul": found.probabilities[0], "option_mass": found.option_mass}
    shown: dict[str, Any] = {"confidence": found.confidence, "option_mass": found.option_mass}
    if isinstance(question, Choice):
        names = list(question.criteria)
        probabilities = dict(zip(names, found.probabilities, strict=True))
        return {"type": "choice", "choice": names[found.best], "probabilities": probabilities, **shown}
    levels = {str(place): level for place, level in enumerate(question.criteria)}
    probabilities = dict(zip(levels, found.probabilities, strict=True))
    return {"type": "score", "score": found.expected, "legend": levels, "probabilities": probabilities, **shown}


def _question(question: Noul | Choice | Score, param: str) -> Question:
    instructions = _words(question.instructions).strip()
    if isinstance(question, Noul):
        criteria = question.criteria or NoulCriteria()
        yes, no = _words(criteria.yes), _words(criteria.no)
        if not (instructions or yes or no):
            raise InvalidRequest(f"{param}: give instructions or criteria", "questions")
        return yes_no(instructions, yes, no)
    if isinstance(question, Choice):
        return choice(instructions, [Option(name, _words(text)) for name, text in question.criteria.items()])
    return score(instructions, [Option(_words(level)) for level in question.criteria])


def _words(value: Words | None) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json_text(value)
