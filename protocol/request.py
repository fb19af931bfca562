"""Requests as workers see them: token ids and sampling parameters, never text."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec

MAX_SEED = (1 << 63) - 1
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_GRAMMAR_BYTES = 1 << 16  # as the wire's strings

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class FinishReason(StrEnum):
    """Why a sequence ended; the values are OpenAI's."""

    STOP = "stop"
    LENGTH = "length"


class GrammarKind(StrEnum):
    """What the text of a grammar is."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    LARK = "lark"


class Grammar(msgspec.Struct, frozen=True, kw_only=True):
    """What the output of one sequence must be a sentence of.

    Attributes:
        text: a JSON schema, a regular expression (Rust's syntax, matched against the whole output), a JSON list of the
            strings to choose from, or a grammar in llguidance's dialect of Lark.
        whitespace_pattern: of a JSON schema: what may stand between two tokens of JSON; None is one space or nothing.
    """

    kind: GrammarKind
    text: Annotated[str, msgspec.Meta(max_length=MAX_GRAMMAR_BYTES)]
    whitespace_pattern: Annotated[str, msgspec.Meta(max_length=256)] | None = None


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the tokens of one sequence are chosen.

    Attributes:
        seed: 0 <= seed < 2**63. Together with the token's index it is the only source of randomness, so any worker
            draws the same token.
        temperature: 0 is greedy.
        top_k: 0 keeps every token.
        stop_token_ids: end the sequence; the token itself is reported.
        eos_token_ids: as above unless `ignore_eos`; never sampled before `min_tokens`.
        num_logprobs: None reports none; n reports the sampled token and the n likeliest, of the model's own
            distribution (before penalties and temperature).
        logit_bias: pairs (token id, added value).
        grammar: what the output must obey, None for anything. An EOS token is then possible only where the output is
            complete, and never with `ignore_eos`; `min_tokens` bars EOS but no other token, since the grammar may need
            it; and the sequence ends, whatever `min_tokens` says, with the token after which nothing may follow.
    """

    seed: Annotated[int, msgspec.Meta(ge=0, le=MAX_SEED)]
    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=100.0)] = 1.0
    top_k: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)] = 0
    top_p: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 1.0
    min_p: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0.0, le=100.0)] = 1.0
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2.0, le=2.0)] = 0.0
    logit_bias: Annotated[tuple[tuple[TokenId, float], ...], msgspec.Meta(max_length=MAX_LOGIT_BIAS)] = ()
    max_tokens: Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)] = 16
    min_tokens: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)] = 0
    ignore_eos: bool = False
    stop_token_ids: Annotated[tuple[TokenId, ...], msgspec.Meta(max_length=MAX_STOP_TOKEN_IDS)] = ()
    eos_token_ids: Annotated[tuple[TokenId, ...], msgspec.Meta(max_length=64)] = ()
    num_logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    grammar: Grammar | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether no randomness is involved."""
        return self.temperature == 0.0

    @property
    def ending_token_ids(self) -> tuple[int, ...]:
        """Token ids that end the sequence once `min_tokens` are out."""
        return self.stop_token_ids if self.ignore_eos else self.stop_token_ids + self.eos_token_ids

    @property
    def barred_token_ids(self) -> tuple[int, ...]:
        """Token ids that are not sampled before `min_tokens` are out."""
        if self.grammar is None:
            return self.ending_token_ids
        return () if self.ignore_eos else self.eos_token_ids

    def finish_reason(self, token_id: int, num_output_tokens: int, room_tokens: int) -> FinishReason | None:
        """Tell whether the sequence ends with this token.

        Args:
            token_id: the token just sampled.
            num_output_tokens: how many tokens are out, this one included.
            room_tokens: how many more tokens the context can hold after this one.
        """
        if num_output_tokens >= self.min_tokens and token_id in self.ending_token_ids:
            return FinishReason.STOP
        if num_output_tokens >= self.max_tokens or room_tokens <= 0:
            return FinishReason.LENGTH
        return None


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probability of one sampled token and of the likeliest ones, natural logarithm."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 0


class TokenRow(msgspec.Struct, frozen=True, array_like=True):
    """One token of one placement of a request; `index` counts output tokens from 0."""

    request_id: int
    epoch: int
    index: int
    token_id: int
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None
