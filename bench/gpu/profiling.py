"""Where a step's time goes: the kernels of replayed steps by their share, as torch's profiler sees them."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu.points import Figures, Point, Section
from bench.gpu.rig import Stage, decode_items

NUM_ROWS: Final = 15
_BATCHES: Final = (1, 64)
_NUM_STEPS: Final = 8
_SHOWN_NAME_CHARS: Final = 90


def section(stage: Stage, name: str, share_s: float) -> Section:
    """Give the smallest and the largest batch, at 1k."""
    points = [
        Point(
            f"batch {batch}, context 1k",
            {"batch": batch, "context_tokens": 1024},
            4.0 * stage.scale.need_factor,
            partial(_measure, stage, name, batch),
        )
        for batch in _BATCHES
    ]
    return Section("profile", name, share_s, tuple(points))


def kernel_table(averages: Any, num_steps: int, *, is_gpu: bool) -> list[dict[str, float | int | str]]:
    """Return the kernels that take most time, as the profiler's averages have them.

    `share` is of the sum over all kernels, so the gaps between them are in no row.
    """
    field = "self_device_time_total" if is_gpu else "self_cpu_time_total"
    timed = [(float(getattr(entry, field)), entry) for entry in averages]
    total_us = sum(us for us, _ in timed) or 1.0
    timed.sort(key=lambda row: -row[0])
    return [
        {
            "kernel": str(entry.key)[:_SHOWN_NAME_CHARS],
            "calls_per_step": entry.count / num_steps,
            "us_per_step": us / num_steps,
            "share": us / total_us,
        }
        for us, entry in timed[:NUM_ROWS]
        if us > 0
    ]


def _measure(stage: Stage, name: str, batch: int) -> Figures:
    rig, is_gpu = stage.rig(name), stage.device.type == "cuda"
    compute, num_steps = rig.step, min(_NUM_STEPS, stage.scale.num_eager_steps)
    sequences = rig.sequences(batch, stage.scale.tokens(1024), 4 * _NUM_STEPS)
    rig.new_runner(compute).launch(decode_items(sequences)).results()
    activity = ProfilerActivity.CUDA if is_gpu else ProfilerActivity.CPU
    with rig.queue.active():
        for _ in range(num_steps):
            compute(batch, False)
        rig.queue.mark().wait()
        with profile(activities=[activity]) as profiler:
            for _ in range(num_steps):
                compute(batch, False)
            if is_gpu:
                torch.cuda.synchronize()
    rows = kernel_table(profiler.key_averages(), num_steps, is_gpu=is_gpu)
    busy_ms = sum(float(row["us_per_step"]) for row in rows) * 1e-3
    return {"top_ms_per_step": busy_ms, "num_steps": num_steps, "kernels": rows}
