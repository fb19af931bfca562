"""Log probabilities as chat and responses report them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from router.responses import TokenLogprob, TopLogprob
from router.text import LoggedToken
from router.tokenizer import Tokenizer

# JSON has no infinities; clients expect this number for a token that could not be.
LOWEST_LOGPROB: Final = -9999.0


def chat_logprobs(tokenizer: Tokenizer, logged: Iterable[LoggedToken], num_top: int) -> list[TokenLogprob]:
    """Return tokens with the `num_top` likeliest beside each."""
    found = []
    for token in logged:
        top = [_one(tokenizer, token_id, logprob) for token_id, logprob in token.logprobs.top[:num_top]]
        one = _one(tokenizer, token.token_id, token.logprobs.logprob)
        found.append(TokenLogprob(token=one.token, logprob=one.logprob, bytes=one.bytes, top_logprobs=top))
    return found


def finite(value: float) -> float:
    """Return a log probability that JSON can hold."""
    # Also true for NaN, which compares with nothing.
    return value if value > LOWEST_LOGPROB else LOWEST_LOGPROB


def _one(tokenizer: Tokenizer, token_id: int, logprob: float) -> TopLogprob:
    data = tokenizer.token_bytes(token_id)
    return TopLogprob(token=data.decode("utf-8", "replace"), logprob=finite(logprob), bytes=list(data))
