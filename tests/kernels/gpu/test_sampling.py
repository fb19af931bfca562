"""Sampling in Triton against the tensor reference, token for token: nothing in it depends on the order of a sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.sampler import SampleInput
from kernels import sampling as reference
from kernels.sampling import SamplingTensors
from protocol.request import SamplingParams
from tests.kernels.sampling_cases import grammar_words, random_logits, random_row, tensors_of

pytest.importorskip("triton")

from kernels.gpu import sampling  # noqa: E402

VOCAB = 1000
# What a lane may ask for, alone and together; each with and without a tail of far tokens.
KINDS: tuple[dict[str, float], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 1},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 30.0, "top_k": 400},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 60.0, "top_p": 0.6},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.5, "top_k": 50, "top_p": 0.8, "min_p": 0.001},
    {"temperature": 1.0, "top_k": 900, "top_p": 0.3},
    {"temperature": 1e-30, "top_p": 0.5},
)


def _mapped(tensors: SamplingTensors, change: Callable[[Tensor], Tensor]) -> SamplingTensors:
    named = [(field.name, getattr(tensors, field.name)) for field in fields(tensors)]
    return replace(tensors, **{name: change(value) for name, value in named if value is not None})


def _moved(tensors: SamplingTensors, device: torch.device) -> SamplingTensors:
    return _mapped(tensors, lambda tensor: tensor.to(device))


def _rows(kinds: Sequence[dict[str, float]], seed: int = 0) -> list[SampleInput]:
    params = [SamplingParams(seed=seed + i, **kind) for i, kind in enumerate(kinds)]  # type: ignore[arg-type]
    return [SampleInput(p, [1, 2], [3] * i) for i, p in enumerate(params)]


def _choose(logits: Tensor, tensors: SamplingTensors, device: torch.device) -> list[int]:
    return sampling.choose_tokens(logits.to(device), _moved(tensors, device)).tolist()


@pytest.mark.filterwarnings("ignore:overflow encountered")  # what lies too far away overflows, as it may
def test_every_kind_of_lane_gets_the_reference_s_token(device: torch.device) -> None:
    tensors, logits = tensors_of(_rows(KINDS), VOCAB), random_logits(len(KINDS), VOCAB, 1)
    assert _choose(logits, tensors, device) == reference.choose_tokens(logits, tensors).tolist()


def test_tiles_and_lists_of_any_size_give_the_same(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    # Flat logits over many tokens: the first bracket holds more than a few, and the list more than a chunk.
    kinds = [KINDS[i] for i in (1, 4, 7, 10)]
    tensors, logits = tensors_of(_rows(kinds, 20), 5001), random_logits(5, 5001, 2)[1:]
    expected = reference.choose_tokens(logits, tensors).tolist()
    assert _choose(logits, tensors, device) == expected
    monkeypatch.setattr(sampling, "TILE", 1024)
    monkeypatch.setattr(sampling, "SURVEY_PROGRAMS", 8)
    assert _choose(logits, tensors, device) == expected


def test_the_vocabulary_of_a_model(device: torch.device) -> None:
    tensors, logits = tensors_of(_rows([KINDS[9]]), 49152), random_logits(3, 49152, 3)[2:]
    assert _choose(logits, tensors, device) == reference.choose_tokens(logits, tensors).tolist()


def test_random_lanes_are_adjusted_and_chosen_in_one_go(device: torch.device) -> None:
    generator = np.random.default_rng(4)
    rows = [random_row(generator, VOCAB) for _ in range(16)]
    logits = random_logits(16, VOCAB, 4)
    allowed = torch.rand(16, VOCAB, generator=torch.Generator().manual_seed(5)) < 0.3
    tensors = tensors_of(rows, VOCAB)
    tensors = replace(tensors, grammar_bits=grammar_words(allowed), has_grammar=torch.arange(16) % 4 == 0)
    adjusted = sampling.adjust_logits(logits.to(device), _moved(tensors, device))
    assert torch.equal(adjusted.cpu(), reference.adjust_logits(logits, tensors))
    chosen = sampling.sample_tokens(logits.to(device), _moved(tensors, device))
    assert chosen.tolist() == reference.sample_tokens(logits, tensors).tolist()


def test_a_lane_depends_on_nothing_but_itself(device: torch.device) -> None:
    order = [6, 0, 9]
    tensors, logits = tensors_of(_rows(KINDS), VOCAB), random_logits(len(KINDS), VOCAB, 1)
    some = _mapped(tensors, lambda tensor: tensor[order])
    together = reference.choose_tokens(logits, tensors)
    assert _choose(logits[order], some, device) == together[order].tolist()


def test_ties_bfloat16_and_padded_rows(device: torch.device) -> None:
    kinds = [{"temperature": 0.0}, {"temperature": 1.0, "top_k": 2}, {"temperature": 0.5, "top_p": 0.5}]
    padded = (random_logits(3, 1024, 6).nan_to_num(neginf=-9.0) / 4).round().to(torch.bfloat16)
    logits, tensors = padded[:, :VOCAB], tensors_of(_rows(kinds, 7), VOCAB)
    assert int((logits[0] == logits[0].max()).sum()) > 1
    assert _choose(logits, tensors, device) == reference.choose_tokens(logits, tensors).tolist()
    on_device = sampling.choose_tokens(padded.to(device)[:, :VOCAB], _moved(tensors, device))
    assert on_device.tolist() == reference.choose_tokens(logits, tensors).tolist()


def test_hopeless_logits_give_a_token_of_the_vocabulary(device: torch.device) -> None:
    logits = torch.full((8, VOCAB), -torch.inf)
    logits[2:4, 7] = -1e30
    logits[4:6] = torch.nan
    logits[6:8, 5], logits[6:8, 999] = torch.nan, torch.inf
    kinds = [{"temperature": 0.0}, {"temperature": 1.0, "top_k": 3, "top_p": 0.5}] * 4
    tensors = tensors_of(_rows(kinds), VOCAB)
    assert _choose(logits, tensors, device) == [0, 0, 7, 7, 0, 0, 999, 999]


def test_random_numbers_of_any_seed_and_index(device: torch.device) -> None:
    """Each draw from equal logits is the upper bits of the random number."""
    seeds, indices = [-1, -(1 << 63), (1 << 63) - 1], [(1 << 40) + 3, 0, (1 << 62) + 1]
    tensors = replace(
        tensors_of(_rows([{"temperature": 1.0}] * 3), 1024), seed=torch.tensor(seeds), index=torch.tensor(indices)
    )
    bits = reference.random_bits(tensors.seed, tensors.index)
    assert _choose(torch.zeros(3, 1024), tensors, device) == ((bits >> 54) & 1023).tolist()


def test_draws_over_many_indices_follow_the_distribution(device: torch.device) -> None:
    num = 32
    logits = torch.tensor([[-90.0, 2.0, -80.0, 1.0, 2.0, -70.0]]).expand(num, -1)
    tensors = tensors_of(_rows([{"temperature": 2.0}] * num), 6)
    tensors = replace(tensors, index=torch.arange(num), seed=torch.full((num,), 99))
    chosen = np.array(_choose(logits, tensors, device))
    assert set(chosen.tolist()) == {1, 3, 4}
    share = np.exp([1.0, 0.5, 1.0]) / np.exp([1.0, 0.5, 1.0]).sum()
    found = np.array([(chosen == token_id).sum() for token_id in (1, 3, 4)])
    assert float(((found - share * num) ** 2 / (share * num)).sum()) < 10


def test_tokens_are_counted_in_active_lanes_only(device: torch.device) -> None:
    counts = torch.randint(0, 5, (5, 33), dtype=torch.int32)
    expected = counts.clone()
    token_ids = torch.tensor([0, 32, 7, 7, 40])
    active = torch.tensor([True, True, False, True, True])
    on_device = counts.clone().to(device)
    sampling.count_tokens(on_device, token_ids.to(device), active.to(device))
    sampling.count_tokens(on_device, token_ids.to(device), active.int().to(device))
    for _ in range(2):
        reference.count_tokens(expected, token_ids, active)
    assert torch.equal(on_device.cpu(), expected)
    assert not torch.equal(expected, counts)


def test_too_large_a_vocabulary_is_refused(device: torch.device) -> None:
    logits = torch.zeros(1, 1, device=device).expand(1, reference.MAX_VOCAB_SIZE + 1)
    with pytest.raises(ValueError, match="vocabulary"):
        sampling.choose_tokens(logits, _moved(tensors_of(_rows([{}]), 8), device))
