"""How a caller of the in-process engine wants tokens to be chosen: the fields of the HTTP API, under the same names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling of one request. None leaves a field at its default; bounds are checked when the request is made.

    Attributes:
        n: choices per prompt.
        max_tokens: output tokens at most; None is all that the context has room for.
        temperature: 0 is greedy; 1 by default.
        seed: makes the choices repeatable, here and over HTTP.
        stop: a string, or several, that end the text and are not part of it.
        stop_token_ids: tokens that end it.
        logit_bias: added to the logits of these token ids, from -100 to 100.
        prompt_logprobs: the same for each token of the prompt.
        structured_outputs: what the text must obey: one of json (a schema), regex, choice, grammar, json_object, and
            what else the HTTP field of that name takes.
        logprobs: report the log probability of each token and of this many of the likeliest.
    """

    n: int | None = None
    max_tokens: int | None = 16
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: Mapping[str, Any] | None = None

    def body(self, is_chat: bool) -> dict[str, Any]:
        """Return the fields of an HTTP body that say the same; chat has two of them for log probabilities."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        body = {name: value for name, value in named.items() if value is not None}
        if "logit_bias" in body:
            body["logit_bias"] = {str(token_id): bias for token_id, bias in body["logit_bias"].items()}
        if is_chat and "logprobs" in body:
            body |= {"logprobs": True, "top_logprobs": body["logprobs"]}
        return body
