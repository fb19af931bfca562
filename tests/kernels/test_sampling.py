"""The tensor sampler against the host's, which chooses the same token, and against plain definitions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine import philox
from engine.sampler import SampleInput, _adjust, sample
from kernels.sampling import (
    FAR,
    MAX_VOCAB_SIZE,
    WEIGHT_BITS,
    adjust_logits,
    choose_tokens,
    count_tokens,
    random_bits,
    sample_tokens,
    token_distances,
    token_logprobs,
    token_weights,
)
from protocol.request import SamplingParams
from tests.kernels.sampling_cases import grammar_words, random_logits, random_row, tensors_of

VOCAB = 777


def _rows(num: int, seed: int, vocab_size: int = VOCAB) -> list[SampleInput]:
    generator = np.random.default_rng(seed)
    return [random_row(generator, vocab_size) for _ in range(num)]


def test_the_same_tokens_as_on_the_host() -> None:
    rows, logits = _rows(600, 1), random_logits(600, VOCAB, 1)
    expected = [sampled.token_id for sampled in sample(logits, rows)]
    tensors = tensors_of(rows, VOCAB)
    assert sample_tokens(logits, tensors).tolist() == expected
    likeliest = adjust_logits(logits, tensors).argmax(dim=-1).tolist()
    assert sum(a != b for a, b in zip(expected, likeliest, strict=True)) > 150, "many rows must be a matter of chance"


def test_the_same_tokens_as_on_the_host_at_the_size_of_a_model() -> None:
    rows, logits = _rows(12, 2, 49152), random_logits(12, 49152, 2)
    expected = [sampled.token_id for sampled in sample(logits, rows)]
    assert sample_tokens(logits, tensors_of(rows, 49152)).tolist() == expected


def test_adjusting_gives_the_bits_of_the_host() -> None:
    rows, logits = _rows(100, 3), random_logits(100, VOCAB, 3)
    adjusted = adjust_logits(logits, tensors_of(rows, VOCAB))
    expected = torch.stack(
        [torch.from_numpy(_adjust(line.numpy().copy(), row)) for line, row in zip(logits, rows, strict=True)]
    )
    assert torch.equal(adjusted, expected)
    assert not torch.equal(adjusted, logits)


def test_a_lane_depends_on_nothing_but_itself() -> None:
    rows, logits = _rows(20, 4), random_logits(20, VOCAB, 4)
    together = sample_tokens(logits, tensors_of(rows, VOCAB)).tolist()
    alone = [int(sample_tokens(logits[i : i + 1], tensors_of(rows[i : i + 1], VOCAB))) for i in range(20)]
    backwards = sample_tokens(logits.flip(0), tensors_of(rows[::-1], VOCAB)).tolist()[::-1]
    assert together == alone == backwards


def test_random_bits_are_the_hosts_for_any_seed_and_index() -> None:
    generator = np.random.default_rng(5)
    seeds: list[int] = generator.integers(1 << 64, size=55, dtype=np.uint64).tolist()
    indices: list[int] = generator.integers(1 << 63, size=55, dtype=np.uint64).tolist()
    seeds[:5] = [0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
    indices[:5] = [0, 1, 1 << 32, (1 << 63) - 1, 77]
    bits = random_bits(
        torch.from_numpy(np.array(seeds, np.uint64).view(np.int64)),
        torch.from_numpy(np.array(indices, np.uint64).view(np.int64)),
    )
    expected = [philox.random_bits(seed, index) for seed, index in zip(seeds, indices, strict=True)]
    assert bits.numpy().view(np.uint64).tolist() == expected


def test_weights_are_the_exponential() -> None:
    distances = torch.randint(0, 12 << 26, (200_000,), generator=torch.Generator().manual_seed(6), dtype=torch.int32)
    exact = torch.exp(-distances.double() / (1 << 26)) * (1 << WEIGHT_BITS)
    assert float(((token_weights(distances) - exact) / exact).abs().max()) < 1.1e-7
    far = torch.randint(12 << 26, FAR, (100_000,), generator=torch.Generator().manual_seed(7), dtype=torch.int32)
    exact = torch.exp(-far.double() / (1 << 26)) * (1 << WEIGHT_BITS)
    assert float((token_weights(far) - exact).abs().max()) < 12, "in units of 2**-44"
    assert token_weights(torch.tensor([0, FAR], dtype=torch.int32)).tolist() == [1 << WEIGHT_BITS, 0]


def test_weights_never_grow_with_distance() -> None:
    for octave in range(46):
        middle = int(octave * np.log(2) * (1 << 26))
        distances = torch.arange(max(middle - 500, 0), min(middle + 500, FAR), dtype=torch.int32)
        weights = token_weights(distances)
        assert bool((weights[1:] <= weights[:-1]).all()), octave
    anywhere = torch.randint(0, FAR, (100_000,), generator=torch.Generator().manual_seed(8), dtype=torch.int32)
    weights = token_weights(torch.sort(anywhere).values)
    assert bool((weights[1:] <= weights[:-1]).all())


def test_weights_are_the_softmax() -> None:
    logits = random_logits(1, 5000, 9)[0] * 20
    weights = token_weights(token_distances(logits, torch.tensor(0.7))).double()
    expected = torch.softmax(logits.double() / 0.7, dim=-1)
    assert float((weights / weights.sum() - expected).abs().sum()) < 3e-7


def test_a_grammar_leaves_only_what_it_allows() -> None:
    rows, logits = _rows(10, 10), random_logits(10, VOCAB, 10).nan_to_num(neginf=-50.0)
    allowed = torch.rand(10, VOCAB, generator=torch.Generator().manual_seed(11)) < 0.05
    has_grammar = torch.arange(10) % 2 == 0
    tensors = tensors_of(rows, VOCAB)
    plain = adjust_logits(logits, tensors)
    tensors = replace(tensors, grammar_bits=grammar_words(allowed), has_grammar=has_grammar)
    barred = has_grammar.unsqueeze(1) & ~allowed
    assert torch.equal(adjust_logits(logits, tensors), torch.where(barred, -torch.inf, plain))
    chosen = sample_tokens(logits, tensors)
    assert bool(allowed[torch.arange(10), chosen][has_grammar].all())


def test_hopeless_logits_give_a_token_of_the_vocabulary() -> None:
    logits = torch.full((5, VOCAB), -torch.inf)
    logits[1, 7] = -1e30
    logits[2] = torch.nan
    logits[3, 5], logits[3, 6] = torch.nan, 2.0
    logits[4, 3:5] = torch.inf
    for params in (SamplingParams(seed=1, temperature=0.0), SamplingParams(seed=1, top_k=3, top_p=0.5)):
        rows = [SampleInput(params, [1], [])] * 5
        chosen = choose_tokens(logits, tensors_of(rows, VOCAB)).tolist()
        assert chosen[:4] == [0, 7, 0, 6] and chosen[4] in (3, 4)
        assert chosen == [sampled.token_id for sampled in sample(logits, rows)]


def test_ids_outside_the_vocabulary_change_nothing() -> None:
    tensors = tensors_of(_rows(4, 12), VOCAB)
    outside = torch.full((4, 2), VOCAB, dtype=torch.int32)
    tensors = replace(tensors, bias_ids=outside, bias_values=torch.ones(4, 2), ending_ids=outside, counts=None)
    logits = random_logits(4, VOCAB, 12)
    assert torch.equal(adjust_logits(logits, tensors), logits)


def test_tokens_are_counted_in_active_lanes_only() -> None:
    counts = torch.zeros(4, 10, dtype=torch.int32)
    counts[:, 3] = 1
    for _ in range(2):
        count_tokens(counts, torch.tensor([3, 9, 3, -1]), torch.tensor([1, 1, 0, 1]))
    expected = torch.zeros(4, 10, dtype=torch.int32)
    expected[:, 3] = torch.tensor([5, 1, 1, 1])
    expected[1, 9] = 4
    assert torch.equal(counts, expected)


def test_counted_tokens_are_penalised_as_on_the_host() -> None:
    logits, output = random_logits(1, VOCAB, 13) * 3, [int(random_logits(1, VOCAB, 13).argmax())]
    params = SamplingParams(seed=3, temperature=0, repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.3)
    tensors = tensors_of([SampleInput(params, [1, 2], [])], VOCAB)
    assert tensors.counts is not None
    for _ in range(4):
        count_tokens(tensors.counts, torch.tensor(output[-1:]), torch.tensor([True]))
        row = SampleInput(params, [1, 2], output)
        output.append(int(sample_tokens(logits, tensors)))
        assert output[-1] == sample(logits, [replace(row, output=output[:-1])])[0].token_id
    assert len(set(output)) > 1


def test_logprobs_are_those_of_the_raw_distribution() -> None:
    logits = random_logits(5, VOCAB, 14)[[0, 2, 4]]
    token_ids = torch.tensor([5, 600, int(logits[2].argmax())])
    chosen, rank, top_ids, top_values = token_logprobs(logits, token_ids, 4)
    expected = torch.log_softmax(logits.double(), dim=-1)
    own = expected.gather(1, token_ids.unsqueeze(1))
    torch.testing.assert_close(chosen.double(), own.squeeze(1), rtol=0, atol=1e-5)
    assert rank.tolist() == ((expected.float() > own.float()).sum(dim=1) + 1).tolist()
    torch.testing.assert_close(top_values.double(), expected.topk(4).values, rtol=0, atol=1e-5)
    torch.testing.assert_close(expected.gather(1, top_ids), expected.topk(4).values, rtol=0, atol=1e-5)


def test_a_vocabulary_beyond_exact_sums_is_refused() -> None:
    logits = torch.zeros(1, 1).expand(1, MAX_VOCAB_SIZE + 1)
    with pytest.raises(ValueError, match="vocabulary"):
        sample(logits, [SampleInput(SamplingParams(seed=0), [1], [])])
