"""Choose the next token of each row from its logits, on the host.

The order of work on a row:

    logprobs are taken from the raw logits
    penalties ─► logit bias ─► ending tokens barred before min_tokens ─► grammar ─► argmax if greedy
    ─► temperature ─► min_p ─► top_k ─► top_p ─► walk in vocabulary order to where random_bits(seed, index) point

`kernels.sampling` says what each of these means and why nothing depends on the order of a sum: distances and weights
are whole numbers. Here the same numbers come from numpy, row by row. A row's result depends on its own logits, its
sampling parameters, its tokens and the index of the token; on nothing else, so it is the same whichever worker, device
or batch computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.grammar import GrammarState, allowed_tokens
from engine.philox import random_bits
from kernels.sampling import (
    DISTANCE_BITS,
    EXP2_COEFFICIENTS,
    EXPONENT_BITS,
    FAR,
    LOG2_E,
    WEIGHT_BITS,
    needed_weight,
    require_vocab_size,
    token_logprobs,
)
from protocol.request import SamplingParams, TokenLogprobs

# Most of the mass of a language model lies in few tokens: sort so many first, all of them only if that is not enough.
_PARTIAL_SORT = 1024
# Numbers that are worked on together stay in the processor's cache.
_NUM_AT_ONCE = 1 << 15

Row = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SampleInput:
    """What the sampler must know of one row besides its logits.

    Attributes:
        output: the tokens before this one.
        grammar: what allows this token and no other; None allows every one.
    """

    sampling: SamplingParams
    prompt: Sequence[int]
    output: Sequence[int]
    grammar: GrammarState | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """The chosen token of one row."""

    token_id: int
    logprobs: TokenLogprobs | None = None


def sample(logits: Tensor, rows: Sequence[SampleInput]) -> list[Sampled]:
    """Choose one token per row.

    Args:
        logits: [num_rows, vocab_size], any float dtype and device; not changed. Raises ValueError beyond
            `kernels.sampling.MAX_VOCAB_SIZE`.
        rows: one per row of logits.

    Synchronises the device: the result is on the host.
    """
    require_vocab_size(logits.shape[1])
    plain = [row.sampling.is_greedy and row.grammar is None and not _is_adjusted(row) for row in rows]
    likeliest = _likeliest(logits) if any(plain) else []
    result = []
    for i, row in enumerate(rows):
        token_id = likeliest[i] if plain[i] else _choose(logits[i], row)
        logprobs = None
        if row.sampling.num_logprobs is not None:
            logprobs = _logprobs(logits[i], token_id, row.sampling.num_logprobs)
        result.append(Sampled(token_id, logprobs))
    return result


def _likeliest(logits: Tensor) -> list[int]:
    """Return each row's argmax, the lowest id of equals; what is not a number counts as -inf."""
    chosen = torch.argmax(logits, dim=-1, keepdim=True)
    # argmax takes a NaN for the largest of all, so it shows in what was chosen.
    if bool(torch.isnan(logits.gather(1, chosen)).any()):
        chosen = torch.argmax(torch.where(logits.isnan(), -torch.inf, logits), dim=-1, keepdim=True)
    token_ids: list[int] = chosen.squeeze(1).tolist()
    return token_ids


def _is_adjusted(row: SampleInput) -> bool:
    p = row.sampling
    penalised = p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
    return penalised or bool(p.logit_bias) or len(row.output) < p.min_tokens


def _choose(logits: Tensor, row: SampleInput) -> int:
    values: Row = logits.float().cpu().numpy()
    if row.grammar is None:
        return _choose_among(values, row)
    # What it bars has no weight: leaving it out chooses the same token in a fraction of the time.
    allowed = np.flatnonzero(allowed_tokens(row.grammar.mask(), len(values)))
    return _choose_among(values, row, allowed)


def _choose_among(values: Row, row: SampleInput, allowed: NDArray[np.int64] | None = None) -> int:
    """Choose a token of one row, of those in `allowed` (ascending); token 0 where none has a logit above -inf."""
    with np.errstate(all="ignore"):  # infinities are meant, as on the device
        if _is_adjusted(row):
            values = _adjust(values.copy(), row)
        if allowed is not None:
            values = values[allowed]
        largest = values.max(initial=-np.inf)
        if np.isnan(largest):
            values = np.where(np.isnan(values), np.float32(-np.inf), values)
            largest = values.max()
        temperature = np.float32(row.sampling.temperature)
        if largest == -np.inf:
            return 0
        if temperature == 0:
            place = int(values.argmax())
        else:
            distances = _distances(values, largest, temperature)
            place = _draw(distances, row.sampling, random_bits(row.sampling.seed, len(row.output)))
    return place if allowed is None else int(allowed[place])


