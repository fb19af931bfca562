"""What the in-process engine answers. Text and tokens are those that the HTTP API gives for the same request."""

from __future__ import annotations

from dataclasses import dataclass, field

from protocol.request import TokenLogprobs
from router.text import Piece
from router.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural log probability of a token.

    Attributes:
        rank: place among all tokens, the likeliest is 1; None where it is not known.
        decoded_token: its text.
    """

    logprob: float
    rank: int | None
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """One choice.

    Attributes:
        logprobs: for each token, what was asked for by token id: the sampled one and the likeliest; None if not asked.
        finish_reason: "stop" or "length"; None while it is being generated.
        stop_reason: the stop string or stop token id that ended it.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """The sum of the tokens' log probabilities; None if not asked."""
        if self.logprobs is None:
            return None
        return sum(told[token_id].logprob for token_id, told in zip(self.token_ids, self.logprobs, strict=True))

    def finished(self) -> bool:
        """Whether it is complete."""
        return self.finish_reason is not None

    def add(self, piece: Piece, tokenizer: Tokenizer, num_logprobs: int | None, has_text: bool = True) -> None:
        """Append what a piece brings."""
        self.text += piece.text if has_text else ""
        self.token_ids += piece.token_ids
        self.finish_reason = None if piece.finish_reason is None else str(piece.finish_reason)
        self.stop_reason = piece.stop_reason
        if num_logprobs is None:
            return
        self.logprobs = self.logprobs or []
        for logged in piece.logged:
            self.logprobs.append(logprobs_of(tokenizer, logged.token_id, logged.logprobs, num_logprobs))


@dataclass(slots=True)
class RequestMetrics:
    """When what happened, in seconds on the monotonic clock; None is yet to come."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None

    def note(self, now_s: float, is_finished: bool) -> None:
        """Note that tokens have come."""
        self.first_token_time = now_s if self.first_token_time is None else self.first_token_time
        self.finished_time = now_s if is_finished else None


@dataclass(slots=True)
class RequestOutput:
    """What there is of one request.

    Attributes:
        prompt: its text, as given or as the chat template made it.
        outputs: its choices.
        finished: whether every choice is complete.
        num_cached_tokens: prompt tokens whose KV was there already.
        metrics: when it came, had its first token, and was finished.
        prompt_logprobs: for each token of the prompt, as `logprobs` of a choice; None for the first; None if not asked.
    """

    request_id: str
    prompt: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: RequestMetrics | None = None


def logprobs_of(tokenizer: Tokenizer, token_id: int, told: TokenLogprobs, num_top: int) -> dict[int, Logprob]:
    """Return what was told of a token, by token id: its own first, and the `num_top` likeliest."""
    found = {token_id: Logprob(told.logprob, told.rank or None, tokenizer.token_text(token_id))}
    for rank, (other_id, value) in enumerate(told.top[:num_top], 1):
        found.setdefault(other_id, Logprob(value, rank, tokenizer.token_text(other_id)))
    return found
