"""A step cut at its attention, as vLLM's piecewise mode cuts it, against the same step as one graph.

Attention is launched by the host between the pieces; a copy puts its result where the next piece looks for it, while
vLLM's kernels write there at once. So that nobody is charged for the copy, a third step is measured: one graph with the
same copies in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any, Final

import torch
import uvloop
from torch import Tensor

from bench.gpu.decoding import device_steps_s
from bench.gpu.points import Figures, Point, Section, Skip
from bench.gpu.recording import Attend, RecordedStep
from bench.gpu.rig import Rig, Stage
from bench.gpu.streams import client_gaps_s
from engine.decode_runner import Compute, LaneStep
from engine.device_queue import CudaQueue

_BATCH: Final = 1


def section(stage: Stage, name: str, share_s: float) -> Section:
    """Give the one point: batch 1 at 1k."""
    keys: Figures = {"batch": _BATCH, "context_tokens": 1024}
    need_s = 12.0 * stage.scale.need_factor
    point = Point("batch 1, context 1k", keys, need_s, partial(_measure, stage, name))
    return Section("piecewise", name, share_s, (point,))


def cut_step(rig: Rig) -> RecordedStep:
    """Record a step of one lane in pieces."""
    pieces = RecordedStep(_BATCH, rig.queue)
    step = _step_with(rig, pieces.cutting)
    rig.clear_lanes()
    return pieces.record(step)


def _measure(stage: Stage, name: str) -> Figures:
    rig, scale, context_tokens = stage.rig(name), stage.scale, stage.scale.tokens(1024)
    if isinstance(rig.queue, CudaQueue) and isinstance(rig.graphs, str):
        raise Skip(f"no graphs: {rig.graphs}")
    pieces = cut_step(rig)
    with_copies = RecordedStep(_BATCH, rig.queue).record(_step_with(rig, _copying))
    steps: dict[str, Compute] = {"full": rig.step, "piecewise": pieces, "full_with_copies": with_copies}
    figures: Figures = {"num_pieces": len(pieces.graphs)}
    client_s: dict[str, float] = {}
    for way, step in steps.items():
        device_s = device_steps_s(rig, step, _BATCH, context_tokens, scale)
        gaps_s = uvloop.run(client_gaps_s(rig, step, _BATCH, context_tokens, scale.num_steps, scale.num_warm_steps))
        client_s[way] = median(gaps_s)
        figures |= {f"{way}_device_ms": median(device_s) * 1e3, f"{way}_client_ms": client_s[way] * 1e3}
    return figures | {
        "full_over_piecewise": client_s["full"] / client_s["piecewise"],
        "full_with_copies_over_piecewise": client_s["full_with_copies"] / client_s["piecewise"],
    }


def _copying(attend: Attend) -> Attend:
    """Give an attention whose result is copied once."""

    def copied(query: Tensor, *args: Any) -> Tensor:
        return torch.empty_like(query).copy_(attend(query, *args))

    return copied


def _step_with(rig: Rig, change: Callable[[Attend], Attend]) -> LaneStep:
    """Give a step whose attention was changed."""
    decoder = rig.decoder.with_own_scratch()
    attend = change(decoder.kernels.paged_decode_attention)
    decoder.kernels = replace(decoder.kernels, paged_decode_attention=attend)
    return LaneStep(decoder, rig.kv_cache, rig.state, rig.sizes)
