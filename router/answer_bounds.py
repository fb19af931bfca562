"""How much one answer may say: log probabilities are asked for by the product of four numbers, each of them harmless.

A value is one log probability with its token: choices x tokens x (1 + the likeliest beside each), for what is generated
and for what is told of prompts. It takes some 40 bytes of an answer, and three times as much while it is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from protocol.errors import InvalidRequest
from protocol.readout import MAX_PROMPT_VALUES
from router.api import ChatRequest, CompletionRequest, GenerationFields

MAX_ANSWER_VALUES: Final = 1 << 20


class AnswerBound:
    """Holds requests against one limit."""

    def __init__(self, max_values: int = MAX_ANSWER_VALUES) -> None:
        self._max_values = max_values

    def check_prompts(self, request: GenerationFields, num_tokens: Sequence[int]) -> None:
        """Raise InvalidRequest if what an answer says of prompts of so many tokens is too much."""
        num_top = num_prompt_top(request, num_tokens)
        is_completion = isinstance(request, CompletionRequest)
        is_echoed = isinstance(request, CompletionRequest) and bool(request.echo)
        if num_top is None and not request.return_token_ids and not is_echoed:
            return
        # Each choice of a completion repeats its prompt.
        total, n = sum(num_tokens), request.n or 1 if is_completion else 1
        width = 1 if num_top is None else 1 + num_top
        if total * n * width > self._max_values:
            raise InvalidRequest(
                f"prompt: {total} tokens of {len(num_tokens)} prompts x n ({n}) x {width} values each are "
                f"{total * n * width}; one answer may hold {self._max_values}",
                "prompt",
            )

    def most_tokens(self, request: GenerationFields, num_choices: int) -> int | None:
        """Return how many tokens with log probabilities each choice may have; None: as many as fit the context.

        Raises:
            InvalidRequest: it asks for more.
        """
        num_top = num_logprobs(request)
        if num_top is None:
            return None
        most = self._max_values // (num_choices * (1 + num_top))
        asked, param = request.max_tokens, "max_tokens"
        if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
            asked, param = request.max_completion_tokens, "max_completion_tokens"
        least = max(1, asked or 1)
        if least > most:
            raise InvalidRequest(
                f"{param}: {num_choices} choices x {least} tokens x {1 + num_top} log probabilities each are "
                f"{num_choices * least * (1 + num_top)}; one answer may hold {self._max_values}",
                param,
            )
        return most


def num_logprobs(request: GenerationFields) -> int | None:
    """Return how many of the likeliest tokens are told beside each generated one; None for no log probabilities."""
    if isinstance(request, CompletionRequest):
        return request.logprobs
    assert isinstance(request, ChatRequest)
    if not request.logprobs:
        if request.top_logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", "top_logprobs")
        return None
    return request.top_logprobs or 0


def num_prompt_top(request: GenerationFields, num_tokens: Sequence[int]) -> int | None:
    """Return how many of the likeliest tokens are to be read beside each prompt token, or None to read none."""
    if request.prompt_logprobs is not None and request.stream:
        raise InvalidRequest("prompt_logprobs: not available in a stream", "prompt_logprobs")
    wanted = [] if request.prompt_logprobs is None else [(request.prompt_logprobs, "prompt_logprobs")]
    if isinstance(request, CompletionRequest) and request.echo and request.logprobs is not None:
        wanted.append((request.logprobs, "logprobs"))
    for num_top, param in wanted:
        for num_of_prompt in num_tokens:
            if num_of_prompt * (1 + num_top) > MAX_PROMPT_VALUES:
                raise InvalidRequest(
                    f"{param}: {num_of_prompt} prompt tokens with {1 + num_top} log probabilities each are "
                    f"more than {MAX_PROMPT_VALUES}",
                    param,
                )
    return max((num_top for num_top, _ in wanted), default=None)
