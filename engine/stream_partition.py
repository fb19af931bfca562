"""The two queues of a process that runs both roles on one GPU, and the multiprocessors that each may use.

    not split     prefill: a stream of normal priority     decode: one of high priority      any multiprocessor
    split         prefill: N multiprocessors               decode: all others                (green contexts)

1. One split of the GPU gives two disjoint sets. torch's own `GreenContext.create` splits anew at every call and always
   takes the first multiprocessors, so two of its contexts overlap: the driver is asked through `cuda.bindings`, which
   comes with torch.
2. Each set becomes a green context with one stream in it. What is launched or recorded on that stream stays on its set;
   memory, modules and events are those of the one context that the process has anyway.
3. Both streams are tried once, with an event of each awaited by the other. Whatever is missing or refuses, both roles
   get plain streams instead, and the start line says why.

Green contexts live as long as the process. Copies to the host run on streams outside of them, on copy engines.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch

from engine.device_queue import CudaQueue, DeviceQueue, open_queue
from protocol.errors import BatonError, ConfigError

_NORMAL_PRIORITY, _HIGH_PRIORITY = 0, -1
_cuda: Any = torch.cuda  # its classes carry no types


class PartitionRefused(BatonError):
    """The multiprocessors cannot be divided here; the message says why."""


@dataclass(frozen=True, slots=True)
class RoleQueues:
    """One queue for each role.

    Attributes:
        detail: one line on what they got.
    """

    prefill: DeviceQueue
    decode: DeviceQueue
    detail: str


@dataclass(frozen=True, slots=True)
class Share:
    """A stream in a green context of its own."""

    stream: torch.cuda.Stream
    num_sms: int


def open_role_queues(device: torch.device, prefill_sms: int) -> RoleQueues:
    """Give prefill and decode a queue each; 0 multiprocessors leaves the GPU undivided.

    Raises:
        ConfigError: multiprocessors were named for a CPU, or as many as the GPU has.
    """
    if device.type != "cuda":
        if prefill_sms:
            raise ConfigError(f"prefill-sms: {prefill_sms} multiprocessors of a GPU, but the model is on the {device}")
        return RoleQueues(open_queue(device), open_queue(device), "prefill and decode take turns")
    if not prefill_sms:
        return _undivided(device, "prefill and decode share all multiprocessors, decode's stream goes first")
    num_sms = _cuda.get_device_properties(device).multi_processor_count
    if prefill_sms >= num_sms:
        raise ConfigError(f"prefill-sms: {prefill_sms} of {num_sms} multiprocessors leave none to decode")
    try:
        prefill, decode = split_streams(device, prefill_sms)
    except PartitionRefused as error:
        return _undivided(device, f"multiprocessors are not divided: {error}")
    detail = f"prefill on {prefill.num_sms} of {num_sms} multiprocessors, decode on {decode.num_sms} others"
    return RoleQueues(CudaQueue(device, prefill.stream), CudaQueue(device, decode.stream), detail)


def split_streams(device: torch.device, prefill_sms: int) -> tuple[Share, Share]:
    """Divide the multiprocessors in one split: the first share has `prefill_sms`, rounded up as the GPU needs it.

    Raises:
        PartitionRefused: bindings, driver or GPU cannot do this.
    """
    try:
        driver = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise PartitionRefused(f"no cuda.bindings: {error}") from error
    try:
        # The context of the process must exist before green ones can share it.
        torch.zeros(1, device=device)
        shares = _split(driver, device, prefill_sms)
        _try_out(device, [share.stream for share in shares])
    except (AttributeError, TypeError, RuntimeError) as error:  # bindings too old, their or torch's refusal
        raise PartitionRefused(str(error)) from error
    return shares


def _split(driver: Any, device: torch.device, prefill_sms: int) -> tuple[Share, Share]:
    index = device.index if device.index is not None else _cuda.current_device()
    cu_device = _call(driver.cuDeviceGet, index)
    everything = _call(driver.cuDeviceGetDevResource, cu_device, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM)
    groups, num_groups, rest = _call(driver.cuDevSmResourceSplitByCount, 1, everything, 0, prefill_sms)
    if int(num_groups) != 1 or not rest.sm.smCount:
        raise PartitionRefused(f"{prefill_sms} multiprocessors, rounded up, leave none to decode")
    return (
        _open_share(driver, device, cu_device, groups[0], _NORMAL_PRIORITY),
        _open_share(driver, device, cu_device, rest, _HIGH_PRIORITY),
    )


def _open_share(driver: Any, device: torch.device, cu_device: Any, resource: Any, priority: int) -> Share:
    description = _call(driver.cuDevResourceGenerateDesc, [resource], 1)
    flag = int(driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM)
    context = _call(driver.cuGreenCtxCreate, description, cu_device, flag)
    # What the context really got, not what was asked for.
    granted = _call(driver.cuGreenCtxGetDevResource, context, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM)
    non_blocking = int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
    stream = _call(driver.cuGreenCtxStreamCreate, context, non_blocking, priority)
    return Share(_cuda.ExternalStream(int(stream), device=device), int(granted.sm.smCount))


def _call(function: Any, *args: Any) -> Any:
    """Call the driver, whose functions return an error code and then what they give."""
    code, *given = function(*args)
    if int(code):
        raise PartitionRefused(f"{function.__name__} says {getattr(code, 'name', code)}")
    return given[0] if len(given) == 1 else given


def _try_out(device: torch.device, streams: list[torch.cuda.Stream]) -> None:
    """Run something on each stream behind an event of the other; raise RuntimeError where that does not work."""
    for stream, other in zip(streams, reversed(streams), strict=True):
        with torch.cuda.stream(stream):
            number = torch.ones(1, device=device) + 1
        done = _cuda.Event()
        done.record(stream)
        other.wait_event(done)
        other.synchronize()
        if number.item() != 2:
            raise RuntimeError("a stream of its own multiprocessors computed nonsense")


def _undivided(device: torch.device, detail: str) -> RoleQueues:
    prefill = CudaQueue(device, _cuda.Stream(device, priority=_NORMAL_PRIORITY))
    return RoleQueues(prefill, CudaQueue(device, _cuda.Stream(device, priority=_HIGH_PRIORITY)), detail)