def _adjust(values: Row, row: SampleInput) -> Row:
    """Apply penalties, bias and the bar on ending tokens to one row, in place, as `kernels.sampling.adjust_logits`."""
    p = row.sampling
    if p.repetition_penalty != 1.0:
        seen, repetition = np.array(sorted({*row.prompt, *row.output}), np.int64), np.float32(p.repetition_penalty)
        old = values[seen]
        values[seen] = np.where(old > 0, old / repetition, old * repetition)
    if row.output and (p.presence_penalty != 0.0 or p.frequency_penalty != 0.0):
        seen, counts = np.unique(np.array(row.output, np.int64), return_counts=True)
        presence, frequency = float(np.float32(p.presence_penalty)), float(np.float32(p.frequency_penalty))
        values[seen] = values[seen].astype(np.float64) - (presence + frequency * counts)
    for token_id, bias in p.logit_bias:
        if token_id < len(values):
            values[token_id] += np.float32(bias)
    if len(row.output) < p.min_tokens:
        barred = np.array(p.barred_token_ids, np.int64)
        values[barred[barred < len(values)]] = -np.inf
    return values


def _distances(values: Row, largest: np.float32, temperature: np.float32) -> NDArray[np.int32]:
    """Return how far each token lies below the largest, as `kernels.sampling.token_distances`."""
    scaled = largest - values
    scaled *= np.float32(1.0) / temperature
    scaled *= np.float32(1 << DISTANCE_BITS)
    scaled[values == largest] = 0.0
    np.minimum(scaled, np.float32(FAR), out=scaled)
    return scaled.astype(np.int32)


def _weights(distances: NDArray[np.int32]) -> NDArray[np.uint64]:
    """Return exp(-distance) in whole numbers, as `kernels.sampling.token_weights`."""
    weights = np.empty(distances.size, np.uint64)
    for start in range(0, distances.size, _NUM_AT_ONCE):
        end = start + _NUM_AT_ONCE
        weights[start:end] = _exponentials(distances[start:end])
    return weights


def _exponentials(distances: NDArray[np.int32]) -> NDArray[np.uint64]:
    exponent = distances.astype(np.uint64)
    exponent *= np.uint64(LOG2_E)
    fraction = (exponent >> np.uint64(EXPONENT_BITS - 32)) & np.uint64(0xFFFFFFFF)
    exponent >>= np.uint64(EXPONENT_BITS)
    series = fraction * np.uint64(EXP2_COEFFICIENTS[-1])
    for coefficient in reversed(EXP2_COEFFICIENTS[:-1]):
        series >>= np.uint64(32)
        np.subtract(np.uint64(coefficient), series, out=series)
        series *= fraction
    series >>= np.uint64(32)
    np.subtract(np.uint64(1 << 32), series, out=series)
    series <<= np.uint64(WEIGHT_BITS - 32)
    series >>= exponent
    return series


def _draw(distances: NDArray[np.int32], p: SamplingParams, bits: int) -> int:
    """Return the token at which the cumulated weight of what is kept passes `bits` / 2**64 of its total."""
    token_ids: NDArray[np.int64] | None = None
    if 0 < p.top_k < distances.size:
        # Weights never grow with distance, so that min_p and top_k may take their turns in any order.
        token_ids = np.flatnonzero(distances <= np.partition(distances, p.top_k - 1)[p.top_k - 1])
        distances = distances[token_ids]
    weights = _weights(distances)
    if p.min_p > 0.0:
        weights[weights < np.uint64(float(np.float32(p.min_p)) * (1 << WEIGHT_BITS))] = 0
    top_p = float(np.float32(p.top_p))
    if top_p < 1.0:
        weights[distances > _nucleus(distances, weights, needed_weight(int(weights.sum()), top_p))] = 0
    cumulated = np.cumsum(weights)
    place = int(np.searchsorted(cumulated, np.uint64((bits * int(cumulated[-1])) >> 64), side="right"))
    return place if token_ids is None else int(token_ids[place])


def _nucleus(distances: NDArray[np.int32], weights: NDArray[np.uint64], needed: int) -> np.int32:
    """Return the smallest distance up to which the weights sum up to `needed`."""
    order: NDArray[np.int64] | None = None
    if distances.size > _PARTIAL_SORT:
        nearest = np.argpartition(distances, _PARTIAL_SORT - 1)[:_PARTIAL_SORT]
        order = nearest[np.argsort(distances[nearest])] if int(weights[nearest].sum()) >= needed else None
    if order is None:
        order = np.argsort(distances)
    place = np.searchsorted(np.cumsum(weights[order]), np.uint64(needed))
    return np.int32(distances[order[place]])


def _logprobs(logits: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    token_ids = torch.tensor([token_id], device=logits.device)
    chosen, rank, top_ids, top_values = token_logprobs(logits.unsqueeze(0), token_ids, num_top)
    pairs = tuple(zip(top_ids[0].tolist(), top_values[0].tolist(), strict=True))
    return TokenLogprobs(float(chosen), pairs, int(rank))
