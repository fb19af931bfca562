"""Log probabilities of prompts: `echo` together with `logprobs`, and vLLM's `prompt_logprobs`.

1. A job says how many of the likeliest tokens it wants beside each prompt token (`Job.num_prompt_top`). 2. Its prompts
are read first, each row of them, on prefill workers; generation then finds them in the prefix cache. 3. The first token
has nothing before it: its entry is null.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from protocol.readout import PromptLogprobs, ReadPrompt
from protocol.request import TokenLogprobs
from router.core import Core
from router.intake import Job, PromptTokens
from router.logprob_lists import LogprobLists, batches, raw_items
from router.logprob_shapes import finite
from router.reading import ReadQuery
from router.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ReadPrompts:
    """What was read off the prompts of a job: a row for each token but the first."""

    prompts: tuple[PromptTokens, ...]
    found: tuple[PromptLogprobs, ...]

    def of(self, prompt: PromptTokens) -> Iterator[TokenLogprobs]:
        """Give the rows of a prompt of the job, each made when it is asked for."""
        return next(one.each_row() for known, one in zip(self.prompts, self.found, strict=True) if known is prompt)


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
    return ReadPrompts(job.prompts, tuple(one.prompt for one in readings if one.prompt is not None))


def echo_steps(
    tokenizer: Tokenizer, prompt: PromptTokens, rows: Iterable[TokenLogprobs], num_top: int, found: LogprobLists
) -> Iterator[None]:
    """Append the lists of a completion for its prompt, a few tokens a step."""
    every_row: Iterator[TokenLogprobs | None] = chain([None], rows)
    logged = zip(prompt.token_ids, echo_offsets(tokenizer, prompt), every_row, strict=True)
    for some in batches(logged):
        found.add(
            [offset for _, offset, _ in some],
            [None if row is None else finite(row.logprob) for *_, row in some],
            [plain_token(tokenizer, token_id) for token_id, *_ in some],
            [None if row is None else top_of(tokenizer, token_id, row, num_top) for token_id, _, row in some],
        )
        yield


def by_token_id(
    tokenizer: Tokenizer, prompt: PromptTokens, rows: Iterable[TokenLogprobs], num_top: int, found: list[bytes]
) -> Iterator[None]:
    """Append `prompt_logprobs` as vLLM has it, a few tokens a step: maps of token ids, its own and the likeliest."""
    found.append(b"null")
    for some in batches(zip(prompt.token_ids[1:], rows, strict=True)):
        found.append(raw_items([_entry(tokenizer, token_id, row, num_top) for token_id, row in some]))
        yield


def _entry(tokenizer: Tokenizer, token_id: int, row: TokenLogprobs, num_top: int) -> dict[str, Any]:
    entries = {token_id: (row.logprob, row.rank)}
    for place, (other_id, logprob) in enumerate(row.top[:num_top]):
        entries.setdefault(other_id, (logprob, place + 1))
    return {
        str(one): {"logprob": finite(logprob), "rank": rank, "decoded_token": tokenizer.token_text(one)}
        for one, (logprob, rank) in entries.items()
    }


def echo_offsets(tokenizer: Tokenizer, prompt: PromptTokens) -> Iterator[int]:
    """Give where in the echoed text each token of a prompt begins; parts of one character share its place.

    A token that frames the prompt is not in the text that a client wrote, and takes no room; nor does the blank that
    some tokenizers put before a text.
    """
    text, at = prompt.echo, 0
    decoder = tokenizer.stream_decoder(skip_special=False)
    for token_id in prompt.token_ids:
        yield min(at + decoder.num_broken(token_id), len(text))
        piece = decoder.feed(token_id)
        if text.startswith(piece, at):
            at += len(piece)
        elif piece.startswith(" ") and text.startswith(piece[1:], at):
            at += len(piece) - 1
        elif not tokenizer.is_special(token_id):
            at = min(at + len(piece), len(text))


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
