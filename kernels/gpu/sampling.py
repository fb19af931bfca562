"""Sampling on the device, without a sort: the four functions of `kernels.sampling` in Triton.

A choice is five launches; their grids depend on shapes only:

1. maxima   every tile: adjust (`sample_tokens` only), the largest logit and its first place.
2. survey   every tile of a sampled lane: how many tokens, and how much weight, lie within each of 16 distances.
3. survey   again, within the bracket that must hold the cuts of top_k and top_p, if more than a few tokens lie in it.
4. collect  the distances of the bracket's tokens, in vocabulary order, into one list per lane.
5. finish   one program per lane: greedy takes the first of the largest. A sampled lane finds its cuts in the list, then
            the tile in which the drawn point lies, then the token.

Greedy lanes leave passes 2 to 4 at once. Distances and weights are whole numbers (see `kernels.sampling`), so that
sums are exact in any order: a lane's token depends on nothing but the lane, and is the host sampler's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import draw
from kernels.sampling import SamplingTensors, require_vocab_size, token_logprobs

__all__ = ["adjust_logits", "choose_tokens", "count_tokens", "sample_tokens", "token_logprobs"]

TILE = 4096
NUM_WARPS = 8
FINISH_WARPS = 16
# Programs of a survey, over all lanes: twice what an H200's 132 multiprocessors hold at once. With many lanes each
# takes several tiles, so that greedy lanes cost few programs that only come and go.
SURVEY_PROGRAMS = 528


@triton.jit
def _penalised(x, token, inside, lane, repetition, presence, frequency, counts, counts_stride):
    repeated = tl.load(repetition + lane)
    present = tl.load(presence + lane)
    frequent = tl.load(frequency + lane)
    if (repeated != 1.0) | (present != 0.0) | (frequent != 0.0):
        count = tl.load(counts + lane * counts_stride + token, mask=inside, other=0)
        repetitive = tl.where(x > 0, tl.div_rn(x, repeated), x * repeated)
        x = tl.where(count != 0, repetitive, x)
        num_output = count >> 1
        # In float64 the product is exact: fused with the addition or not, the sum is the same.
        penalty = present.to(tl.float64) + frequent.to(tl.float64) * num_output.to(tl.float64)
        x = tl.where(num_output > 0, (x.to(tl.float64) - penalty).to(tl.float32), x)
    return x


@triton.jit
def _biased(x, token, first, end, ids, values, num: tl.constexpr, width: tl.constexpr):
    if tl.load(ids) >= 0:  # -1 pads the end
        column = tl.arange(0, width)
        token_ids = tl.load(ids + column, mask=column < num, other=-1)
        if tl.sum(((token_ids >= first) & (token_ids < end)).to(tl.int32), axis=0) > 0:
            for i in range(num):
                x = tl.where(token == tl.load(ids + i), x + tl.load(values + i), x)
    return x


@triton.jit
def _barred(x, token, first, end, ids, num: tl.constexpr, width: tl.constexpr):
    column = tl.arange(0, width)
    token_ids = tl.load(ids + column, mask=column < num, other=-1)
    if tl.sum(((token_ids >= first) & (token_ids < end)).to(tl.int32), axis=0) > 0:
        for i in range(num):
            x = tl.where(token == tl.load(ids + i), float("-inf"), x)
    return x


@triton.jit
def _maxima_kernel(
    logits,
    adjusted,
    maxima,
    firsts,
    temperature,
    index,
    repetition,
    presence,
    frequency,
    min_tokens,
    ending_ids,
    bias_ids,
    bias_values,
    has_grammar,
    counts,
    grammar_bits,
    logits_stride,
    counts_stride,
    grammar_stride,
    vocab_size: tl.constexpr,
    num_tiles: tl.constexpr,
    num_endings: tl.constexpr,
    num_biases: tl.constexpr,
    endings_width: tl.constexpr,
    biases_width: tl.constexpr,
    tile: tl.constexpr,
):
    part, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, end = part * tile, tl.minimum(part * tile + tile, vocab_size)
    token = first + tl.arange(0, tile)
    inside = token < vocab_size
    x = tl.load(logits + lane * logits_stride + token, mask=inside, other=float("-inf")).to(tl.float32)
    if adjusted is not None:
        if counts is not None:
            x = _penalised(x, token, inside, lane, repetition, presence, frequency, counts, counts_stride)
        if num_biases > 0:
            lane_ids, lane_values = bias_ids + lane * num_biases, bias_values + lane * num_biases
            x = _biased(x, token, first, end, lane_ids, lane_values, num_biases, biases_width)
        if num_endings > 0:
            if tl.load(index + lane) < tl.load(min_tokens + lane):
                x = _barred(x, token, first, end, ending_ids + lane * num_endings, num_endings, endings_width)
        if grammar_bits is not None:
            if tl.load(has_grammar + lane) != 0:
                word = tl.load(grammar_bits + lane * grammar_stride + token // 32, mask=inside, other=0)
                x = tl.where(((word >> (token % 32)) & 1) == 0, float("-inf"), x)
    if maxima is None:
        tl.store(adjusted + lane * vocab_size + token, x, mask=inside)
    else:
        if adjusted is not None:
            # Nobody reads a greedy lane's logits again.
            if tl.load(temperature + lane) > 0:
                tl.store(adjusted + lane * vocab_size + token, x, mask=inside)
        x = tl.where(x == x, x, float("-inf"))
        largest, place = tl.max(x, axis=0, return_indices=True, return_indices_tie_break_left=True)
        tl.store(maxima + lane * num_tiles + part, largest)
        tl.store(firsts + lane * num_tiles + part, first + place)


@triton.jit
def _count_kernel(counts, token_ids, lanes_active, counts_stride, num_lanes, vocab_size, width: tl.constexpr):
    lane = tl.arange(0, width)
    inside = lane < num_lanes
    token = tl.load(token_ids + lane, mask=inside, other=-1)
    active = tl.load(lanes_active + lane, mask=inside, other=0) != 0
    counted = inside & active & (token >= 0) & (token < vocab_size)
    place = counts + lane.to(tl.int64) * counts_stride + token
    tl.store(place, tl.load(place, mask=counted, other=0) + 2, mask=counted)


@dataclass(frozen=True, slots=True)
class _Scratch:
    """What the passes of one choice leave for each other, for `n` lanes and `t` tiles.

    maxima float32 and firsts int32 `[n, t]`: each tile's largest logit and its first place. counts int32 and masses
    int64 `[2, n, t, 16]`: tokens and weight within each distance of both surveys. near int32 `[n, vocab_size]`: the
    lists of distances.
    """

    maxima: Tensor
    firsts: Tensor
    counts: Tensor
    masses: Tensor
    near: Tensor

    @classmethod
    def empty(cls, logits: Tensor) -> _Scratch:
        n, vocab_size = logits.shape
        require_vocab_size(vocab_size)
        t, device = triton.cdiv(vocab_size, TILE), logits.device
        surveys = (2, n, t, draw.NUM_EDGES.value)
        return cls(
            torch.empty((n, t), dtype=torch.float32, device=device),
            torch.empty((n, t), dtype=torch.int32, device=device),
            torch.empty(surveys, dtype=torch.int32, device=device),
            torch.empty(surveys, dtype=torch.int64, device=device),
            torch.empty((n, vocab_size), dtype=torch.int32, device=device),
        )


def adjust_logits(logits: Tensor, tensors: SamplingTensors) -> Tensor:
    """See `kernels.sampling.adjust_logits`. Enqueued, not synchronised."""
    adjusted = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    _launch_maxima(logits, adjusted, None, tensors)
    return adjusted


def choose_tokens(logits: Tensor, tensors: SamplingTensors) -> Tensor:
    """See `kernels.sampling.choose_tokens`. Enqueued, not synchronised."""
    scratch = _Scratch.empty(logits)
    _launch_maxima(logits, None, scratch, tensors)
    return _launch_draw(logits, scratch, tensors)


def sample_tokens(logits: Tensor, tensors: SamplingTensors) -> Tensor:
    """See `kernels.sampling.sample_tokens`. Enqueued, not synchronised."""
    scratch = _Scratch.empty(logits)
    adjusted = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    _launch_maxima(logits, adjusted, scratch, tensors)
    return _launch_draw(adjusted, scratch, tensors)


def _launch_maxima(logits: Tensor, adjusted: Tensor | None, scratch: _Scratch | None, tensors: SamplingTensors) -> None:
    num_lanes, vocab_size = logits.shape
    num_tiles = triton.cdiv(vocab_size, TILE)
    counts, bits = tensors.counts, tensors.grammar_bits
    num_endings, num_biases = tensors.ending_ids.shape[1], tensors.bias_ids.shape[1]
    rows = (logits, counts, bits, tensors.ending_ids, tensors.bias_ids, tensors.bias_values)
    assert all(row is None or row.stride(1) == 1 for row in rows)
    launch: Any = _maxima_kernel[(num_tiles, num_lanes)]
    launch(
        logits,
        adjusted,
        scratch.maxima if scratch else None,
        scratch.firsts if scratch else None,
        tensors.temperature,
        tensors.index,
        tensors.repetition,
        tensors.presence,
        tensors.frequency,
        tensors.min_tokens,
        tensors.ending_ids,
        tensors.bias_ids,
        tensors.bias_values,
        tensors.has_grammar,
        counts,
        bits,
        logits.stride(0),
        counts.stride(0) if counts is not None else 0,
        bits.stride(0) if bits is not None else 0,
        vocab_size=vocab_size,
        num_tiles=num_tiles,
        num_endings=num_endings,
        num_biases=num_biases,
        endings_width=triton.next_power_of_2(num_endings),
        biases_width=triton.next_power_of_2(num_biases),
        tile=TILE,
        num_warps=NUM_WARPS,
    )


def _launch_draw(logits: Tensor, scratch: _Scratch, tensors: SamplingTensors) -> Tensor:
    num_lanes, vocab_size = logits.shape
    num_tiles = triton.cdiv(vocab_size, TILE)
    chosen = torch.empty(num_lanes, dtype=torch.int64, device=logits.device)
    rules = (tensors.temperature, tensors.top_k, tensors.top_p, tensors.min_p)
    lane = (logits, *rules, scratch.maxima, scratch.counts, scratch.masses)
    shape = {
        "vocab_size": vocab_size,
        "num_tiles": num_tiles,
        "tiles_width": max(triton.next_power_of_2(num_tiles), 16),
        "tile": TILE,
    }
    grid = (min(num_tiles, triton.cdiv(SURVEY_PROGRAMS, num_lanes)), num_lanes)
    survey: Any = draw.survey_kernel[grid]
    for level in (0, 1):
        survey(*lane, logits.stride(0), num_lanes, level=level, **shape, num_warps=NUM_WARPS)
    collect: Any = draw.collect_kernel[grid]
    collect(*lane, scratch.near, logits.stride(0), num_lanes, **shape, num_warps=NUM_WARPS)
    finish: Any = draw.finish_kernel[(num_lanes,)]
    finish(
        *lane,
        scratch.near,
        scratch.firsts,
        tensors.seed,
        tensors.index,
        chosen,
        logits.stride(0),
        num_lanes,
        **shape,
        num_warps=FINISH_WARPS,
    )
    return chosen


def count_tokens(counts: Tensor, token_ids: Tensor, lanes_active: Tensor) -> None:
    """See `kernels.sampling.count_tokens`. Enqueued, not synchronised."""
    num_lanes, vocab_size = counts.shape
    launch: Any = _count_kernel[(1,)]
    launch(
        counts,
        token_ids,
        lanes_active,
        counts.stride(0),
        num_lanes,
        vocab_size,
        width=triton.next_power_of_2(num_lanes),
    )
