"""How a caller of the in-process engine wants tokens to be chosen: the fields of the HTTP API, under the same names.

vLLM's users find their fields here: those that the server takes are taken, the others are refused by name when a
request is made, unless they ask for what is so anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Self

from protocol.errors import InvalidRequest

# What has no field in an HTTP body, with the values that ask for what is so.
_FIXED: Final[dict[str, tuple[Any, ...]]] = {
    "logits_processors": (None, []),
    "spaces_between_special_tokens": (None, True),
    "early_stopping": (None, False),
    "extra_args": (None, {}),
}
_STRUCTURED_FIELDS: Final = (
    *("json", "regex", "choice", "grammar", "json_object", "structural_tag"),
    *("whitespace_pattern", "disable_any_whitespace", "disable_additional_properties"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """What the text must obey: one of these; fields as in the HTTP field `structured_outputs`."""

    json: Any = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    whitespace_pattern: str | None = None


# Not frozen: vLLM's users set fields of theirs. Each request keeps a copy of its own.
@dataclass(slots=True, kw_only=True)
class SamplingParams:
    """Sampling of one request. None leaves a field at its default; bounds are checked when the request is made.

    Attributes:
        n: choices per prompt.
        best_of: nothing but `n`.
        max_tokens: output tokens at most; None is all that the context has room for.
        temperature: 0 is greedy; 1 by default.
        seed: makes the choices repeatable, here and over HTTP.
        stop: a string, or several, that end the text and are not part of it.
        stop_token_ids: tokens that end it.
        detokenize: False leaves the outputs' text empty.
        logit_bias: added to the logits of these token ids, from -100 to 100.
        logprobs: report the log probability of each token and of this many of the likeliest.
        prompt_logprobs: the same for each token of the prompt.
        truncate_prompt_tokens: keep the last so many tokens of the prompt; -1: as many as there is room for.
        structured_outputs: what the text must obey: one of json (a schema, also as text or a pydantic model), regex,
            choice, grammar, json_object, and what else the HTTP field of that name takes.
        guided_decoding: older name of `structured_outputs`.
    """

    n: int | None = None
    best_of: int | None = None
    max_tokens: int | None = 16
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    length_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    allowed_token_ids: Sequence[int] | None = None
    logits_processors: Sequence[Any] | None = None
    use_beam_search: bool | None = None
    early_stopping: bool | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    detokenize: bool | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    structured_outputs: Any = None
    guided_decoding: Any = None
    extra_args: Mapping[str, Any] | None = None

    def clone(self) -> Self:
        """Return a copy."""
        return replace(self)

    def body(self, is_chat: bool) -> dict[str, Any]:
        """Return the fields of an HTTP body that say the same; chat has two of them for log probabilities.

        Raises:
            InvalidRequest: a field asks for what there is not.
        """
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, fixed in _FIXED.items():
            if named.pop(name) not in fixed:
                raise InvalidRequest(f"{name} is not supported", name)
        del named["detokenize"]
        body = {name: value for name, value in named.items() if value is not None}
        if "logit_bias" in body:
            body["logit_bias"] = {str(token_id): bias for token_id, bias in body["logit_bias"].items()}
        if is_chat and "logprobs" in body:
            body |= {"logprobs": True, "top_logprobs": body["logprobs"]}
        older = body.pop("guided_decoding", None)
        if older is not None:
            if "structured_outputs" in body:
                raise InvalidRequest("guided_decoding: is the same as structured_outputs", "guided_decoding")
            body["structured_outputs"] = older
        if "structured_outputs" in body:
            body["structured_outputs"] = _structured(body["structured_outputs"])
        return body


def _structured(given: Any) -> dict[str, Any]:
    """Return the fields that are set of a mapping, or of an object with attributes of these names, such as vLLM's."""
    if isinstance(given, Mapping):
        found = {name: value for name, value in given.items() if value is not None}
    else:
        named = ((name, getattr(given, name, None)) for name in _STRUCTURED_FIELDS)
        found = {name: value for name, value in named if value is not None and value is not False}
    if not found:
        raise InvalidRequest("structured_outputs: say one of json, regex, choice, grammar", "structured_outputs")
    schema: Any = found.get("json")
    if hasattr(schema, "model_json_schema"):
        found["json"] = schema.model_json_schema()
    return found
