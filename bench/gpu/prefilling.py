"""Prefill of one prompt, from launch to its first token on the host: tokens a second, and the share of the matmul rate.

Operations are those that the prompt cannot do without: every product once, causal pairs only, logits of one row.
"""

from __future__ import annotations

import time
from functools import partial
from statistics import median
from typing import Final

from bench.gpu.points import Figures, Point, Section
from bench.gpu.rig import Rig, Stage
from bench.gpu.shapes import LEAST_PREFILL_SHARE, prefill_operations
from bench.gpu.timing import new_ticks
from engine.batch import BatchItem
from engine.runner import DeviceRunner
from engine.sequence import Sequence

CHUNK_TOKENS: Final = 2048
_LENGTHS: Final = (2048, 8192, 512)
_NUM_WARM_RUNS: Final = 2


def section(stage: Stage, name: str, share_s: float) -> Section:
    """Give whole prompts of three lengths, and the longest in the chunks that a worker makes of it."""
    points = [_point(stage, name, num_tokens, num_tokens) for num_tokens in _LENGTHS]
    points.append(_point(stage, name, _LENGTHS[1], CHUNK_TOKENS))
    return Section("prefill", name, share_s, tuple(points))


def chunks_of(sequence: Sequence, chunk_tokens: int) -> list[BatchItem]:
    """Cut a prompt into chunks; the last one's logits are wanted."""
    end = sequence.num_prompt_tokens
    starts = range(0, end, chunk_tokens)
    return [BatchItem(sequence, at, min(chunk_tokens, end - at), at + chunk_tokens >= end) for at in starts]


def prefill_runner(rig: Rig) -> DeviceRunner:
    """Give a runner with scratch memory of its own, on the rig's queue."""
    return DeviceRunner(rig.decoder.with_own_scratch(), rig.kv_cache, rig.queue)


def _point(stage: Stage, name: str, num_tokens: int, chunk_tokens: int) -> Point:
    whole = f"{num_tokens} tokens"
    return Point(
        whole if chunk_tokens == num_tokens else f"{whole} in chunks of {chunk_tokens}",
        {"num_tokens": num_tokens, "chunk_tokens": chunk_tokens},
        3.0 * stage.scale.need_factor,
        partial(_measure, stage, name, num_tokens, chunk_tokens),
    )


def _measure(stage: Stage, name: str, num_tokens: int, chunk_tokens: int) -> Figures:
    rig, scale = stage.rig(name), stage.scale
    num_tokens, chunk_tokens = scale.tokens(num_tokens), scale.tokens(chunk_tokens)
    runner, (sequence,) = prefill_runner(rig), rig.sequences(1, num_tokens, 1)
    items = chunks_of(sequence, chunk_tokens)
    wall_s, device_s = [], []
    for _ in range(_NUM_WARM_RUNS + scale.num_rounds):
        ticks, begin_s = new_ticks(rig.queue.device), time.perf_counter()
        with rig.queue.active():
            ticks.tick()
        launched = [runner.launch([item]) for item in items]
        with rig.queue.active():
            ticks.tick()
        launched[-1].results()
        wall_s.append(time.perf_counter() - begin_s)
        device_s += ticks.intervals_s()
    wall, device = median(wall_s[_NUM_WARM_RUNS:]), median(device_s[_NUM_WARM_RUNS:])
    operations = prefill_operations(rig.shape, num_tokens)
    share = operations / wall / stage.ceilings.operations_per_s
    figures: Figures = {
        "wall_ms": wall * 1e3,
        "device_ms": device * 1e3,
        "tokens_per_s": num_tokens / wall,
        "tera_operations": operations * 1e-12,
        "matmul_share": share,
    }
    if num_tokens >= scale.tokens(CHUNK_TOKENS):
        figures |= {"target_share": LEAST_PREFILL_SHARE, "meets_target": share >= LEAST_PREFILL_SHARE}
    return figures
