"""Sampled rows of every kind, as the host's sampler and as the device's tensors take them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.sampler import SampleInput
from kernels.sampling import SamplingTensors
from protocol.request import MAX_SEED, SamplingParams

_KINDS = {
    "temperature": (0.0, 0.2, 0.7, 1.0, 1.0, 1.7, 30.0),
    "top_k": (0, 0, 0, 1, 2, 40, 300, 100_000),
    "top_p": (1.0, 1.0, 0.001, 0.3, 0.7, 0.95, 0.9999),
    "min_p": (0.0, 0.0, 0.0, 0.01, 0.2, 1.0),
    "repetition_penalty": (1.0, 1.0, 1.3, 0.7),
    "presence_penalty": (0.0, 0.0, 0.5, -1.0),
    "frequency_penalty": (0.0, 0.0, 0.25, -0.3),
}


def random_row(generator: np.random.Generator, vocab_size: int) -> SampleInput:
    """Return a row whose parameters, prompt and output are drawn."""
    chosen = {name: values[generator.integers(len(values))] for name, values in _KINDS.items()}
    biased = generator.choice(vocab_size, generator.integers(4), replace=False).tolist()
    sampling = SamplingParams(
        **chosen,  # type: ignore[arg-type]
        seed=int(generator.integers(MAX_SEED, endpoint=True)),
        logit_bias=tuple((token_id, float(generator.normal() * 5)) for token_id in biased),
        min_tokens=int(generator.integers(6)),
        eos_token_ids=tuple(generator.choice(vocab_size, 2, replace=False).tolist()),
    )
    prompt = generator.integers(vocab_size, size=generator.integers(1, 20)).tolist()
    output = generator.integers(min(vocab_size, 50), size=generator.integers(8)).tolist()
    return SampleInput(sampling, prompt, output)


def random_logits(num_rows: int, vocab_size: int, seed: int) -> Tensor:
    """Return float32 logits: rows of different spread, some of them full of ties or of -inf."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.1, 1.0, 3.0, 3.0, 8.0])[torch.arange(num_rows) % 5]
    logits = torch.randn(num_rows, vocab_size, generator=generator) * spread.unsqueeze(1)
    logits[::3] = (logits[::3] * 2).round() / 2
    logits[1::7, ::2] = -torch.inf
    return logits


def tensors_of(rows: Sequence[SampleInput], vocab_size: int, device: torch.device | None = None) -> SamplingTensors:
    """Return the parameters of rows as a worker's lanes hold them, without a grammar."""

    def vector(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([getattr(row.sampling, name) for row in rows], dtype=dtype, device=device)

    def padded(lists: Sequence[Sequence[float]], dtype: torch.dtype, fill: float) -> Tensor:
        width = max(map(len, lists)) + 2
        lines = [[*values, *[fill] * (width - len(values))] for values in lists]
        return torch.tensor(lines, dtype=dtype, device=device)

    counts = np.zeros((len(rows), vocab_size), np.int32)
    for lane, row in enumerate(rows):
        counts[lane, row.prompt] = 1
        np.add.at(counts[lane], row.output, 2)
    biases = [row.sampling.logit_bias for row in rows]
    return SamplingTensors(
        temperature=vector("temperature", torch.float32),
        top_k=vector("top_k", torch.int32),
        top_p=vector("top_p", torch.float32),
        min_p=vector("min_p", torch.float32),
        seed=vector("seed", torch.int64),
        index=torch.tensor([len(row.output) for row in rows], device=device),
        repetition=vector("repetition_penalty", torch.float32),
        presence=vector("presence_penalty", torch.float32),
        frequency=vector("frequency_penalty", torch.float32),
        min_tokens=vector("min_tokens", torch.int32),
        ending_ids=padded([row.sampling.ending_token_ids for row in rows], torch.int32, -1),
        bias_ids=padded([[token_id for token_id, _ in bias] for bias in biases], torch.int32, -1),
        bias_values=padded([[value for _, value in bias] for bias in biases], torch.float32, 0.0),
        has_grammar=torch.zeros(len(rows), dtype=torch.bool, device=device),
        counts=torch.from_numpy(counts).to(device),
    )


def grammar_words(allowed: Tensor) -> Tensor:
    """Pack bool `[n, vocab_size]` into int32 words, the lowest bit first."""
    bits = np.packbits(allowed.cpu().numpy(), axis=1, bitorder="little")
    words = np.zeros((bits.shape[0], -(-bits.shape[1] // 4) * 4), np.uint8)
    words[:, : bits.shape[1]] = bits
    return torch.from_numpy(words.view(np.int32)).to(allowed.device)
