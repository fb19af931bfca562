"""Ways for prefill and decode to share one GPU: which queues, on which multiprocessors, in which chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch

from bench.gpu.points import Skip
from bench.gpu.prefilling import CHUNK_TOKENS
from bench.gpu.recording import RecordedStep
from bench.gpu.rig import MAX_BATCH, Rig
from bench.gpu.timing import median_s
from engine.decode_runner import LaneDecodeRunner, LaneStep
from engine.device_queue import CudaQueue, DeviceQueue, open_queue
from engine.lane_state import LaneState
from engine.runner import DeviceRunner
from engine.stream_partition import PartitionRefused, split_streams

TURNS_CHUNK_TOKENS: Final = 512
# Shares of the multiprocessors that prefill gets; decode has the rest.
_PREFILL_SHARES: Final = (0.5, 0.75)
_CURVE_SHARES: Final = (0.25, 0.5, 0.67, 0.75, 0.85)
_cuda: Any = torch.cuda


@dataclass(frozen=True, slots=True)
class Runners:
    """What one thread drives, and what the queues got."""

    decode: LaneDecodeRunner
    prefill: DeviceRunner
    detail: str


@dataclass(frozen=True, slots=True)
class Sharing:
    """One way.

    Attributes:
        chunk_tokens: most prompt tokens of one launch.
        open: makes the runners; raises Skip where the GPU or torch cannot do this.
    """

    name: str
    has_prompts: bool
    chunk_tokens: int
    open: Callable[[Rig], Runners]


def share_curve(device: torch.device, num_bytes: int, num_rounds: int) -> list[dict[str, float | int | str]]:
    """Measure a copy's bandwidth on what is left to decode when prefill has its share, by share.

    Raises:
        Skip: the multiprocessors cannot be divided.
    """
    rows: list[dict[str, float | int | str]] = []
    for share in _CURVE_SHARES:
        prefill, decode = _split_streams(device, share)
        queue = CudaQueue(device, decode.stream)
        with queue.active():
            source = torch.empty(num_bytes, dtype=torch.uint8, device=device).random_()
            target = torch.empty_like(source)
        seconds = median_s([partial(target.copy_, source)], queue, num_rounds, in_graph=False)
        rows.append({
            "decode_sms": decode.num_sms,
            "prefill_sms": prefill.num_sms,
            "copy_tb_per_s": 2e-12 * num_bytes / seconds,
        })  # fmt: skip
    return rows


def _one_queue(rig: Rig) -> Runners:
    prefill = DeviceRunner(rig.decoder.with_own_scratch(), rig.kv_cache, rig.queue)
    return Runners(rig.new_runner(rig.step), prefill, "one queue")


def _two_queues(rig: Rig) -> Runners:
    device = rig.queue.device
    # Decode's stream is one of high priority; this one is not.
    queue: DeviceQueue = CudaQueue(device, _cuda.Stream(device)) if device.type == "cuda" else open_queue(device)
    prefill = DeviceRunner(rig.decoder.with_own_scratch(), rig.kv_cache, queue)
    return Runners(rig.new_runner(rig.step), prefill, "two queues, decode's of high priority")


def _split(prefill_share: float, rig: Rig) -> Runners:
    """Record the step anew: what a graph runs on is settled by the stream that it is recorded on."""
    device = rig.queue.device
    for_prefill, for_decode = _split_streams(device, prefill_share)
    if isinstance(rig.graphs, str):
        raise Skip(f"no graphs: {rig.graphs}")
    queue = CudaQueue(device, for_decode.stream)
    state = LaneState(rig.sizes, queue)
    step = LaneStep(rig.decoder.with_own_scratch(), rig.kv_cache, state, rig.sizes)
    decode = LaneDecodeRunner(RecordedStep(MAX_BATCH, queue).record(step), state, rig.sizes, queue)
    prefill_queue = CudaQueue(device, for_prefill.stream)
    prefill = DeviceRunner(rig.decoder.with_own_scratch(), rig.kv_cache, prefill_queue)
    return Runners(decode, prefill, f"decode on {for_decode.num_sms} multiprocessors, prefill on {for_prefill.num_sms}")


def _split_streams(device: torch.device, prefill_share: float) -> Any:
    """Divide the GPU; raises Skip where that cannot be done."""
    if device.type != "cuda":
        raise Skip("a CPU has no multiprocessors to divide")
    num_sms = _cuda.get_device_properties(device).multi_processor_count
    try:
        return split_streams(device, round(num_sms * prefill_share))
    except PartitionRefused as error:
        raise Skip(f"multiprocessors cannot be divided: {error}") from error


SHARINGS: Final = (
    Sharing("alone", False, CHUNK_TOKENS, _one_queue),
    Sharing("turns", True, TURNS_CHUNK_TOKENS, _one_queue),
    Sharing("two queues", True, CHUNK_TOKENS, _two_queues),
    *(
        Sharing(f"split, prefill on {share:.0%}", True, CHUNK_TOKENS, partial(_split, share))
        for share in _PREFILL_SHARES
    ),
)
