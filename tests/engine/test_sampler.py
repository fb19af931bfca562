"""The sampler against plain definitions, and the randomness behind it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engine.philox import philox_4x32, random_bits
from engine.sampler import SampleInput, _adjust, sample
from protocol.request import SamplingParams

VOCAB = 300


def _row(sampling: SamplingParams, output: list[int] | None = None, prompt: list[int] | None = None) -> SampleInput:
    return SampleInput(sampling, prompt or [1, 2], output or [])


def _logits(seed: int, rows: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def _draws(logits: torch.Tensor, params: dict[str, float], count: int = 600) -> list[int]:
    rows = [_row(SamplingParams(seed=s, **params)) for s in range(count)]  # type: ignore[arg-type]
    return [s.token_id for s in sample(logits.expand(count, -1), rows)]


def test_philox_gives_the_published_numbers() -> None:
    # Known-answer vectors of the Random123 distribution, philox4x32 with 10 rounds.
    assert philox_4x32(0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)


def test_random_bits_are_uniform_and_depend_on_both_arguments() -> None:
    values = [random_bits(seed, index) for seed in range(50) for index in range(50)]
    assert len(set(values)) == len(values)
    assert 0 <= min(values) and max(values) < 1 << 64
    points = np.array(values) / 2**64
    assert abs(points.mean() - 0.5) < 0.02 and abs(points.var() - 1 / 12) < 0.01


def test_greedy_takes_the_likeliest() -> None:
    logits = _logits(0, rows=5)
    assert [s.token_id for s in sample(logits, [_row(SamplingParams(seed=0, temperature=0.0))] * 5)] == (
        logits.argmax(-1).tolist()
    )


def test_a_row_does_not_depend_on_its_batch_or_its_place_in_it() -> None:
    logits = _logits(1, rows=6)
    kinds = [
        SamplingParams(seed=1, temperature=0.7),
        SamplingParams(seed=2, temperature=1.3, top_k=40, top_p=0.9),
        SamplingParams(seed=3, min_p=0.05, repetition_penalty=1.3),
        SamplingParams(seed=4, temperature=0.0, presence_penalty=1.0, num_logprobs=3),
        SamplingParams(seed=5, logit_bias=((7, 5.0),)),
        SamplingParams(seed=6, top_p=0.5, frequency_penalty=0.3),
    ]
    rows = [_row(k, output=[3, 3, 9]) for k in kinds]
    together = sample(logits, rows)
    alone = [sample(logits[i : i + 1], [rows[i]])[0] for i in range(6)]
    backwards = sample(logits.flip(0), rows[::-1])[::-1]
    assert together == alone == backwards


def test_the_same_seed_and_index_draw_the_same_and_another_index_differs() -> None:
    logits = _logits(2)
    params = SamplingParams(seed=11)
    picks = [sample(logits, [_row(params, output=[0] * n)])[0].token_id for n in range(40)]
    again = [sample(logits, [_row(params, output=[0] * n)])[0].token_id for n in range(40)]
    assert picks == again
    assert len(set(picks)) > 3


def _excess(draws: list[int], probabilities: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    """Return by how many standard deviations chi-square lies above what it is of draws that follow."""
    expected = probabilities * len(draws)
    found = np.bincount(draws, minlength=len(probabilities))
    assert found[expected == 0].sum() == 0
    kept = expected > 0
    degrees = int(kept.sum()) - 1
    chi_square = float(((found[kept] - expected[kept]) ** 2 / expected[kept]).sum())
    return (chi_square - degrees) / math.sqrt(2 * degrees)


def test_draws_follow_the_softmax() -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(3))
    probabilities = torch.softmax(logits[0].double() / 0.8, -1).numpy()
    draws = _draws(logits, {"temperature": 0.8}, 4000)
    assert _excess(draws, probabilities) < 3
    assert _excess(draws, torch.softmax(logits[0].double(), -1).numpy()) > 5, "the test itself sees a wrong one"


def test_draws_by_index_follow_what_is_kept() -> None:
    logits = torch.randn(1, 60, generator=torch.Generator().manual_seed(4)) * 2
    params = SamplingParams(seed=9, temperature=1.5, top_k=20, top_p=0.9, min_p=0.01)
    draws = [sample(logits, [_row(params, output=[0] * n)])[0].token_id for n in range(3000)]
    probabilities = torch.softmax(logits[0].double() / 1.5, -1).numpy()
    probabilities[probabilities < 0.01 * probabilities.max()] = 0
    descending = np.argsort(-probabilities)
    probabilities[descending[20:]] = 0
    cumulated = np.cumsum(probabilities[descending]) / probabilities.sum()
    probabilities[descending[int(np.searchsorted(cumulated, 0.9)) + 1 :]] = 0
    assert 5 < (probabilities > 0).sum() < 20
    assert _excess(draws, probabilities / probabilities.sum()) < 3


def test_the_draw_walks_in_vocabulary_order() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.6, 0.05, 0.25]]))
    cumulated = np.cumsum([0.1, 0.6, 0.05, 0.25])
    points = [random_bits(seed, 0) / 2**64 for seed in range(200)]
    assert _draws(logits, {}, 200) == np.searchsorted(cumulated, points, side="right").tolist()


def test_ties_at_a_cut_stay_together() -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0, 2.0, 2.0, 3.0]])
    assert set(_draws(logits, {"top_k": 1})) == {1, 5}
    assert set(_draws(logits, {"top_k": 3})) == {1, 3, 4, 5}
    assert set(_draws(logits, {"top_p": 0.2})) == {1, 5}
    assert set(_draws(logits, {"top_p": 0.8})) == {1, 3, 4, 5}


def test_a_row_without_a_token_to_choose_gives_the_first() -> None:
    nothing = torch.full((1, 50), -torch.inf)
    one = nothing.clone()
    one[0, 33] = -7.0
    odd = one.clone()
    odd[0, 20] = torch.nan
    for params in (SamplingParams(seed=1, temperature=0.0), SamplingParams(seed=1, top_p=0.5), SamplingParams(seed=1)):
        assert sample(nothing, [_row(params)])[0].token_id == 0
        assert sample(one, [_row(params)])[0].token_id == 33
        assert sample(odd, [_row(params)])[0].token_id == 33


def test_temperature_sharpens() -> None:
    logits = torch.log(torch.tensor([[0.6, 0.4]]))
    share = np.mean([t == 0 for t in _draws(logits, {"temperature": 0.25}, 2000)])
    assert abs(share - 0.6**4 / (0.6**4 + 0.4**4)) < 0.03


def test_top_k_keeps_k_tokens_and_top_p_the_smallest_sufficient_set() -> None:
    probabilities = torch.tensor([[0.05, 0.4, 0.3, 0.2, 0.05]])
    logits = torch.log(probabilities)
    assert set(_draws(logits, {"top_k": 2})) == {1, 2}
    assert set(_draws(logits, {"top_p": 0.69})) == {1, 2}
    assert set(_draws(logits, {"top_p": 0.71})) == {1, 2, 3}
    assert set(_draws(logits, {"top_k": 3, "top_p": 0.5})) == {1, 2}
    assert set(_draws(logits, {"min_p": 0.45})) == {1, 2, 3}
    assert set(_draws(logits, {"top_p": 0.01})) == {1}


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999999])
def test_partial_sorting_changes_nothing(top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = _logits(3, vocab=2000) * 0.2
    whole = _draws(logits, {"top_p": top_p}, 50)
    monkeypatch.setattr("engine.sampler._PARTIAL_SORT", 8)
    assert _draws(logits, {"top_p": top_p}, 50) == whole


def test_penalties_match_their_definitions() -> None:
    logits = _logits(4)
    prompt, output = [5, 6], [7, 7, 8]
    params = SamplingParams(
        seed=0,
        temperature=0.0,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias=((9, 2.0),),
    )
    expected = logits[0].clone()
    for token in {5, 6, 7, 8}:
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    expected[7] -= 0.5 + 0.25 * 2
    expected[8] -= 0.5 + 0.25
    expected[9] += 2.0
    adjusted = _adjust(logits[0].clone().numpy(), SampleInput(params, prompt, output))
    torch.testing.assert_close(torch.from_numpy(adjusted), expected)
    assert sample(logits, [SampleInput(params, prompt, output)])[0].token_id == int(expected.argmax())


def test_ending_tokens_are_barred_before_min_tokens_only() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 42] = 10.0
    params = SamplingParams(seed=0, temperature=0.0, min_tokens=2, max_tokens=9, eos_token_ids=(42,))
    assert sample(logits, [_row(params, output=[1])])[0].token_id != 42
    assert sample(logits, [_row(params, output=[1, 1])])[0].token_id == 42


def test_logprobs_are_those_of_the_raw_distribution() -> None:
    logits = _logits(5)
    params = SamplingParams(seed=0, temperature=0.0, num_logprobs=3, logit_bias=((10, 50.0),))
    result = sample(logits, [_row(params)])[0]
    reference = torch.log_softmax(logits[0], -1)
    assert result.token_id == 10 and result.logprobs is not None
    assert math.isclose(result.logprobs.logprob, float(reference[10]), rel_tol=1e-6)
    assert [t for t, _ in result.logprobs.top] == reference.topk(3).indices.tolist()
    assert result.logprobs.rank == int((reference > reference[10]).sum()) + 1


def test_no_top_logprobs_still_reports_the_token() -> None:
    result = sample(_logits(6), [_row(SamplingParams(seed=0, temperature=0.0, num_logprobs=0))])[0]
    assert result.logprobs is not None and result.logprobs.top == () and result.logprobs.rank == 1
