"""The kernels that open and close a decode step: Triton against the reference, and what they promise."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from kernels import lanes as reference
from kernels.gpu import lanes as triton_lanes
from kernels.lanes import LaneTensors
from kernels.sampling import SamplingTensors

BLOCK, MAX_LEN, VOCAB, RING = 4, 24, 50, 3


def _lanes(num_lanes: int, seed: int, device: torch.device) -> LaneTensors:
    make = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape or (num_lanes,), generator=make, dtype=dtype).to(device)

    prompts = integers(1, 8)
    positions = prompts + integers(0, 10)
    empty = torch.zeros(num_lanes, device=device)
    sampling = SamplingTensors(
        temperature=empty, top_k=empty.int(), top_p=empty, min_p=empty, seed=empty.long(), index=empty.long(),
        repetition=empty, presence=empty, frequency=empty,
        min_tokens=integers(0, 12, dtype=torch.int32), ending_ids=empty.int().unsqueeze(1),
        bias_ids=empty.int().unsqueeze(1), bias_values=empty.unsqueeze(1), has_grammar=empty.bool(),
    )  # fmt: skip
    return LaneTensors(
        token_ids=integers(0, VOCAB),
        positions=positions,
        is_alive=integers(0, 4, dtype=torch.int32).clamp(max=1),
        num_known=positions + integers(1, 4),
        num_prompt_tokens=prompts,
        max_output_tokens=integers(2, 14),
        block_tables=integers(0, 100, num_lanes, MAX_LEN // BLOCK, dtype=torch.int32),
        history=integers(0, VOCAB, num_lanes, MAX_LEN, dtype=torch.int32),
        slot_mapping=empty.long(),
        seq_lens=empty.int(),
        emitted=torch.full((RING, num_lanes + 2), -9, dtype=torch.int64, device=device)[:, :num_lanes],
        step=torch.tensor([seed], device=device),
        ending_ids=integers(-1, VOCAB, num_lanes, 12, dtype=torch.int32),
        sampling=sampling,
    )


def _copy(lanes: LaneTensors) -> LaneTensors:
    values = {f.name: getattr(lanes, f.name) for f in fields(lanes)}
    sampling = values.pop("sampling")
    index = {"index": sampling.index.clone()}
    copies = {name: value.clone() for name, value in values.items() if name != "emitted"}
    wide = torch.full((RING, lanes.emitted.shape[1] + 2), -9, dtype=torch.int64, device=lanes.emitted.device)
    return LaneTensors(**copies, emitted=wide[:, : lanes.emitted.shape[1]], sampling=replace(sampling, **index))


@pytest.mark.parametrize(("num_lanes", "seed"), [(1, 0), (2, 1), (5, 2), (33, 3), (64, 4)])
def test_triton_moves_every_lane_as_the_reference_does(num_lanes: int, seed: int, device: torch.device) -> None:
    expected = _lanes(num_lanes, seed, device)
    got = _copy(expected)
    for step in range(RING + 2):
        drawn = torch.randint(0, VOCAB, (num_lanes,), generator=torch.Generator().manual_seed(step)).to(device)
        reference.begin_step(expected, BLOCK)
        triton_lanes.begin_step(got, BLOCK)
        reference.end_step(expected, drawn)
        triton_lanes.end_step(got, drawn)
        for field in fields(LaneTensors):
            if field.name != "sampling":
                ours, theirs = getattr(got, field.name), getattr(expected, field.name)
                assert torch.equal(ours, theirs), (field.name, step)
        assert torch.equal(got.sampling.index, expected.sampling.index)


def test_a_lane_ends_by_token_or_by_length_and_stays_dead(device: torch.device) -> None:
    lanes = _lanes(3, 0, device)
    lanes.is_alive.fill_(1)
    lanes.sampling.min_tokens.copy_(torch.tensor([0, 0, 9]))
    lanes.ending_ids.fill_(-1)
    lanes.ending_ids[:, 11] = 7
    lanes.num_prompt_tokens.fill_(3)
    lanes.positions.fill_(4)
    lanes.num_known.fill_(5)
    lanes.max_output_tokens.copy_(torch.tensor([20, 3, 20]))
    triton_lanes.begin_step(lanes, BLOCK)
    assert lanes.seq_lens.tolist() == [5, 5, 5] and lanes.sampling.index.tolist() == [2, 2, 2]
    triton_lanes.end_step(lanes, torch.tensor([7, 8, 7], device=device))
    assert lanes.is_alive.tolist() == [0, 0, 1], "an ending token, the last token allowed, an ending before min_tokens"
    assert lanes.token_ids[2] == 7 and lanes.positions.tolist() == [5, 5, 5]
    triton_lanes.begin_step(lanes, BLOCK)
    assert lanes.slot_mapping.tolist()[:2] == [-1, -1] and lanes.seq_lens.tolist() == [0, 0, 6]
    triton_lanes.end_step(lanes, torch.tensor([1, 1, 1], device=device))
    assert lanes.emitted[int(lanes.step) % RING - 1].tolist() == [-1, -1, 1]


def test_known_tokens_are_replayed_and_end_nothing(device: torch.device) -> None:
    lanes = _lanes(1, 0, device)
    lanes.is_alive.fill_(1)
    lanes.positions.fill_(4)
    lanes.num_prompt_tokens.fill_(3)
    lanes.num_known.fill_(7)
    lanes.max_output_tokens.fill_(30)
    lanes.history[0, 5:7] = torch.tensor([7, 11], dtype=torch.int32)
    lanes.ending_ids.fill_(7)
    lanes.sampling.min_tokens.fill_(0)
    fed = []
    for drawn in (40, 41, 42):
        triton_lanes.begin_step(lanes, BLOCK)
        triton_lanes.end_step(lanes, torch.tensor([drawn], device=device))
        fed.append(int(lanes.token_ids))
    assert fed == [7, 11, 42] and int(lanes.is_alive) == 1 and int(lanes.num_known) == 8
    assert int(lanes.history[0, 7]) == 42
