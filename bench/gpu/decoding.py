"""Decode steps at stated batches and contexts: on the device alone, and as the consumer of the tokens sees them.

At each point, on sequences whose context is as long as stated on average over the steps counted:
1. the step on the device: replays one behind the other, an event between them;
2. the gaps between tokens at their consumer (`bench.gpu.streams`), in several windows;
3. the same step launched kernel by kernel, for comparison.
"""

from __future__ import annotations

from statistics import median

import uvloop

from bench.gpu.points import Figures, Point, Section, Skip
from bench.gpu.rig import Rig, Scale, Stage, decode_items
from bench.gpu.shapes import (
    MOST_CLIENT_OVER_DEVICE,
    MOST_P99_OVER_MEDIAN,
    TARGETS,
    Target,
    step_bytes,
)
from bench.gpu.streams import client_gaps_s
from bench.gpu.timing import new_ticks, percentile
from engine.decode_runner import Compute

# To foretell how long points take: a step's time over its floor, and the bandwidth of that floor.
_EXPECTED_RATIO, _EXPECTED_BYTES_PER_S = 1.5, 4e12


def section(stage: Stage, name: str, share_s: float) -> Section:
    """Give a model's points: the stated targets' first, then the others."""
    first = Point("recording", {}, 25.0 * stage.scale.need_factor, lambda: _recording(stage.rig(name)))
    return Section("decode", name, share_s, (first, *(_point(stage, name, target) for target in TARGETS[name])))


def device_steps_s(rig: Rig, compute: Compute, batch: int, context_tokens: int, scale: Scale) -> list[float]:
    """Return the time of each step on the device; the host is ahead of it unless launching takes longer."""
    num_steps, num_warm = (
        (scale.num_eager_steps, 4) if compute is rig.eager else (scale.num_steps, scale.num_warm_steps)
    )
    num_prompt_tokens = max(1, context_tokens - num_steps // 2 - num_warm)
    sequences = rig.sequences(batch, num_prompt_tokens, num_steps + num_warm + 4)
    rig.new_runner(compute).launch(decode_items(sequences)).results()
    ticks = new_ticks(rig.queue.device)
    with rig.queue.active():
        for _ in range(num_warm):
            compute(batch, False)
        ticks.tick()
        for _ in range(num_steps):
            compute(batch, False)
            ticks.tick()
        return ticks.intervals_s()


def _recording(rig: Rig) -> Figures:
    """Record the graphs, which the points after this one need; what it takes is a figure of its own."""
    if isinstance(rig.graphs, str):
        raise Skip(f"no graphs: {rig.graphs}; steps are launched kernel by kernel")
    summary = rig.graphs.summary
    return {"num_graphs": summary.num_graphs, "capture_s": summary.capture_s, "graph_bytes": summary.num_bytes}


def _point(stage: Stage, name: str, target: Target) -> Point:
    batch, context_tokens, scale = target.batch, target.context_tokens, stage.scale
    floor_s = step_bytes(stage.models[name].shape, batch, context_tokens) / _EXPECTED_BYTES_PER_S
    need_s = (_num_windows(scale, target) + 1) * scale.num_steps * floor_s * _EXPECTED_RATIO + 3.0
    return Point(
        f"batch {batch}, context {context_tokens // 1024}k",
        {"batch": batch, "context_tokens": context_tokens},
        need_s * scale.need_factor,
        lambda: _measure(stage, stage.rig(name), target),
    )


def _num_windows(scale: Scale, target: Target) -> int:
    return scale.num_windows if target.is_published else 1


def _measure(stage: Stage, rig: Rig, target: Target) -> Figures:
    scale, batch, context_tokens = stage.scale, target.batch, stage.scale.tokens(target.context_tokens)
    device_s = device_steps_s(rig, rig.step, batch, context_tokens, scale)
    windows = [
        uvloop.run(client_gaps_s(rig, rig.step, batch, context_tokens, scale.num_steps, scale.num_warm_steps))
        for _ in range(_num_windows(scale, target))
    ]
    eager_s = median(device_steps_s(rig, rig.eager, batch, context_tokens, scale))
    floor_s = step_bytes(rig.shape, batch, context_tokens) / stage.ceilings.copy_bytes_per_s
    figures = judged(device_s, windows, floor_s, target)
    return figures | {"eager_ms": eager_s * 1e3, "has_graph": not isinstance(rig.graphs, str)}


def judged(device_s: list[float], windows: list[list[float]], floor_s: float, target: Target) -> Figures:
    """Return medians over windows beside the floor, and which targets they meet."""
    medians = [median(gaps) for gaps in windows]
    client_s, step_s = median(medians), median(device_s)
    p99_over_median = median(percentile(gaps, 0.99) / median(gaps) for gaps in windows)
    ratio = client_s / floor_s
    return {
        "floor_ms": floor_s * 1e3,
        "device_ms": step_s * 1e3,
        "client_ms": client_s * 1e3,
        "client_low_ms": min(medians) * 1e3,
        "client_high_ms": max(medians) * 1e3,
        "client_p99_ms": median(percentile(gaps, 0.99) for gaps in windows) * 1e3,
        "device_over_floor": step_s / floor_s,
        "client_over_floor": ratio,
        "gate": target.gate,
        "stretch": target.stretch,
        "meets_gate": ratio <= target.gate,
        "meets_stretch": ratio <= target.stretch,
        "client_over_device": client_s / step_s,
        "meets_client_over_device": client_s / step_s <= MOST_CLIENT_OVER_DEVICE,
        "p99_over_median": p99_over_median,
        "meets_p99_over_median": p99_over_median <= MOST_P99_OVER_MEDIAN,
        "num_steps": sum(len(gaps) for gaps in windows),
    }
