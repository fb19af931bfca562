"""How the compute thread works with a device that runs behind it.

    host:    upload ─► launch ─► mark ─► fetch ──────────────► is the mark passed? ─► read
    device:            └─ work ─────┘ └─ copy, beside the next work ─┘

On a CPU everything is done when the call returns, so every mark is passed at once. On a GPU the calls only enqueue:
uploads go through pinned memory, and what is fetched is copied on a second stream, so that the next step need not wait.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

_cuda: Any = torch.cuda  # its classes carry no types


class Mark(Protocol):
    """A point in the device's work."""

    def is_passed(self) -> bool:
        """Whether the device has done everything before it; never waits."""
        ...

    def wait(self) -> None:
        """Return once it is passed; other Python threads run meanwhile."""
        ...


class DeviceQueue(Protocol):
    """One ordered queue of work on one device. Used by one thread."""

    device: torch.device

    def active(self) -> AbstractContextManager[Any]:
        """Give a context in which torch enqueues here."""
        ...

    def mark(self) -> Mark:
        """Mark the end of what is enqueued so far."""
        ...

    def upload(self, array: np.ndarray[Any, Any]) -> Tensor:
        """Give a device tensor with the array's content; the array may change once this returns."""
        ...

    def host_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Give host memory that `fetch` can copy into without waiting."""
        ...

    def fetch(self, source: Tensor, target: Tensor | None = None) -> tuple[Tensor, Mark]:
        """Copy a tensor to the host, into `target` or fresh memory.

        The copy is valid, and target may be reused, once the mark is passed. Work enqueued later may run before the
        copy does: the source must not be changed by it.
        """
        ...


class _Passed:
    def is_passed(self) -> bool:
        return True

    def wait(self) -> None:
        return


PASSED: Mark = _Passed()


class HostQueue:
    """The queue of a CPU: nothing is ever pending."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def active(self) -> AbstractContextManager[Any]:
        """Give an empty context."""
        return nullcontext()

    def mark(self) -> Mark:
        """Give a mark that is passed."""
        return PASSED

    def upload(self, array: np.ndarray[Any, Any]) -> Tensor:
        """Give a copy as a tensor."""
        return torch.from_numpy(array.copy())

    def host_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Give a tensor."""
        return torch.zeros(shape, dtype=dtype)

    def fetch(self, source: Tensor, target: Tensor | None = None) -> tuple[Tensor, Mark]:
        """Give a copy."""
        return (source.clone() if target is None else target.copy_(source)), PASSED


class CudaQueue:
    """A stream of a GPU, and a second one for what the host fetches.

    Args:
        device: the GPU.
        stream: where work is enqueued; None makes one of high priority.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self.device = device
        self.stream: torch.cuda.Stream = stream or _cuda.Stream(device, priority=-1)
        self._copies: torch.cuda.Stream = _cuda.Stream(device, priority=-1)

    def active(self) -> AbstractContextManager[Any]:
        """Give the context of the stream."""
        return torch.cuda.stream(self.stream)

    def mark(self) -> Mark:
        """Record an event on the stream."""
        return _Event(self.stream)

    def upload(self, array: np.ndarray[Any, Any]) -> Tensor:
        """Copy through pinned memory, which torch keeps until the copy is done."""
        pinned = torch.from_numpy(array).pin_memory()
        with self.active():
            return pinned.to(self.device, non_blocking=True)

    def host_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Give pinned memory."""
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def fetch(self, source: Tensor, target: Tensor | None = None) -> tuple[Tensor, Mark]:
        """Copy into pinned memory on the second stream, after what is enqueued so far."""
        if target is None:
            target = self.host_tensor(tuple(source.shape), source.dtype)
        source.record_stream(self._copies)  # or torch would hand its memory out again before the copy is done
        self._copies.wait_stream(self.stream)
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
        return target, _Event(self._copies)


class _Event:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = _cuda.Event(blocking=True)
        self._event.record(stream)

    def is_passed(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        # Nearly always it has passed: asking is cheaper than a call that may give the thread up.
        if not self._event.query():
            self._event.synchronize()


def open_queue(device: torch.device) -> DeviceQueue:
    """Give a new queue of a device."""
    return CudaQueue(device) if device.type == "cuda" else HostQueue(device)
