"""`begin_step` and `end_step` of `kernels.lanes` in Triton: one program each, a lane per element.

One program, because `end_step` reads the step counter and also moves it.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

import kernels.gpu.interpreted  # noqa: F401  mends the interpreter
from kernels.lanes import LaneTensors


@triton.jit
def _begin_kernel(
    positions,
    is_alive,
    num_prompt_tokens,
    block_tables,
    slot_mapping,
    seq_lens,
    index,
    num_lanes,
    table_stride,
    table_width,
    block_size: tl.constexpr,
    width: tl.constexpr,
):
    lane = tl.arange(0, width)
    inside = lane < num_lanes
    position = tl.load(positions + lane, mask=inside, other=0)
    alive = tl.load(is_alive + lane, mask=inside, other=0) != 0
    place = tl.minimum(position // block_size, table_width - 1)
    block = tl.load(block_tables + lane.to(tl.int64) * table_stride + place, mask=inside & alive, other=0).to(tl.int64)
    slot = block * block_size + position % block_size
    tl.store(slot_mapping + lane, tl.where(alive, slot, -1), mask=inside)
    tl.store(seq_lens + lane, tl.where(alive, position + 1, 0).to(tl.int32), mask=inside)
    prompt = tl.load(num_prompt_tokens + lane, mask=inside, other=0)
    tl.store(index + lane, position + 1 - prompt, mask=inside)


@triton.jit
def _end_kernel(
    token_ids,
    positions,
    is_alive,
    num_known,
    num_prompt_tokens,
    max_output_tokens,
    history,
    ending_ids,
    min_tokens,
    emitted,
    step,
    chosen,
    num_lanes,
    history_stride,
    history_width,
    emitted_stride,
    ring: tl.constexpr,
    num_endings: tl.constexpr,
    width: tl.constexpr,
):
    lane = tl.arange(0, width)
    inside = lane < num_lanes
    alive = (tl.load(is_alive + lane, mask=inside, other=0) != 0) & inside
    follows = tl.load(positions + lane, mask=inside, other=0) + 1
    known = tl.load(num_known + lane, mask=inside, other=0)
    is_replay = follows < known
    place = history + lane.to(tl.int64) * history_stride + tl.minimum(follows, history_width - 1)
    replayed = tl.load(place, mask=alive & is_replay, other=0).to(tl.int64)
    drawn = tl.load(chosen + lane, mask=inside, other=0)
    token = tl.where(is_replay, replayed, drawn)

    is_ending = tl.zeros([width], dtype=tl.int1)
    for column in tl.static_range(num_endings):
        ending = tl.load(ending_ids + lane * num_endings + column, mask=inside, other=-1).to(tl.int64)
        is_ending = is_ending | (ending == token)
    num_output = follows + 1 - tl.load(num_prompt_tokens + lane, mask=inside, other=0)
    least = tl.load(min_tokens + lane, mask=inside, other=0)
    most = tl.load(max_output_tokens + lane, mask=inside, other=0)
    ends = (is_ending & (num_output >= least)) | (num_output >= most)

    tl.store(place, token.to(tl.int32), mask=alive & (is_replay == 0))
    done = tl.load(step)
    row = emitted + (done % ring) * emitted_stride
    tl.store(row + lane, tl.where(alive, token, -1), mask=inside)
    tl.store(token_ids + lane, token, mask=alive)
    tl.store(positions + lane, follows, mask=alive)
    tl.store(num_known + lane, tl.maximum(known, follows + 1), mask=alive)
    tl.store(is_alive + lane, (alive & (is_replay | (ends == 0))).to(tl.int32), mask=inside)
    tl.debug_barrier()  # every warp has read the counter before it moves
    tl.store(step, done + 1)


def begin_step(lanes: LaneTensors, block_size: int) -> None:
    """See `kernels.lanes.begin_step`. Enqueued, not synchronised."""
    num_lanes = lanes.positions.shape[0]
    launch: Any = _begin_kernel[(1,)]
    launch(
        lanes.positions,
        lanes.is_alive,
        lanes.num_prompt_tokens,
        lanes.block_tables,
        lanes.slot_mapping,
        lanes.seq_lens,
        lanes.sampling.index,
        num_lanes,
        lanes.block_tables.stride(0),
        lanes.block_tables.shape[1],
        block_size=block_size,
        width=triton.next_power_of_2(num_lanes),
    )


def end_step(lanes: LaneTensors, chosen: Tensor) -> None:
    """See `kernels.lanes.end_step`. Enqueued, not synchronised."""
    num_lanes = lanes.positions.shape[0]
    assert lanes.ending_ids.is_contiguous()
    launch: Any = _end_kernel[(1,)]
    launch(
        lanes.token_ids,
        lanes.positions,
        lanes.is_alive,
        lanes.num_known,
        lanes.num_prompt_tokens,
        lanes.max_output_tokens,
        lanes.history,
        lanes.ending_ids,
        lanes.sampling.min_tokens,
        lanes.emitted,
        lanes.step,
        chosen,
        num_lanes,
        lanes.history.stride(0),
        lanes.history.shape[1],
        lanes.emitted.stride(0),
        ring=lanes.emitted.shape[0],
        num_endings=lanes.ending_ids.shape[1],
        width=triton.next_power_of_2(num_lanes),
    )
