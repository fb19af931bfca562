"""Choose the next token of each lane: what every sampler computes, and its plain-torch reference.

The order of work on one lane, from its logits:

    repetition ─► presence, frequency ─► bias ─► endings barred before min_tokens ─► grammar   (`adjust_logits`)
    ─► argmax if greedy
    ─► distances ─► weights ─► min_p ─► top_k ─► top_p ─► draw                                 (`choose_tokens`)

A token's distance is the largest logit less its own, over the temperature, in whole units of 2**-26. Its weight is
exp(-distance) in whole units of 2**-44 (`token_weights`), found with integers alone. From there on nothing is rounded,
so no order of summation matters, and the host's sampler (engine/sampler.py), this one and the GPU's choose the same
token from the same logits, always.

    min_p   keeps tokens with at least that share of the likeliest token's weight.
    top_k   keeps every token whose distance is at most the k-th smallest: ties at the cut stay together.
    top_p   then keeps every token up to the smallest distance by which that share of the kept weight is reached.
    draw    walks what is kept in vocabulary order, to where the cumulated weight passes (64 random bits) / 2**64 of
            the total. The bits are Philox's of (seed, index): see engine/philox.py.

A logit that is not a number counts as -inf. A lane without any logit above -inf gives token 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Weights are at most 2**44, so the sum over this many tokens still fits 63 bits.
MAX_VOCAB_SIZE = (1 << 19) - 1
WEIGHT_BITS = 44
DISTANCE_BITS = 26
# The largest distance, of all tokens at least so far away: none of them has a weight. A float32 holds it exactly.
FAR = (1 << 31) - 128

# log2(e) in units of 2**-31: distance times this is the negated exponent of 2, in units of 2**-57.
LOG2_E = 3098164009
EXPONENT_BITS = 57
# 2**-f = 1 - f*(c0 - f*(c1 - f*(c2 - f*(c3 - f*c4)))) on [0, 1), in units of 2**-32: the minimax polynomial of
# relative error 1e-7 whose value at 1 is just above 1/2, so that weights never grow with distance.
EXP2_COEFFICIENTS = (2977028348, 1031552670, 237457663, 39484333, 4034631)

_WORD = 0xFFFFFFFF
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_STEPS = (0x9E3779B9, 0xBB67AE85)


@dataclass(frozen=True, slots=True)
class SamplingTensors:
    """How each of `n` lanes is sampled; all on the device of the logits, changed in place between steps.

    Attributes:
        temperature: float32 `[n]`, 0 is greedy.
        top_k: int32 `[n]`, 0 keeps every token.
        top_p: float32 `[n]`, 1 keeps every token.
        min_p: float32 `[n]`, 0 keeps every token.
        seed: int64 `[n]`, the 64 bits of the seed.
        index: int64 `[n]`, of the output token that is to be chosen: the number of output tokens so far.
        repetition, presence, frequency: float32 `[n]`; 1, 0 and 0 change nothing.
        min_tokens: int32 `[n]`; while index lies below, `ending_ids` are barred.
        ending_ids: int32 `[n, num_endings]`, padded with -1.
        bias_ids: int32 `[n, num_biases]`, padded with -1; added in this order.
        bias_values: float32 `[n, num_biases]`.
        has_grammar: bool `[n]`.
        counts: int32 `[n, vocab_size]`, twice the token's number in the output, plus 1 if the prompt holds it; None
            where no lane has penalties.
        grammar_bits: int32 `[n, ceil(vocab_size / 32)]`, bit i % 32 of word i // 32 allows token i; None where no lane
            has a grammar.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    index: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    min_tokens: Tensor
    ending_ids: Tensor
    bias_ids: Tensor
    bias_values: Tensor
    has_grammar: Tensor
    counts: Tensor | None = None
    grammar_bits: Tensor | None = None


