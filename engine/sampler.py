"""Choose the next token of each row from its logits.

The order of work on a row, as vLLM has it:

    logprobs are taken from the raw logits
    penalties ─► logit bias ─► ending tokens barred before min_tokens ─► argmax if greedy
    ─► temperature ─► min_p ─► top_k ─► top_p ─► inverse of the cumulated distribution at uniform(seed, index)

A row's result depends on its own logits, its sampling parameters, its tokens and the index of the token; on nothing
else, so it is the same whichever worker or batch computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.philox import uniform
from protocol.request import SamplingParams, TokenLogprobs

# Most of the mass of a language model lies in few tokens: sort so many first, all of them only if that is not enough.
_PARTIAL_SORT = 1024


@dataclass(frozen=True, slots=True)
class SampleInput:
    """What the sampler must know of one row besides its logits. `output` holds the tokens before this one."""

    sampling: SamplingParams
    prompt: Sequence[int]
    output: Sequence[int]


@dataclass(frozen=True, slots=True)
class Sampled:
    """The chosen token of one row."""

    token_id: int
    logprobs: TokenLogprobs | None = None


def sample(logits: Tensor, rows: Sequence[SampleInput]) -> list[Sampled]:
    """Choose one token per row.

    Args:
        logits: [num_rows, vocab_size] float32, any device; not changed.
        rows: one per row of logits.

    Synchronises the device: the result is on the host.
    """
    plain = [row.sampling.is_greedy and not _is_adjusted(row) for row in rows]
    likeliest = torch.argmax(logits, dim=-1).tolist() if any(plain) else []
    result = []
    for i, row in enumerate(rows):
        token_id = likeliest[i] if plain[i] else _choose(logits[i], row)
        logprobs = None
        if row.sampling.num_logprobs is not None:
            logprobs = _logprobs(logits[i], token_id, row.sampling.num_logprobs)
        result.append(Sampled(token_id, logprobs))
    return result


def _is_adjusted(row: SampleInput) -> bool:
    p = row.sampling
    penalised = p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
    return penalised or bool(p.logit_bias) or len(row.output) < p.min_tokens


def _choose(logits: Tensor, row: SampleInput) -> int:
    if _is_adjusted(row):
        logits = _adjust(logits.clone(), row)
    if row.sampling.is_greedy:
        return int(torch.argmax(logits))
    return _draw(logits, row.sampling, uniform(row.sampling.seed, len(row.output)))


def _adjust(logits: Tensor, row: SampleInput) -> Tensor:
    """Apply penalties, bias and the bar on ending tokens to one row, in place."""
    p = row.sampling
    if p.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*row.prompt, *row.output}), dtype=torch.int64, device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    if row.output and (p.presence_penalty != 0.0 or p.frequency_penalty != 0.0):
        output = torch.tensor(row.output, dtype=torch.int64, device=logits.device)
        seen, counts = torch.unique(output, return_counts=True)
        logits[seen] -= p.presence_penalty + p.frequency_penalty * counts.to(logits.dtype)
    if p.logit_bias:
        ids = torch.tensor([token_id for token_id, _ in p.logit_bias], dtype=torch.int64, device=logits.device)
        biases = torch.tensor([bias for _, bias in p.logit_bias], dtype=logits.dtype, device=logits.device)
        logits.index_add_(0, ids, biases)
    if len(row.output) < p.min_tokens:
        barred = torch.tensor(p.ending_token_ids, dtype=torch.int64, device=logits.device)
        logits[barred] = -torch.inf
    return logits


def _draw(logits: Tensor, p: SamplingParams, point: float) -> int:
    """Return the token at which the cumulated distribution passes `point`."""
    scaled = logits.double() / p.temperature
    if p.min_p > 0.0:
        scaled = torch.where(scaled >= scaled.max() + torch.log(torch.tensor(p.min_p)), scaled, -torch.inf)
    if p.top_k == 0 and p.top_p >= 1.0:
        return _at(torch.softmax(scaled, dim=-1), point)
    num_kept = min(p.top_k or scaled.numel(), scaled.numel())
    probabilities, token_ids = _sorted_head(scaled, num_kept, p.top_p)
    return int(token_ids[_at(probabilities, point)])


def _sorted_head(scaled: Tensor, num_kept: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the probabilities kept by top_k and then top_p, likeliest first, and their token ids."""
    num_sorted = min(num_kept, _PARTIAL_SORT)
    while True:
        values, token_ids = torch.topk(scaled, num_sorted)
        total = torch.logsumexp(scaled if num_kept == scaled.numel() else values, dim=-1)
        probabilities = torch.exp(values - total)
        cumulated = torch.cumsum(probabilities, dim=-1)
        if num_sorted == num_kept or (num_kept == scaled.numel() and float(cumulated[-1]) >= top_p):
            break
        num_sorted = num_kept
    keep = int((cumulated - probabilities < top_p).sum())
    return probabilities[: max(keep, 1)], token_ids[: max(keep, 1)]


def _at(probabilities: Tensor, point: float) -> int:
    cumulated = torch.cumsum(probabilities, dim=-1)
    index = int(torch.searchsorted(cumulated, point * cumulated[-1], right=True))
    # Rounding may push the point past the end; the last token with any probability stands there.
    return min(index, int(torch.nonzero(probabilities)[-1]))


def _logprobs(logits: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    values = torch.log_softmax(logits.float(), dim=-1)
    top, ids = torch.topk(values, num_top)
    pairs = tuple(zip(ids.tolist(), top.tolist(), strict=True))
    rank = int((values > values[token_id]).sum()) + 1
    return TokenLogprobs(float(values[token_id]), pairs, rank)
