"""The compute thread: the only one that runs the model and owns schedulers, sequences and block pools.

    event loop thread                       compute thread
    ─────────────────                       ──────────────
    post(stepper, event) ──► inbox ──►  1. handle every waiting event
                                        2. one step of each stepper that has work, in turn
    callback(emission)  ◄── call_soon ── 3. emissions go back to the event loop
                                        4. nothing to do: sleep until the next event

A colocated worker gives two steppers to one loop: a decode step and a prefill chunk then take turns. Where a step is
only a launch and the launch is long, the stepper lets those added before it have turns in the middle of it
(`give_turns`): a decode step is then never late because a prompt's hundreds of kernels are being launched. A stepper
that waits for a device is asked again after a moment, or at once when an event comes. A stepper that raises has broken
its own invariants: the loop reports it and ends, and the process must end too (it never limps).
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import gc
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch

log = logging.getLogger(__name__)

THREAD_NAME = "compute"
STOP_BUDGET_S = 10.0
# How long the thread sleeps between two looks at a device: long beside a look, short beside a step.
DEVICE_LOOK_S = 50e-6


class Stepper(Protocol):
    """What the compute thread drives. All methods are called on that thread.

    Attributes:
        is_waiting: whether something is under way on a device that a later `step` will collect.
    """

    @property
    def is_waiting(self) -> bool: ...

    def handle(self, event: Any) -> None:
        """Take one event; must not raise for anything a peer or user can cause."""

    def step(self) -> bool:
        """Do one unit of work; return False if there was none."""


class ComputeLoop:
    """Owns the compute thread. Made, started and stopped on an event loop.

    Args:
        num_threads: torch's intra-op threads.
    """

    def __init__(self, num_threads: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._num_threads = num_threads
        self._on_dead: list[Callable[[BaseException], None]] = []
        self._inbox: queue.SimpleQueue[tuple[Stepper, Any] | None] = queue.SimpleQueue()
        self._steppers: list[Stepper] = []
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        self.progress = 0

    def add(self, stepper: Stepper, on_dead: Callable[[BaseException], None]) -> None:
        """Register a stepper; only before `start`.

        Args:
            stepper: what to drive.
            on_dead: called on the event loop when any stepper raised; the loop does nothing more.
        """
        assert not self._thread.is_alive()
        self._steppers.append(stepper)
        self._on_dead.append(on_dead)

    def start(self) -> None:
        """Start the thread. A process that ends without `stop` waits for the step that it is in."""
        self._thread.start()
        # Native code that runs on while the interpreter is torn down reads memory that is free already.
        atexit.register(self._end_with_process)

    def post(self, stepper: Stepper, event: Any) -> None:
        """Hand an event to a stepper; thread-safe, never blocks, keeps order."""
        self._inbox.put((stepper, event))

    def call_back(self, callback: Callable[..., None], *args: Any) -> None:
        """Run `callback` on the event loop soon; called on the compute thread."""
        # The loop may be closed while the process ends, and be so between a look and the call.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *args)

    def give_turns(self, stepper: Stepper) -> None:
        """Let the steppers added before this one do a step each, in the middle of its own; on the compute thread.

        Events wait meanwhile: a stepper in the middle of a step could not take them.
        """
        for other in self._steppers:
            if other is stepper:
                return
            if other.step():
                self.progress += 1

    async def stop(self) -> None:
        """End the thread after its current step; idempotent. A thread that hangs is left to die with the process."""
        self.dismiss()
        atexit.unregister(self._end_with_process)
        if self._thread.is_alive():
            # No executor waits for it: at the interpreter's end there is none any more.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_BUDGET_S):
                    await self._ended.wait()

    def dismiss(self) -> None:
        """Let the thread end after its current step, without waiting for it; thread-safe, idempotent."""
        self._inbox.put(None)

    def _end_with_process(self) -> None:
        self.dismiss()
        self._thread.join(STOP_BUDGET_S)

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)
        # What is loaded by now lives as long as the process: keep the collector from walking it between two steps.
        gc.freeze()
        try:
            while self._turn():
                pass
        except BaseException as error:  # noqa: BLE001  reported to the event loop, which ends the process
            log.exception("compute thread failed")
            for on_dead in self._on_dead:
                self.call_back(on_dead, error)
        finally:
            self.call_back(self._ended.set)

    def _turn(self) -> bool:
        if not self._take_events():
            return False
        worked = False
        for stepper in self._steppers:
            if stepper.step():
                worked = True
                self.progress += 1
        return worked or self._wait()

    def _wait(self) -> bool:
        """Sleep until the next event, or for a moment where a device is at work; return False at the end."""
        look_s = DEVICE_LOOK_S if any(stepper.is_waiting for stepper in self._steppers) else None
        try:
            item = self._inbox.get(timeout=look_s)
        except queue.Empty:
            return True
        if item is None:
            return False
        self._handle(item)
        return True

    def _take_events(self) -> bool:
        while True:
            try:
                item = self._inbox.get_nowait()
            except queue.Empty:
                return True
            if item is None:
                return False
            self._handle(item)

    def _handle(self, item: tuple[Stepper, Any]) -> None:
        stepper, event = item
        stepper.handle(event)
        self.progress += 1
