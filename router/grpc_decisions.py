"""Decide over gRPC: a message becomes the body that it is over HTTP, the answer to that body a message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from protocol.errors import InvalidRequest
from router.rpc import baton_v1_pb2 as pb


def decisions_body(request: pb.DecideRequest, default_model: str) -> dict[str, Any]:
    """Return the body of /v1/decisions that says the same.

    Raises:
        InvalidRequest: there is no input or two, a question is of no kind, or JSON is none.
    """
    if request.HasField("input") == bool(request.items):
        raise InvalidRequest("input: give either input or items", "input")
    body: dict[str, Any] = {"model": request.model or default_model}
    body["input"] = request.input if request.HasField("input") else [_item(item) for item in request.items]
    body["questions"] = [_question(question, i) for i, question in enumerate(request.questions)]
    return body | _set_in(request, "prompt_cache_key")


def decide_response(answer: bytes) -> pb.DecideResponse:
    """Return the message of the body that answers /v1/decisions."""
    told = msgspec.json.decode(answer)
    usage = told["usage"]
    details = usage.pop("input_tokens_details")
    del usage["output_tokens_details"]
    response = pb.DecideResponse(model=told["model"], usage=pb.DecideUsage(**usage, **details))
    for one in told["answers"]:
        response.answers.append(_answer(one))
    return response


def _answer(told: Mapping[str, Any]) -> pb.Answer:
    answer = pb.Answer(name=told["name"], option_mass=told["option_mass"])
    kind = told["type"]
    if kind == "predicate":
        answer.predicate.probability = told["probability"]
    elif kind == "choice":
        found = answer.choice
        found.choice.CopyFrom(_value(told["choice"]))
        found.confidence = told["confidence"]
        for one in told["probabilities"]:
            found.probabilities.add(value=_value(one["value"]), probability=one["probability"])
    else:
        answer.score.score, answer.score.confidence = told["score"], told["confidence"]
        for one in told["probabilities"]:
            answer.score.probabilities.add(**one)
    return answer


def _value(value: str | bool) -> pb.ChoiceValue:
    return pb.ChoiceValue(bool_value=value) if isinstance(value, bool) else pb.ChoiceValue(string_value=value)


def _question(question: pb.Question, i: int) -> dict[str, Any]:
    kind = question.WhichOneof("kind")
    if kind is None:
        raise InvalidRequest(f"questions[{i}]: must be a predicate, a choice or a score", "questions")
    plain = {"type": kind, "instructions": _content(question.instructions), **_set_in(question, "name")}
    if kind == "choice":
        plain["choices"] = [_option(option, i) for option in question.choice.choices]
    elif kind == "score":
        plain["levels"] = [{"label": one.label, **_set_in(one, "description")} for one in question.score.levels]
    return plain


def _option(option: pb.ChoiceOption, i: int) -> dict[str, Any]:
    which = option.value.WhichOneof("value")
    if which is None:
        raise InvalidRequest(f"questions[{i}].choices: an option has no value", "questions")
    return {"value": getattr(option.value, which), **_set_in(option, "description")}


def _item(item: pb.InputItem) -> dict[str, Any]:
    plain = _set_in(item, "type", "role", "call_id", "name", "arguments", "input")
    for name in ("content", "output"):
        if item.HasField(name):
            plain[name] = _content(getattr(item, name))
    return plain


def _content(content: pb.Content) -> str | list[dict[str, Any]]:
    if content.HasField("text"):
        return content.text
    return [_part(part) for part in content.parts]


def _part(part: pb.DecisionPart) -> dict[str, Any]:
    plain = {"type": part.type, **_set_in(part, "text", "refusal")}
    if part.HasField("data"):
        try:
            plain["data"] = msgspec.json.decode(part.data)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise InvalidRequest(f"data: not valid JSON: {error}", "data") from error
    return plain


def _set_in(message: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(message, name) for name in names if message.HasField(name)}
