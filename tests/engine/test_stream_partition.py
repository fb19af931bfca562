"""Dividing a GPU's multiprocessors, against a driver that behaves as its documentation says; no GPU is needed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from enum import IntEnum
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from engine import device_queue, stream_partition
from engine.device_queue import CudaQueue, HostQueue
from engine.stream_partition import RoleQueues, open_role_queues
from protocol.errors import ConfigError

NUM_SMS = 132
GPU = torch.device("cuda", 0)


class Code(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_NOT_SUPPORTED = 801


@dataclass
class Driver:
    """As `cuda.bindings.driver`: every function returns a code and its results. A split hands out sets by eights."""

    failing: str = ""
    num_splits: int = 0
    contexts: list[set[int]] = field(default_factory=list)
    streams: dict[int, tuple[set[int], int]] = field(default_factory=dict)
    CUdevResourceType: ClassVar[Any] = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1)
    CUgreenCtxCreate_flags: ClassVar[Any] = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=1)
    CUstream_flags: ClassVar[Any] = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)

    def _answer(self, name: str, *given: Any) -> tuple[Any, ...]:
        return (Code.CUDA_ERROR_NOT_SUPPORTED, None) if name == self.failing else (Code.CUDA_SUCCESS, *given)

    def cuDeviceGet(self, index: int) -> Any:
        return self._answer("cuDeviceGet", index)

    def cuDeviceGetDevResource(self, device: int, kind: int) -> Any:
        assert kind == 1
        return self._answer("cuDeviceGetDevResource", _resource(set(range(NUM_SMS))))

    def cuDevSmResourceSplitByCount(self, num_groups: int, source: Any, flags: int, min_count: int) -> Any:
        self.num_splits += 1
        size = -(-min_count // 8) * 8
        sms = sorted(source.sms)
        if size > len(sms):
            return Code.CUDA_ERROR_NOT_SUPPORTED, None, 0, None
        return self._answer(
            "cuDevSmResourceSplitByCount", [_resource(set(sms[:size]))], num_groups, _resource(set(sms[size:]))
        )

    def cuDevResourceGenerateDesc(self, resources: list[Any], count: int) -> Any:
        assert len(resources) == count == 1
        return self._answer("cuDevResourceGenerateDesc", resources[0])

    def cuGreenCtxCreate(self, description: Any, device: int, flags: int) -> Any:
        assert flags == 1
        self.contexts.append(description.sms)
        return self._answer("cuGreenCtxCreate", len(self.contexts) - 1)

    def cuGreenCtxGetDevResource(self, context: int, kind: int) -> Any:
        return self._answer("cuGreenCtxGetDevResource", _resource(self.contexts[context]))

    def cuGreenCtxStreamCreate(self, context: int, flags: int, priority: int) -> Any:
        handle = 100 + len(self.streams)
        self.streams[handle] = (self.contexts[context], priority)
        return self._answer("cuGreenCtxStreamCreate", handle)


def _resource(sms: set[int]) -> Any:
    return SimpleNamespace(sms=sms, sm=SimpleNamespace(smCount=len(sms)))


class Stream:
    """As `torch.cuda.Stream` and `ExternalStream`."""

    def __init__(self, handle: Any = None, device: Any = None, priority: int = 0) -> None:
        self.handle, self.priority = handle, priority

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...


@dataclass
class Machine:
    """What the module sees of a machine with a GPU."""

    driver: Driver
    record: Callable[[Any], None] = lambda stream: None
    number: float = 2.0
    has_bindings: bool = True

    def open(self, prefill_sms: int) -> RoleQueues:
        return open_role_queues(GPU, prefill_sms)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine(Driver())

    def import_module(name: str) -> Any:
        assert name == "cuda.bindings.driver"
        if not found.has_bindings:
            raise ImportError("No module named 'cuda'")
        return found.driver

    class Sum:
        def __add__(self, other: int) -> Sum:
            return self

        def item(self) -> float:
            return found.number

    cuda = SimpleNamespace(
        get_device_properties=lambda device: SimpleNamespace(multi_processor_count=NUM_SMS),
        current_device=lambda: 0,
        Stream=lambda device, priority=0: Stream(None, device, priority),
        ExternalStream=Stream,
        Event=lambda: SimpleNamespace(record=lambda stream: found.record(stream)),
        stream=lambda stream: nullcontext(),
    )
    monkeypatch.setattr("engine.stream_partition.importlib.import_module", import_module)
    monkeypatch.setattr(stream_partition, "_cuda", cuda)
    monkeypatch.setattr(device_queue, "_cuda", cuda)
    fake_torch = SimpleNamespace(zeros=lambda *a, **k: None, ones=lambda *a, **k: Sum(), cuda=cuda)
    monkeypatch.setattr(stream_partition, "torch", fake_torch)
    return found


def _streams(queues: RoleQueues) -> tuple[Any, Any]:
    assert isinstance(queues.prefill, CudaQueue) and isinstance(queues.decode, CudaQueue)
    return queues.prefill.stream, queues.decode.stream


def test_one_split_gives_each_role_multiprocessors_that_the_other_has_not(machine: Machine) -> None:
    queues = machine.open(60)
    prefill, decode = _streams(queues)
    prefill_sms, prefill_priority = machine.driver.streams[prefill.handle]
    decode_sms, decode_priority = machine.driver.streams[decode.handle]
    assert (len(prefill_sms), len(decode_sms)) == (64, 68) and not prefill_sms & decode_sms
    assert machine.driver.num_splits == 1, "a second split would hand out the same ones again"
    assert decode_priority < prefill_priority
    assert queues.detail == "prefill on 64 of 132 multiprocessors, decode on 68 others"


def test_undivided_both_have_plain_streams_and_decode_goes_first(machine: Machine) -> None:
    prefill, decode = _streams(machine.open(0))
    assert (prefill.handle, prefill.priority, decode.handle, decode.priority) == (None, 0, None, -1)
    assert machine.driver.num_splits == 0


@pytest.mark.parametrize(
    "failing",
    [
        "cuDeviceGet",
        "cuDeviceGetDevResource",
        "cuDevSmResourceSplitByCount",
        "cuDevResourceGenerateDesc",
        "cuGreenCtxCreate",
        "cuGreenCtxGetDevResource",
        "cuGreenCtxStreamCreate",
    ],
)
def test_a_driver_that_refuses_leaves_them_undivided_and_is_named(machine: Machine, failing: str) -> None:
    machine.driver.failing = failing
    queues = machine.open(64)
    assert queues.detail == f"multiprocessors are not divided: {failing} says CUDA_ERROR_NOT_SUPPORTED"
    prefill, decode = _streams(queues)
    assert (prefill.handle, prefill.priority, decode.handle, decode.priority) == (None, 0, None, -1)


def test_missing_or_old_bindings_leave_them_undivided(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.has_bindings = False
    assert machine.open(64).detail == "multiprocessors are not divided: no cuda.bindings: No module named 'cuda'"
    machine.has_bindings = True
    monkeypatch.delattr(Driver, "cuGreenCtxStreamCreate")
    assert "cuGreenCtxStreamCreate" in machine.open(64).detail


def test_streams_that_fail_their_trial_are_not_used(machine: Machine) -> None:
    def refuse(stream: Any) -> None:
        raise RuntimeError("invalid resource handle")

    machine.record = refuse
    queues = machine.open(64)
    assert queues.detail == "multiprocessors are not divided: invalid resource handle"
    assert _streams(queues)[0].handle is None
    machine.record, machine.number = lambda stream: None, 7.0
    assert "nonsense" in machine.open(64).detail


def test_a_share_that_leaves_decode_nothing_is_refused(machine: Machine) -> None:
    with pytest.raises(ConfigError, match="prefill-sms: 132 of 132 multiprocessors leave none to decode"):
        machine.open(132)
    # 130 become 136 by eights: more than there are.
    assert "not divided" in machine.open(130).detail


def test_a_cpu_has_none_to_divide() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match="prefill-sms"):
        open_role_queues(cpu, 8)
    queues = open_role_queues(cpu, 0)
    assert isinstance(queues.prefill, HostQueue) and isinstance(queues.decode, HostQueue)
