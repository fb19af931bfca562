"""What the in-process engine answers. Text and tokens are those that the HTTP API gives for the same request."""

from __future__ import annotations

from dataclasses import dataclass, field

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

    def add(self, piece: Piece, tokenizer: Tokenizer, num_logprobs: int | None) -> None:
        """Append what a piece brings."""
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.finish_reason = None if piece.finish_reason is None else str(piece.finish_reason)
        self.stop_reason = piece.stop_reason
        if num_logprobs is None:
            return
        self.logprobs = self.logprobs or []
        for logged in piece.logged:
            told = logged.logprobs
            ranked = enumerate(told.top[:num_logprobs], 1)
            found = {token: Logprob(value, rank, tokenizer.token_text(token)) for rank, (token, value) in ranked}
            own = Logprob(told.logprob, told.rank or None, tokenizer.token_text(logged.token_id))
            self.logprobs.append({logged.token_id: own} | found | {logged.token_id: own})


@dataclass(slots=True)
class RequestOutput:
    """What there is of one request.

    Attributes:
        prompt: its text, as given or as the chat template made it.
        outputs: its choices.
        finished: whether every choice is complete.
        num_cached_tokens: prompt tokens whose KV was there already.
    """

    request_id: str
    prompt: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    num_cached_tokens: int = 0
