"""Log probabilities of prompts: `echo` together with `logprobs`, and vLLM's `prompt_logprobs`.

1. A job says how many of the likeliest tokens it wants beside each prompt token (`Job.num_prompt_top`). 2. Its prompts
are read first, each row of them, on prefill workers; generation then finds them in the prefix cache. 3. The first token
has nothing before it: its entry is null.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from protocol.readout import ReadPrompt
from protocol.request import TokenLogprobs
from router.core import Core
from router.intake import Job, PromptTokens
from router.logprob_shapes import finite
from router.reading import ReadQuery
from router.responses import CompletionLogprobs
from router.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ReadPrompts:
    """What was read off the prompts of a job: a row for each token but the first."""

    prompts: tuple[PromptTokens, ...]
    rows: list[list[TokenLogprobs]]

    def of(self, prompt: PromptTokens) -> list[TokenLogprobs]:
        """Return the rows of a prompt of the job."""
        return next(rows for known, rows in zip(self.prompts, self.rows, strict=True) if known is prompt)


async def read_prompts(core: Core, job: Job, arrived_s: float) -> ReadPrompts | None:
    """Read the prompts of a job, or None where it does not want them; on cancellation the readouts are cancelled.

    Raises:
        RequestRejected, RequestFailed: it cannot be taken now, or cannot be completed.
    """
    if job.num_prompt_top is None:
        return None
    readout = ReadPrompt(num_top=job.num_prompt_top)
    queries = [ReadQuery(prompt.token_ids, readout) for prompt in job.prompts]
    session = core.open_readouts(queries, job.cache_salt, arrived_s)
    try:
        readings = await session.readings()
    finally:
        session.close()
    packed = [one.prompt for one in readings if one.prompt is not None]
    num_bytes = sum(len(piece) for one in packed for piece in one.values)
    rows = await core.off_loop(num_bytes, lambda: [one.rows() for one in packed])
    return ReadPrompts(job.prompts, rows)


def echoed(
    tokenizer: Tokenizer, prompt: PromptTokens, rows: Sequence[TokenLogprobs], num_top: int
) -> CompletionLogprobs:
    """Return the parallel lists of a completion for its prompt; what follows is appended by `followed_by`."""
    offsets, offset = [], 0
    for token_id in prompt.token_ids:
        offsets.append(offset)
        offset += len(tokenizer.token_text(token_id))
    top: list[dict[str, float] | None] = [None]
    for token_id, row in zip(prompt.token_ids[1:], rows, strict=True):
        top.append(top_of(tokenizer, token_id, row, num_top))
    return CompletionLogprobs(
        text_offset=offsets,
        token_logprobs=[None, *(finite(row.logprob) for row in rows)],
        tokens=[plain_token(tokenizer, token_id) for token_id in prompt.token_ids],
        top_logprobs=top,
    )


def followed_by(prompt: CompletionLogprobs, completion: CompletionLogprobs) -> CompletionLogprobs:
    """Return both, one after the other."""
    return CompletionLogprobs(
        text_offset=prompt.text_offset + completion.text_offset,
        token_logprobs=prompt.token_logprobs + completion.token_logprobs,
        tokens=prompt.tokens + completion.tokens,
        top_logprobs=prompt.top_logprobs + completion.top_logprobs,
    )


def by_token_id(
    tokenizer: Tokenizer, prompt: PromptTokens, rows: Sequence[TokenLogprobs], num_top: int
) -> list[dict[str, Any] | None]:
    """Return `prompt_logprobs` as vLLM does: for each token a map of token ids, its own and the likeliest."""
    found: list[dict[str, Any] | None] = [None]
    for token_id, row in zip(prompt.token_ids[1:], rows, strict=True):
        entries = {token_id: (row.logprob, row.rank)}
        for place, (other_id, logprob) in enumerate(row.top[:num_top]):
            entries.setdefault(other_id, (logprob, place + 1))
        found.append(
            {
                str(one): {"logprob": finite(logprob), "rank": rank, "decoded_token": tokenizer.token_text(one)}
                for one, (logprob, rank) in entries.items()
            }
        )
    return found


def top_of(tokenizer: Tokenizer, token_id: int, row: TokenLogprobs, num_top: int) -> dict[str, float]:
    """Return the likeliest tokens by their names in completions, the token itself among them."""
    found = {plain_token(tokenizer, one): finite(value) for one, value in row.top[:num_top]}
    found.setdefault(plain_token(tokenizer, token_id), finite(row.logprob))
    return found


def plain_token(tokenizer: Tokenizer, token_id: int) -> str:
    """Return a token as completions name it: parts of characters as `bytes:\\xe2`, so that they stay apart."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
