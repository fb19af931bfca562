"""The state of a decode batch that lives on the device: one lane per running sequence.

    lane:  dead ──host writes a row──► alive ──ended by its last token──► dead
                                         ▲ │
                                         └─┘ one token per step: begin_step, the model, the choice, end_step

A step reads and writes nothing but these tensors, so that a CUDA graph can hold all of it: the token it chose is the
token that the next step computes. A dead lane computes on nothing: its slot is -1 and its length 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.sampling import SamplingTensors


@dataclass(frozen=True, slots=True)
class LaneTensors:
    """State of `n` lanes; every tensor is changed in place. Vectors are `[n]` int64 unless said otherwise.

    Attributes:
        token_ids: the token that the next step computes.
        positions: its place in the sequence.
        is_alive: int32, 1 or 0.
        num_known: tokens that the sequence has; while positions + 1 lies below, the next token is not chosen but read
            from `history` (a placed-again sequence replays what its client has).
        num_prompt_tokens: the position of output token 0.
        max_output_tokens: the lane ends with so many.
        block_tables: int32 `[n, max_blocks]`.
        history: int32 `[n, max_model_len]`, tokens by position, right below num_known.
        slot_mapping, seq_lens: written by `begin_step` for the model; seq_lens is int32.
        emitted: `[ring, n]`, row `step % ring` gets the tokens of a step, -1 of dead lanes.
        step: `[1]`, steps done.
        ending_ids: int32 `[n, few]`, -1 padded: tokens that end the lane. One with more ends by the host's word, a step
            or two late, and what it computes meanwhile is thrown away.
        sampling: of each lane; `begin_step` writes its `index`.
    """

    token_ids: Tensor
    positions: Tensor
    is_alive: Tensor
    num_known: Tensor
    num_prompt_tokens: Tensor
    max_output_tokens: Tensor
    block_tables: Tensor
    history: Tensor
    slot_mapping: Tensor
    seq_lens: Tensor
    emitted: Tensor
    step: Tensor
    ending_ids: Tensor
    sampling: SamplingTensors


def begin_step(lanes: LaneTensors, block_size: int) -> None:
    """Derive slot, length and output index of each lane's token from its position."""
    alive = lanes.is_alive.bool()
    places = (lanes.positions // block_size).clamp_(max=lanes.block_tables.shape[1] - 1)
    blocks = lanes.block_tables.gather(1, places.unsqueeze(1)).squeeze(1).long()
    slots = blocks * block_size + lanes.positions % block_size
    lanes.slot_mapping.copy_(torch.where(alive, slots, -1))
    lanes.seq_lens.copy_(torch.where(alive, lanes.positions + 1, 0))
    lanes.sampling.index.copy_(lanes.positions + 1 - lanes.num_prompt_tokens)


def end_step(lanes: LaneTensors, chosen: Tensor) -> None:
    """Feed each lane its next token, report it, and end the lanes that are through.

    chosen: `[n]` int64, what the sampler drew; ignored where the lane replays.
    """
    alive = lanes.is_alive.bool()
    follows = lanes.positions + 1
    is_replay = follows < lanes.num_known
    places = follows.clamp(max=lanes.history.shape[1] - 1).unsqueeze(1)
    known = lanes.history.gather(1, places).squeeze(1).long()
    token_ids = torch.where(is_replay, known, chosen)
    num_output = follows + 1 - lanes.num_prompt_tokens
    is_ending = (lanes.ending_ids == token_ids.unsqueeze(1)).any(dim=1)
    ends = (is_ending & (num_output >= lanes.sampling.min_tokens)) | (num_output >= lanes.max_output_tokens)
    keeps = torch.where(alive, token_ids, known)
    lanes.history.scatter_(1, places, keeps.to(lanes.history.dtype).unsqueeze(1))
    lanes.emitted[lanes.step % lanes.emitted.shape[0]] = torch.where(alive, token_ids, -1)
    lanes.token_ids.copy_(torch.where(alive, token_ids, lanes.token_ids))
    lanes.num_known.copy_(torch.where(alive, torch.maximum(lanes.num_known, follows + 1), lanes.num_known))
    lanes.positions.copy_(torch.where(alive, follows, lanes.positions))
    lanes.is_alive.copy_(alive & (is_replay | ~ends))
    lanes.step.add_(1)
