"""The compute thread: order, turns, and what happens when a stepper breaks."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from engine.compute_loop import ComputeLoop


class Recorder:
    """A stepper that counts down work given to it."""

    is_waiting = False

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name, self.left = log, name, 0
        self.thread: int | None = None

    def handle(self, event: Any) -> None:
        self.thread = threading.get_ident()
        if event == "break":
            raise RuntimeError("broken on purpose")
        self.left += event

    def step(self) -> bool:
        if self.left == 0:
            return False
        self.left -= 1
        self.log.append(self.name)
        return True


async def _until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  polls another thread
            await asyncio.sleep(0.005)


async def test_two_steppers_take_turns_on_one_thread() -> None:
    log: list[str] = []
    compute = ComputeLoop(1)
    a, b = Recorder(log, "a"), Recorder(log, "b")
    for stepper in (a, b):
        compute.add(stepper, lambda error: None)
        compute.post(stepper, 3)
    compute.start()
    await _until(lambda: len(log) == 6)
    assert log == ["a", "b"] * 3
    assert a.thread == b.thread != threading.get_ident()
    assert compute.progress == 2 + 6
    await compute.stop()


async def test_it_sleeps_when_idle_and_wakes_on_an_event() -> None:
    log: list[str] = []
    compute = ComputeLoop(1)
    stepper = Recorder(log, "a")
    compute.add(stepper, lambda error: None)
    compute.start()
    await asyncio.sleep(0.05)
    before = compute.progress
    await asyncio.sleep(0.05)
    assert compute.progress == before
    compute.post(stepper, 2)
    await _until(lambda: log == ["a", "a"])
    await compute.stop()
    await compute.stop()


async def test_a_broken_stepper_is_reported_to_every_owner() -> None:
    compute = ComputeLoop(1)
    errors: list[BaseException] = []
    first, second = Recorder([], "a"), Recorder([], "b")
    compute.add(first, errors.append)
    compute.add(second, errors.append)
    compute.start()
    compute.post(first, "break")
    await _until(lambda: len(errors) == 2)
    assert "broken on purpose" in str(errors[0])
    await compute.stop()


async def test_stopping_does_not_wait_for_a_thread_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.compute_loop.STOP_BUDGET_S", 0.1)
    released = threading.Event()

    class Hanging(Recorder):
        def step(self) -> bool:
            released.wait(10)
            return False

    compute = ComputeLoop(1)
    compute.add(Hanging([], "h"), lambda error: None)
    compute.start()
    async with asyncio.timeout(2):
        await compute.stop()
    released.set()
    await compute.stop()


async def test_a_stepper_that_waits_for_a_device_is_asked_again_without_an_event() -> None:
    class Waiting(Recorder):
        num_asked = 0

        def step(self) -> bool:
            self.num_asked += 1
            if self.num_asked == 20:
                self.is_waiting = False
            return False

    compute, stepper = ComputeLoop(1), Waiting([], "w")
    stepper.is_waiting = True
    compute.add(stepper, lambda error: None)
    compute.start()
    await _until(lambda: stepper.num_asked == 20)
    await asyncio.sleep(0.02)
    assert stepper.num_asked == 20, "with nothing under way it sleeps"
    await compute.stop()


async def test_a_long_step_gives_turns_to_those_before_it_and_to_no_event() -> None:
    log: list[str] = []
    compute = ComputeLoop(1)

    class Long(Recorder):
        def step(self) -> bool:
            if self.left == 0:
                return False
            self.left -= 1
            for part in range(3):
                self.log.append(f"{self.name}{part}")
                compute.post(first, 10)
                compute.give_turns(self)
            return True

    first, second, third = Recorder(log, "a"), Long(log, "b"), Recorder(log, "c")
    for stepper in (first, second, third):
        compute.add(stepper, lambda error: None)
    for stepper, amount in ((first, 3), (second, 1), (third, 1)):
        compute.post(stepper, amount)
    compute.start()
    await _until(lambda: len(log) == 3 + 3 + 1 + 30)
    assert log[:7] == ["a", "b0", "a", "b1", "a", "b2", "c"]
    assert compute.progress == 3 + 3 + 3 + 1 + 1 + 30, "events, and steps wherever they were done"
    await compute.stop()
