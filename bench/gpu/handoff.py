"""How long a hand-off takes: blocks of one KV memory into blocks of another.

    on the device   gather kernel, copy, scatter kernel, enqueued one behind the other
    inproc          `kvtransfer`'s two sides in one process: the same, in pieces of a slot, each with its checksum
    UCX             the same two sides in two processes

The last two count from the moment the cells are ready to the receiver's word that all of them landed.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Final

import torch
import uvloop

from bench.gpu.handoff_transfers import Way, transfers
from bench.gpu.points import Figures, Point, Section, Skip
from bench.gpu.rig import Stage, block_kernels
from bench.gpu.shapes import handoff_bytes
from bench.gpu.timing import Call, median_s
from engine.kv_cache import torch_kernels
from engine.sequence import num_blocks_for
from protocol.errors import ConfigError

LENGTHS: Final = (1024, 8192)
_WAYS: Final[tuple[Way, ...]] = ("inproc", "ucx")


def section(stage: Stage, name: str, share_s: float) -> Section:
    """Give the device's part by length, then the two transports, both lengths each."""
    factor = stage.scale.need_factor
    points = [
        Point(
            f"on the device, {num_tokens // 1024}k",
            {"way": "device", "num_tokens": num_tokens},
            3.0 * factor,
            partial(_on_device, stage, name, num_tokens),
        )
        for num_tokens in LENGTHS
    ]
    points += [
        Point(f"kvtransfer over {way}", {"way": way}, 15.0 * factor, partial(_over, stage, name, way)) for way in _WAYS
    ]
    return Section("handoff", name, share_s, tuple(points))


def _on_device(stage: Stage, name: str, num_tokens: int) -> Figures:
    rig, num_tokens = stage.rig(name), stage.scale.tokens(num_tokens)
    num_blocks = num_blocks_for(num_tokens, rig.loaded.fingerprint.block_size)
    kernels = block_kernels(stage.device) or torch_kernels()
    source, target = rig.kv_cache.tensor, rig.new_kv_cache(num_blocks).tensor
    ids = rig.block_tables(1, num_tokens)[0, :num_blocks].long()
    landing = torch.randperm(num_blocks, device=stage.device)
    slab = torch.empty(num_blocks * rig.loaded.fingerprint.block_bytes, dtype=torch.uint8, device=stage.device)
    other, layers = torch.empty_like(slab), source.shape[1]
    steps: dict[str, Call] = {
        "gather": lambda: kernels.gather(source, ids, 0, layers, slab),
        "copy": lambda: other.copy_(slab),
        "scatter": lambda: kernels.scatter(target, landing, 0, layers, other),
    }
    times = {key: median_s([call], rig.queue, stage.scale.num_rounds, in_graph=True) for key, call in steps.items()}
    total_s = median_s(list(steps.values()), rig.queue, stage.scale.num_rounds, in_graph=True) * len(steps)
    if not torch.equal(target.index_select(0, landing), source.index_select(0, ids)):
        raise RuntimeError("what was scattered is not what was gathered")
    num_bytes = handoff_bytes(rig.shape, num_tokens)
    # Each of the three passes reads and writes every byte.
    floor_s = 2 * num_bytes / stage.ceilings.copy_bytes_per_s
    return {
        "total_ms": total_s * 1e3,
        **{f"{key}_ms": seconds * 1e3 for key, seconds in times.items()},
        "one_pass_ms": floor_s * 1e3,
        "over_three_passes": total_s / (3 * floor_s),
        "megabytes": num_bytes * 1e-6,
    }


def _over(stage: Stage, name: str, way: Way) -> Figures:
    rig = stage.rig(name)
    lengths = [stage.scale.tokens(num_tokens) for num_tokens in LENGTHS]
    block_size = rig.loaded.fingerprint.block_size
    num_blocks = [num_blocks_for(num_tokens, block_size) for num_tokens in lengths]
    try:
        found = uvloop.run(transfers(rig, way, num_blocks, stage.scale.num_rounds))
    except ConfigError as error:
        raise Skip(str(error)) from error
    figures: Figures = {"slots": found.slots, "checksum": found.checksum}
    for length, num_tokens, times_s in zip(LENGTHS, lengths, found.times_s, strict=True):
        seconds = median(times_s)
        figures[f"ms_{length // 1024}k"] = seconds * 1e3
        figures[f"gb_per_s_{length // 1024}k"] = handoff_bytes(rig.shape, num_tokens) / seconds * 1e-9
    return figures
