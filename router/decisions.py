"""`/v1/decisions` in OpenAI's shape: an input, 1 to 400 questions about it, answers in their order.

    predicate   how likely a statement is true        probability
    choice      which of 2 to 255 values fits         choice, confidence, a probability for each
    score       where on 2 to 10 levels it stands     score (the mean level, from 0), confidence, a probability for each

The input is a text, or an ordered list of messages, function calls and their outputs; a list becomes one text, since
the state must stand in a single message for any chat template. `option_mass` is ours: see router/questions.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from protocol.errors import InvalidRequest
from router.api import Short
from router.deciding import MAX_QUESTIONS, AskedState, Inquiry, Verdict
from router.question_prompts import Asked
from router.questions import MAX_OPTIONS, Distribution, Option, Question, choice, score, yes_no
from router.responses import encode_json

MAX_LEVELS: Final = 10
_ROLES: Final = ("user", "assistant", "system", "developer")
_IMAGES: Final = "images are not supported by this server"


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a content: input_text, output_text, refusal or input_json."""

    type: Short
    text: str | None = None
    refusal: str | None = None
    data: dict[str, Any] | list[dict[str, Any]] | None = None


Content = str | Annotated[list[Part], Meta(max_length=4096)]


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """A message, a call, or the output of one."""

    type: Short = "message"
    role: Short | None = None
    content: Content | None = None
    call_id: Short | None = None
    name: Short | None = None
    arguments: str | None = None
    input: str | None = None
    output: Content | None = None


class ChoiceOption(msgspec.Struct, frozen=True, kw_only=True):
    """A value that may be chosen; a string and a boolean of the same text differ."""

    value: str | bool
    description: str | None = None


class ScoreLevel(msgspec.Struct, frozen=True, kw_only=True):
    """A level of a score."""

    label: Annotated[str, Meta(min_length=1)]
    description: str | None = None


class Predicate(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="predicate"):
    """How likely is a statement true?"""

    instructions: Content
    name: Short | None = None


class Choice(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="choice"):
    """Which value fits?"""

    instructions: Content
    choices: Annotated[list[ChoiceOption], Meta(min_length=2, max_length=MAX_OPTIONS)]
    name: Short | None = None


class Score(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="score"):
    """Which level fits?"""

    instructions: Content
    levels: Annotated[list[ScoreLevel], Meta(min_length=2, max_length=MAX_LEVELS)]
    name: Short | None = None


class DecisionsRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of /v1/decisions. `prompt_cache_key` partitions the prefix cache."""

    model: Annotated[str, Meta(max_length=1024)] | None = None
    input: str | Annotated[list[Item], Meta(min_length=1, max_length=4096)]
    questions: Annotated[list[Predicate | Choice | Score], Meta(min_length=1, max_length=MAX_QUESTIONS)]
    prompt_cache_key: Short | None = None


def inquiry_of(request: DecisionsRequest) -> Inquiry:
    """Return what is asked.

    Raises:
        InvalidRequest: it cannot be asked; names the field.
    """
    asked = tuple(Asked(_question(q, f"questions[{i}]"), f"questions[{i}]") for i, q in enumerate(request.questions))
    state = request.input if isinstance(request.input, str) else _conversation(request.input)
    return Inquiry(request.model, (AskedState(state, asked, "input"),), request.prompt_cache_key or "")


def answer(request: DecisionsRequest, verdict: Verdict) -> bytes:
    """Return the body of the response."""
    return b"".join(parts(request, verdict))


def parts(request: DecisionsRequest, verdict: Verdict) -> Iterator[bytes]:
    """Give the body of the response, an answer at a time."""
    usage = verdict.usage
    yield b'{"answers":['
    for place, (question, found) in enumerate(zip(request.questions, verdict.answers, strict=True)):
        yield (b"," if place else b"") + encode_json(_answer(question, found))
    rest = encode_json(
        {
            "model": request.model,
            "usage": {
                "input_tokens": usage.num_input_tokens,
                "input_tokens_details": {
                    "cached_tokens": usage.num_cached_tokens,
                    "cache_write_tokens": max(0, usage.num_shared_tokens - usage.num_cached_tokens),
                },
                "output_tokens": 0,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.num_input_tokens,
            },
        }
    )
    yield b"]," + rest[1:]


def json_text(value: Any) -> str:
    """Return JSON as the compact text that a model reads.

    Raises:
        InvalidRequest: it is nested too deeply.
    """
    try:
        return encode_json(value).decode()
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error


def _answer(question: Predicate | Choice | Score, found: Distribution) -> dict[str, Any]:
    shown: dict[str, Any] = {"name": question.name, "option_mass": found.option_mass}
    if isinstance(question, Predicate):
        return {"type": "predicate", "probability": found.probabilities[0], **shown}
    if isinstance(question, Choice):
        values = [option.value for option in question.choices]
        pairs = zip(values, found.probabilities, strict=True)
        return {
            "type": "choice",
            "choice": values[found.best],
            "confidence": found.confidence,
            "probabilities": [{"value": value, "probability": probability} for value, probability in pairs],
            **shown,
        }
    levels = zip(question.levels, found.probabilities, strict=True)
    return {
        "type": "score",
        "score": found.expected,
        "confidence": found.confidence,
        "probabilities": [
            {"value": place, "label": level.label, "probability": probability}
            for place, (level, probability) in enumerate(levels)
        ],
        **shown,
    }


def _question(question: Predicate | Choice | Score, param: str) -> Question:
    instructions = _text(question.instructions, f"{param}.instructions").strip()
    if not instructions:
        raise InvalidRequest(f"{param}.instructions: must not be empty", param)
    if isinstance(question, Predicate):
        return yes_no(instructions)
    if isinstance(question, Choice):
        values = [(type(option.value), option.value) for option in question.choices]
        if len(set(values)) < len(values):
            raise InvalidRequest(f"{param}.choices: each value may be given once", param)
        named = [(option.value, option.description) for option in question.choices]
        return choice(instructions, [Option(_value_text(value), text or "") for value, text in named])
    return score(instructions, [Option(level.label, level.description or "") for level in question.levels])


def _value_text(value: str | bool) -> str:
    return value if isinstance(value, str) else str(value).lower()


# --- the input as one text ---


def _conversation(items: list[Item]) -> str:
    """Return the items as one text: a lone message of the user as it is, else each with who said it."""
    parts = list(_speeches(items))
    if len(parts) == 1 and parts[0][0] == "user":
        return parts[0][1]
    return "\n\n".join(f"{who}: {text}" for who, text in parts)


def _speeches(items: list[Item]) -> Iterator[tuple[str, str]]:
    names: dict[str, str] = {}
    for i, item in enumerate(items):
        param = f"input[{i}]"
        if item.type == "message":
            if item.role not in _ROLES:
                raise InvalidRequest(f"{param}.role: must be one of {', '.join(_ROLES)}", "input")
            yield item.role, _text(_required(item.content, f"{param}.content"), f"{param}.content")
        elif item.type in ("function_call", "custom_tool_call"):
            field = "arguments" if item.type == "function_call" else "input"
            said = _required(getattr(item, field), f"{param}.{field}")
            name = names[_required(item.call_id, f"{param}.call_id")] = _required(item.name, f"{param}.name")
            yield f"call of {name}", said
        elif item.type in ("function_call_output", "custom_tool_call_output"):
            call_id = _required(item.call_id, f"{param}.call_id")
            if call_id not in names:
                raise InvalidRequest(f"{param}.call_id: no call {call_id[:64]!r} comes before this output", "input")
            yield f"output of {names[call_id]}", _text(_required(item.output, f"{param}.output"), f"{param}.output")
        else:
            raise InvalidRequest(f"{param}.type: {item.type!r} is not supported by this server", "input")


def _required(value: Any, param: str) -> Any:
    if value is None:
        raise InvalidRequest(f"{param}: this field is required", param.partition("[")[0])
    return value


def _text(content: Content, param: str) -> str:
    return content if isinstance(content, str) else "\n".join(_part(part, param) for part in content)


def _part(part: Part, param: str) -> str:
    top = param.partition("[")[0]
    found: Any
    match part.type:
        case "input_text" | "output_text":
            found = part.text
        case "refusal":
            found = part.refusal
        case "input_json":
            found = None if part.data is None else json_text(part.data)
        case "input_image":
            raise InvalidRequest(f"{param}: {_IMAGES}", top)
        case _:
            raise InvalidRequest(f"{param}: parts of type {part.type!r} are not supported by this server", top)
    if found is None:
        raise InvalidRequest(f"{param}: a part of type {part.type} lacks what its type names", top)
    return str(found)
