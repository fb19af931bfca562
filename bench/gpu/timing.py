"""Times on the device's own clock: events on a GPU, the host's clock where there is none."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any, Final, Protocol

import torch

from engine.device_queue import CudaQueue, DeviceQueue

Call = Callable[[], object]
_NUM_PLAIN_RUNS: Final = 2
_cuda: Any = torch.cuda  # its classes carry no types


class Ticks(Protocol):
    """Points in the device's work, in order."""

    def tick(self) -> None:
        """Mark a point; on a GPU within the stream that is current."""

    def intervals_s(self) -> list[float]:
        """Wait for the last point; return the seconds between each point and the next."""


class HostTicks:
    """Ticks of the host's clock, for a device that is done when a call returns."""

    def __init__(self) -> None:
        self._at_s: list[float] = []

    def tick(self) -> None:
        """Mark a point."""
        self._at_s.append(time.perf_counter())

    def intervals_s(self) -> list[float]:
        """Return the seconds between points."""
        return [b - a for a, b in zip(self._at_s, self._at_s[1:], strict=False)]


class EventTicks:
    """Ticks of CUDA events."""

    def __init__(self) -> None:
        self._events: list[Any] = []

    def tick(self) -> None:
        """Record an event on the current stream."""
        event = _cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def intervals_s(self) -> list[float]:
        """Wait for the last event; return the seconds between events."""
        self._events[-1].synchronize()
        return [a.elapsed_time(b) * 1e-3 for a, b in zip(self._events, self._events[1:], strict=False)]


def new_ticks(device: torch.device) -> Ticks:
    """Give ticks of a device."""
    return EventTicks() if device.type == "cuda" else HostTicks()


def round_s(calls: Sequence[Call], queue: DeviceQueue, num_rounds: int, *, in_graph: bool) -> list[float]:
    """Return, for each round, the mean seconds of one of these calls, all made one after the other.

    Args:
        calls: on memory of their own where caches matter.
        queue: where they run.
        num_rounds: timed, after two that are not.
        in_graph: record a round as one CUDA graph and replay it, so that no launch is waited for. Without effect on a
            CPU.
    """
    wait_for_all(queue.device)
    with queue.active(), torch.inference_mode():
        for _ in range(_NUM_PLAIN_RUNS):
            _call_all(calls)
        replay: Callable[[], object] = partial(_call_all, calls)
        if in_graph and isinstance(queue, CudaQueue):
            replay = _recorded(calls, queue)
            replay()
        ticks = new_ticks(queue.device)
        ticks.tick()
        for _ in range(num_rounds):
            replay()
            ticks.tick()
        return [seconds / len(calls) for seconds in ticks.intervals_s()]


def median_s(calls: Sequence[Call], queue: DeviceQueue, num_rounds: int, *, in_graph: bool) -> float:
    """Return the median over rounds; see `round_s`."""
    return median(round_s(calls, queue, num_rounds, in_graph=in_graph))


def wait_for_all(device: torch.device) -> None:
    """Wait for every stream of the device: what was made on one of them may now be used on another."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the least value that at least this share of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _call_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _recorded(calls: Sequence[Call], queue: CudaQueue) -> Callable[[], object]:
    queue.stream.synchronize()
    graph = _cuda.CUDAGraph()
    with _cuda.graph(graph, stream=queue.stream):
        _call_all(calls)
    replay: Callable[[], object] = graph.replay
    return replay