def adjust_logits(logits: Tensor, tensors: SamplingTensors) -> Tensor:
    """Apply penalties, bias, the bar on endings and the grammar.

    logits `[n, vocab_size]`, any float dtype, not changed; returns float32 `[n, vocab_size]`. Ids outside the
    vocabulary are ignored. On a GPU this synchronises.
    """
    out = logits.to(torch.float32, copy=True)
    if tensors.counts is not None:
        out = _penalise(out, tensors.counts, tensors)
    for column in range(_num_used(tensors.bias_ids)):
        ids, inside = _valid_ids(tensors.bias_ids[:, column : column + 1], out.shape[1])
        old = out.gather(1, ids)
        out.scatter_(1, ids, torch.where(inside, old + tensors.bias_values[:, column : column + 1], old))
    early = (tensors.index < tensors.min_tokens).unsqueeze(1)
    for column in range(_num_used(torch.where(early, tensors.ending_ids, -1))):
        ids, inside = _valid_ids(tensors.ending_ids[:, column : column + 1], out.shape[1])
        out.scatter_(1, ids, torch.where(inside & early, -torch.inf, out.gather(1, ids)))
    if tensors.grammar_bits is not None:
        tokens = torch.arange(out.shape[1], device=out.device)
        allowed = (tensors.grammar_bits[:, tokens // 32] >> (tokens % 32).int()) & 1
        out = torch.where((allowed == 0) & tensors.has_grammar.unsqueeze(1), -torch.inf, out)
    return out


def _penalise(logits: Tensor, counts: Tensor, tensors: SamplingTensors) -> Tensor:
    repetition = tensors.repetition.unsqueeze(1)
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(counts != 0, repeated, logits)
    num_output = counts >> 1
    # In float64 the product of a float32 and a count is exact, so that a fused multiply-add changes nothing.
    penalty = tensors.presence.double().unsqueeze(1) + tensors.frequency.double().unsqueeze(1) * num_output
    return torch.where(num_output > 0, (logits.double() - penalty).float(), logits)


def _num_used(ids: Tensor) -> int:
    """Return how many columns hold an id of any lane."""
    used = torch.nonzero((ids >= 0).any(dim=0))
    return int(used.max()) + 1 if used.numel() else 0


def _valid_ids(ids: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    inside = (ids >= 0) & (ids < vocab_size)
    return torch.where(inside, ids, 0).long(), inside


def choose_tokens(logits: Tensor, tensors: SamplingTensors) -> Tensor:
    """Choose one token per lane.

    logits `[n, vocab_size]` float32 or bfloat16, adjusted; vocab_size is at most MAX_VOCAB_SIZE. Returns int64 `[n]`.
    Of equal logits greedy takes the lowest id. On a GPU this synchronises (it reads the parameters on the host).
    """
    require_vocab_size(logits.shape[1])
    clean = logits.float().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    chosen = torch.argmax(clean, dim=-1)
    is_random = (tensors.temperature > 0) & (clean.amax(dim=-1) > -torch.inf)
    bits = random_bits(tensors.seed, tensors.index)
    for lane in torch.nonzero(is_random).flatten().tolist():
        chosen[lane] = _draw(clean[lane], tensors, lane, int(bits[lane]) % (1 << 64))
    return chosen


def sample_tokens(logits: Tensor, tensors: SamplingTensors) -> Tensor:
    """Adjust and choose: `choose_tokens(adjust_logits(logits, tensors), tensors)`, which a GPU does in fewer passes."""
    return choose_tokens(adjust_logits(logits, tensors), tensors)


def require_vocab_size(vocab_size: int) -> None:
    """Raise ValueError where the sum of all weights might not fit 63 bits."""
    if vocab_size > MAX_VOCAB_SIZE:
        raise ValueError(f"a vocabulary of {vocab_size} tokens; sampling is exact up to {MAX_VOCAB_SIZE}")


def _draw(logits: Tensor, tensors: SamplingTensors, lane: int, bits: int) -> int:
    distances = token_distances(logits, tensors.temperature[lane])
    weights = token_weights(distances)
    weights[weights < least_weight(tensors.min_p[lane])] = 0
    top_k, top_p = int(tensors.top_k[lane]), float(tensors.top_p[lane])
    if 0 < top_k < distances.numel():
        weights[distances > torch.sort(distances).values[top_k - 1]] = 0
    if top_p < 1.0:
        ascending, order = torch.sort(distances)
        cumulated = torch.cumsum(weights[order], dim=0)
        place = torch.searchsorted(cumulated, needed_weight(int(cumulated[-1]), top_p))
        weights[distances > ascending[place]] = 0
    cumulated = torch.cumsum(weights, dim=0)
    return int(torch.searchsorted(cumulated, (bits * int(cumulated[-1])) >> 64, right=True))


def token_distances(logits: Tensor, temperature: Tensor) -> Tensor:
    """Return int32 distances of one lane from its largest logit, in units of 2**-26, at most FAR.

    logits float32 `[vocab_size]`, not all -inf and none NaN; temperature float32 `[]`, above 0.
    """
    largest = logits.max()
    scaled = (largest - logits) * (1.0 / temperature) * float(1 << DISTANCE_BITS)
    # Equal to the largest is at distance 0 even where both are infinite.
    return torch.where(logits == largest, 0.0, scaled).clamp(max=float(FAR)).int()


def token_weights(distances: Tensor) -> Tensor:
    """Return int64 weights exp(-distance) in units of 2**-44; relative error 1e-7, never growing with distance."""
    exponent = distances.long() * LOG2_E
    fraction = (exponent >> (EXPONENT_BITS - 32)) & _WORD
    series = torch.full_like(fraction, EXP2_COEFFICIENTS[-1])
    for coefficient in reversed(EXP2_COEFFICIENTS[:-1]):
        series = coefficient - _high_word(series, fraction)
    power = (1 << 32) - _high_word(series, fraction)
    return (power << (WEIGHT_BITS - 32)) >> (exponent >> EXPONENT_BITS)


def _high_word(a: Tensor, b: Tensor) -> Tensor:
    """Return the upper 32 of the 64 bits of a product of two words; int64 may wrap, the bits are right all the same."""
    return ((a * b) >> 32) & _WORD


def least_weight(min_p: Tensor) -> Tensor:
    """Return the least weight that min_p keeps; int64, at least 1."""
    return (min_p.float() * float(1 << WEIGHT_BITS)).long().clamp(min=1)


def needed_weight(total: int, top_p: float) -> int:
    """Return how much of a total weight top_p must reach."""
    return max(1, min(total, int(top_p * float(total))))


def random_bits(seed: Tensor, index: Tensor) -> Tensor:
    """Return the first 64 bits of Philox4x32-10 under key `seed` at counter `index`: int64 `[n]`, both int64 `[n]`."""
    keys = [seed & _WORD, (seed >> 32) & _WORD]
    words = [index & _WORD, (index >> 32) & _WORD, torch.zeros_like(index), torch.zeros_like(index)]
    for _ in range(10):
        products = [PHILOX_MULTIPLIERS[0] * words[0], PHILOX_MULTIPLIERS[1] * words[2]]
        words = [
            ((products[1] >> 32) & _WORD) ^ words[1] ^ keys[0],
            products[1] & _WORD,
            ((products[0] >> 32) & _WORD) ^ words[3] ^ keys[1],
            products[0] & _WORD,
        ]
        keys = [(key + step) & _WORD for key, step in zip(keys, PHILOX_STEPS, strict=True)]
    return (words[0] << 32) | words[1]


def count_tokens(counts: Tensor, token_ids: Tensor, lanes_active: Tensor) -> None:
    """Count each active lane's token as output, in place.

    counts int32 `[n, vocab_size]` as in SamplingTensors, token_ids int64 `[n]`, lanes_active bool or int32 `[n]`. Ids
    outside the vocabulary are ignored.
    """
    ids, inside = _valid_ids(token_ids.unsqueeze(1), counts.shape[1])
    counts.scatter_add_(1, ids, ((lanes_active != 0).unsqueeze(1) & inside).to(counts.dtype) * 2)


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log probabilities under the raw logits, natural logarithm.

    logits `[n, vocab_size]` as the model gave them, token_ids int64 `[n]`. Returns of each lane's token the log
    probability float32 `[n]` and the rank int64 `[n]` (1 for the likeliest), and of the num_top likeliest tokens the
    ids int64 `[n, num_top]` and log probabilities float32 `[n, num_top]`, descending. Never synchronises.
    """
    values = torch.log_softmax(logits.float(), dim=-1)
    chosen = values.gather(1, token_ids.unsqueeze(1))
    rank = (values > chosen).sum(dim=-1) + 1
    top_values, top_ids = torch.topk(values, min(num_top, values.shape[1]), dim=-1)
    return chosen.squeeze(1), rank, top_ids, top_values
