"""Who may have a thread for its texts, and what waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from protocol.errors import InvalidRequest, Overloaded
from router.text_threads import (
    HEAVY_BYTES,
    MAX_PARTY_BYTES,
    MAX_REQUEST_CHARS,
    NUM_THREADS,
    PARTY,
    PARTY_HEAVY,
    PARTY_THREADS,
    TextBudget,
    TextThreads,
)


class Desk:
    """Works that wait for their end, by name."""

    def __init__(self, threads: TextThreads) -> None:
        self._threads = threads
        self.begun: list[str] = []
        self.may_end: dict[str, threading.Event] = {}
        self.tasks: dict[str, asyncio.Task[str]] = {}

    async def ask(self, party: str, name: str, num_bytes: int = 10) -> None:
        """Let a party ask for a thread."""
        may_end = self.may_end[name] = threading.Event()

        def work() -> str:
            self.begun.append(name)
            assert may_end.wait(10)
            return name

        async def run() -> str:
            PARTY.set(party)
            return await self._threads.run(num_bytes, work)

        self.tasks[name] = asyncio.create_task(run())
        await self.settle()

    async def end(self, name: str) -> None:
        """Let a work end."""
        self.may_end[name].set()
        assert await self.tasks[name] == name
        await self.settle()

    async def settle(self) -> None:
        """Let whatever may begin begin."""
        await asyncio.sleep(0.02)


@pytest_asyncio.fixture
async def desk() -> AsyncIterator[Desk]:
    threads = TextThreads(10)
    desk = Desk(threads)
    yield desk
    for may_end in desk.may_end.values():
        may_end.set()
    await asyncio.gather(*desk.tasks.values(), return_exceptions=True)
    threads.close()


async def test_whatever_one_party_sends_a_thread_is_left_for_another(desk: Desk) -> None:
    for number in range(5):
        await desk.ask("a", f"a{number}")
    assert desk.begun == [f"a{number}" for number in range(PARTY_THREADS)]
    await desk.ask("b", "b0")
    await desk.ask("c", "c0")
    assert desk.begun[PARTY_THREADS:] == ["b0"] and len(desk.begun) == NUM_THREADS
    await desk.end("b0")
    assert desk.begun[-1] == "c0"
    await desk.end("c0")
    assert len(desk.begun) == NUM_THREADS + 1, "the free thread is not for who holds its share"
    await desk.end("a0")
    assert desk.begun[-1] == f"a{PARTY_THREADS}"


async def test_parties_take_turns(desk: Desk) -> None:
    for name in ("a0", "a1", "a9", "b0"):
        await desk.ask(name[0], name)
    for name in ("a2", "a3", "b1", "c0"):
        await desk.ask(name[0], name)
    for name in ("a0", "a1", "b0", "c0", "a2"):
        await desk.end(name)
    assert desk.begun.index("c0") < desk.begun.index("a3") and desk.begun.index("b1") < desk.begun.index("a3")


async def test_a_partys_short_texts_pass_its_long_ones(desk: Desk) -> None:
    for number in range(3):
        await desk.ask("a", f"long{number}", HEAVY_BYTES + 1)
    longs = [f"long{number}" for number in range(PARTY_HEAVY)]
    assert desk.begun == longs
    await desk.ask("a", "short", HEAVY_BYTES)
    assert desk.begun == [*longs, "short"]
    await desk.end("short")
    assert desk.begun == [*longs, "short"], "so many long texts at a time"
    await desk.end("long0")
    assert desk.begun[-1] == f"long{PARTY_HEAVY}"


async def test_who_leaves_gives_up_its_place_in_the_lane_but_not_its_thread(desk: Desk) -> None:
    for name in ("a0", "a1", "a2", "a3", "a4"):
        await desk.ask("a", name)
    desk.tasks["a3"].cancel()
    desk.tasks["a0"].cancel()
    await desk.settle()
    assert desk.begun == ["a0", "a1", "a2"], "a thread works on for who has left"
    desk.may_end["a0"].set()
    await desk.settle()
    assert desk.begun == ["a0", "a1", "a2", "a4"]


async def test_what_waits_is_bounded_in_number_and_for_each_party_in_bytes() -> None:
    threads, may_end = TextThreads(3), threading.Event()

    async def run(party: str, num_bytes: int) -> bool:
        PARTY.set(party)
        return await threads.run(num_bytes, may_end.wait)

    tasks = [asyncio.create_task(run("a", MAX_PARTY_BYTES + 1))]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await asyncio.create_task(run("a", 1))
    tasks += [asyncio.create_task(run("b", 1)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="3 long texts wait"):
        await asyncio.create_task(run("c", 1))
    may_end.set()
    assert await asyncio.gather(*tasks) == [True] * 3
    assert await asyncio.create_task(run("a", 1)), "nothing is left behind"
    threads.close()


async def test_what_work_raises_reaches_who_asked(desk: Desk) -> None:
    threads = TextThreads(2)
    with pytest.raises(ZeroDivisionError):
        await threads.run(1, lambda: 1 // 0)
    assert await threads.run(1, lambda: 7) == 7
    threads.close()


def test_the_texts_of_one_request_are_bounded_together() -> None:
    budget = TextBudget()
    budget.spend(MAX_REQUEST_CHARS, "prompt")
    with pytest.raises(InvalidRequest, match="characters together") as caught:
        budget.spend(1, "input[3]")
    assert caught.value.param == "input"
