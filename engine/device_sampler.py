"""Sample the rows of one batch on the device: parameters go up with the batch, tokens come down when it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.device_queue import DeviceQueue, Mark
from engine.grammar import GrammarState
from engine.sampler import Sampled, SampleInput
from kernels.sampling import SamplingTensors, token_logprobs
from kernels.table import KernelTable
from protocol.request import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_TOKEN_IDS, SamplingParams, TokenLogprobs

# A client's own, and the model's.
MAX_ENDINGS = MAX_STOP_TOKEN_IDS + 64
_FEW = 16

# Fields of SamplingTensors and of SamplingParams.
FLOAT_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition": "repetition_penalty",
    "presence": "presence_penalty",
    "frequency": "frequency_penalty",
}


@dataclass(frozen=True, slots=True)
class FetchedLogprobs:
    """On the host once marked: rank and likeliest ids `[n, 1 + 20]`, chosen and likeliest values `[n, 1 + 20]`."""

    integers: Tensor
    integers_mark: Mark
    floats: Tensor
    floats_mark: Mark

    def is_done(self) -> bool:
        """Whether both have arrived."""
        return self.integers_mark.is_passed() and self.floats_mark.is_passed()

    def wait(self) -> None:
        """Wait until both have arrived."""
        self.integers_mark.wait()
        self.floats_mark.wait()

    def row(self, row: int, num_top: int) -> TokenLogprobs:
        """Give what is reported of a row, once done."""
        integers, floats = self.integers[row].tolist(), self.floats[row].tolist()
        top = tuple(zip(integers[1 : 1 + num_top], floats[1 : 1 + num_top], strict=True))
        return TokenLogprobs(floats[0], top, integers[0])


@dataclass(frozen=True, slots=True)
class FetchedSamples:
    """Tokens of a batch's rows `[n]`, on the host once marked."""

    tokens: Tensor
    mark: Mark
    num_logprobs: list[int | None]
    logprobs: FetchedLogprobs | None

    def is_done(self) -> bool:
        """Whether everything has arrived."""
        return self.mark.is_passed() and (self.logprobs is None or self.logprobs.is_done())

    def results(self) -> list[Sampled]:
        """Wait, then return the samples by row."""
        self.mark.wait()
        if self.logprobs is not None:
            self.logprobs.wait()
        samples = []
        for row, (token_id, num_top) in enumerate(zip(self.tokens.tolist(), self.num_logprobs, strict=True)):
            wanted = num_top is not None and self.logprobs is not None
            samples.append(Sampled(token_id, self.logprobs.row(row, num_top or 0) if wanted else None))  # type: ignore[union-attr]
        return samples


def is_adjusted(sampling: SamplingParams) -> bool:
    """Tell whether the logits of a sequence are changed before a token is chosen."""
    p = sampling
    penalised = p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
    return penalised or bool(p.logit_bias) or p.min_tokens > 0 or p.grammar is not None


def sample_on_device(
    logits: Tensor, rows: Sequence[SampleInput], kernels: KernelTable, queue: DeviceQueue
) -> FetchedSamples:
    """Enqueue the choice of one token per row of logits `[n, vocab_size]`; does not wait."""
    tensors = _tensors(rows, logits.shape[1], queue)
    with queue.active(), torch.inference_mode():
        adjusts = any(is_adjusted(row.sampling) for row in rows)
        token_ids = (kernels.sample_tokens if adjusts else kernels.choose_tokens)(logits, tensors)
    num_logprobs = [row.sampling.num_logprobs for row in rows]
    wanted = any(num is not None for num in num_logprobs)
    logprobs = fetch_logprobs(logits, token_ids, queue) if wanted else None
    return FetchedSamples(*queue.fetch(token_ids), num_logprobs, logprobs)


def fetch_logprobs(logits: Tensor, token_ids: Tensor, queue: DeviceQueue) -> FetchedLogprobs:
    """Enqueue the log probabilities of the chosen and the likeliest tokens of every row; does not wait."""
    with queue.active(), torch.inference_mode():
        chosen, rank, top_ids, top_values = token_logprobs(logits, token_ids, MAX_LOGPROBS)
        integers = torch.cat((rank.unsqueeze(1), top_ids), dim=1)
        floats = torch.cat((chosen.unsqueeze(1), top_values), dim=1)
    return FetchedLogprobs(*queue.fetch(integers), *queue.fetch(floats))


def token_counts(prompt: Sequence[int], output: Sequence[int], vocab_size: int) -> NDArray[np.int32]:
    """Count tokens as the penalties need them: 2 for each one of the output, 1 if it is in the prompt."""
    counts = 2 * np.bincount(np.array(output, np.int64), minlength=vocab_size).astype(np.int32)
    counts[np.unique(np.array(prompt, np.int64))] += 1
    return counts


def grammar_words(grammars: Sequence[GrammarState | None], vocab_size: int) -> NDArray[np.int32]:
    """Stack the masks of rows, int32 `[n, ceil(vocab_size / 32)]`; zeros where there is no grammar."""
    words = np.zeros((len(grammars), -(-vocab_size // 32)), np.int32)
    for target, grammar in zip(words, grammars, strict=True):
        if grammar is not None:
            target[:] = grammar.mask()
    return words


def padded(rows: Sequence[Sequence[int]], width: int) -> NDArray[np.int32]:
    """Stack rows of ids, each filled up with -1."""
    array = np.full((len(rows), width), -1, np.int32)
    for target, row in zip(array, rows, strict=True):
        target[: len(row)] = row[:width]
    return array


def _width(rows: Sequence[Sequence[object]], most: int) -> int:
    """Give one of two widths: a kernel is compiled for each that it meets, while a prompt waits."""
    return _FEW if all(len(row) <= _FEW for row in rows) else most


def _tensors(rows: Sequence[SampleInput], vocab_size: int, queue: DeviceQueue) -> SamplingTensors:
    params = [row.sampling for row in rows]
    biases = [p.logit_bias for p in params]
    endings = [p.barred_token_ids for p in params]
    num_biases = _width(biases, MAX_LOGIT_BIAS)
    values = np.zeros((len(rows), num_biases), np.float32)
    for target, bias in zip(values, biases, strict=True):
        target[: len(bias)] = [value for _, value in bias]

    def column(name: str, dtype: type[np.generic]) -> Tensor:
        return queue.upload(np.array([getattr(p, name) for p in params], dtype))

    counts = None
    if any(is_adjusted(p) for p in params):
        counts = queue.upload(np.stack([token_counts(row.prompt, row.output, vocab_size) for row in rows]))
    grammars = [row.grammar for row in rows]
    bits = None
    if any(grammar is not None for grammar in grammars):
        bits = queue.upload(grammar_words(grammars, vocab_size))
    floats: dict[str, Any] = {name: column(source, np.float32) for name, source in FLOAT_FIELDS.items()}
    return SamplingTensors(
        top_k=column("top_k", np.int32),
        min_tokens=column("min_tokens", np.int32),
        seed=column("seed", np.int64),
        index=queue.upload(np.array([len(row.output) for row in rows], np.int64)),
        ending_ids=queue.upload(padded(endings, _width(endings, MAX_ENDINGS))),
        bias_ids=queue.upload(padded([[token_id for token_id, _ in bias] for bias in biases], num_biases)),
        bias_values=queue.upload(values),
        counts=counts,
        has_grammar=queue.upload(np.array([grammar is not None for grammar in grammars], np.bool_)),
        grammar_bits=bits,
        **floats,
    )
