"""The supervisor with small real child processes: restart, pauses, giving up, ending in order, and its own death."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from baton.supervisor import ChildrenFailed, ChildSpec, RestartPolicy, Supervisor

QUICK = RestartPolicy(first_s=0.02, longest_s=0.08, healthy_s=30.0, max_attempts=3)
WAIT_BUDGET_S = 10.0
SLEEPER = "import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(0))\nprint('up', flush=True)\ntime.sleep(60)"
STUBBORN = "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(60)"


def spec(name: str, code: str, stage: int = 0) -> ChildSpec:
    return ChildSpec(name, (sys.executable, "-S", "-c", code), stage)


class Lines:
    """Collects what children write."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def __call__(self, name: str, line: str) -> None:
        self.seen.append((name, line))

    def of(self, name: str) -> list[str]:
        return [line for child, line in self.seen if child == name]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_BUDGET_S):
        while not condition():
            await asyncio.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Tell whether a process exists and is not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


async def test_lines_of_children_are_handed_on_with_their_name() -> None:
    lines = Lines()
    supervisor = Supervisor([spec("a", SLEEPER), spec("b", SLEEPER)], lines, os.environ)
    supervisor.start()
    await until(lambda: len(lines.seen) == 2)
    assert sorted(lines.seen) == [("a", "up"), ("b", "up")]
    assert await supervisor.drain(5.0, asyncio.Event())


async def test_a_killed_child_is_started_again() -> None:
    lines = Lines()
    supervisor = Supervisor([spec("a", SLEEPER)], lines, os.environ, QUICK)
    supervisor.start()
    await until(lambda: lines.of("a") == ["up"])
    supervisor.mark_ready()
    first = supervisor.pids()["a"]
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await until(lambda: lines.of("a").count("up") == 2)
    assert supervisor.pids()["a"] not in (first, None)
    assert "was ended by SIGKILL; starting again in 0.02 s" in lines.of("a")
    assert await supervisor.drain(5.0, asyncio.Event())


async def test_pauses_double_up_to_the_longest() -> None:
    lines = Lines()
    supervisor = Supervisor([spec("a", "raise SystemExit(1)")], lines, os.environ, QUICK)
    supervisor.mark_ready()
    supervisor.start()
    await until(lambda: len(lines.of("a")) == 4)
    pauses = [line.split()[-2] for line in lines.of("a")]
    assert pauses == ["0.02", "0.04", "0.08", "0.08"]
    assert await supervisor.drain(5.0, asyncio.Event())


async def test_the_pause_is_short_again_after_a_healthy_run() -> None:
    lines = Lines()
    policy = RestartPolicy(first_s=0.02, longest_s=0.08, healthy_s=0.1)
    supervisor = Supervisor(
        [spec("a", "import time; time.sleep(0.15); raise SystemExit(1)")], lines, os.environ, policy
    )
    supervisor.mark_ready()
    supervisor.start()
    await until(lambda: len(lines.of("a")) == 2)
    assert [line.split()[-2] for line in lines.of("a")] == ["0.02", "0.02"]
    await supervisor.drain(5.0, asyncio.Event())


async def test_a_child_that_never_works_fails_the_set_with_its_last_lines() -> None:
    supervisor = Supervisor([spec("a", "print('no such thing'); raise SystemExit(1)")], Lines(), os.environ, QUICK)
    supervisor.start()
    with pytest.raises(ChildrenFailed, match=r"a ended with exit code 1 3 times .*\n    no such thing"):
        await asyncio.wait_for(supervisor.failed(), WAIT_BUDGET_S)
    await supervisor.drain(1.0, asyncio.Event())


async def test_an_unusable_configuration_is_not_tried_again() -> None:
    lines = Lines()
    supervisor = Supervisor([spec("a", "print('bad option'); raise SystemExit(2)")], lines, os.environ, QUICK)
    supervisor.start()
    with pytest.raises(ChildrenFailed, match="exit code 2 before it was ready"):
        await asyncio.wait_for(supervisor.failed(), WAIT_BUDGET_S)
    assert lines.of("a") == ["bad option"]
    await supervisor.drain(1.0, asyncio.Event())


async def test_a_command_that_does_not_exist_fails_the_set() -> None:
    supervisor = Supervisor([ChildSpec("a", ("/nonexistent/program",))], Lines(), os.environ, QUICK)
    supervisor.start()
    with pytest.raises(ChildrenFailed, match="cannot start"):
        await asyncio.wait_for(supervisor.failed(), WAIT_BUDGET_S)
    await supervisor.drain(1.0, asyncio.Event())


async def test_a_drain_ends_the_stages_in_order() -> None:
    lines = Lines()
    slow = SLEEPER.replace("sys.exit(0)", "(time.sleep(0.2), print('end', flush=True), sys.exit(0))")
    quick = SLEEPER.replace("sys.exit(0)", "(print('end', flush=True), sys.exit(0))")
    supervisor = Supervisor([spec("worker", quick, stage=1), spec("router", slow, stage=0)], lines, os.environ)
    supervisor.start()
    await until(lambda: len(lines.seen) == 2)
    assert await supervisor.drain(5.0, asyncio.Event())
    assert lines.seen[2:] == [("router", "end"), ("worker", "end")]
    assert supervisor.pids() == {"worker": None, "router": None}


async def test_what_does_not_end_within_the_budget_is_killed() -> None:
    lines = Lines()
    supervisor = Supervisor([spec("a", STUBBORN), spec("b", SLEEPER, stage=1)], lines, os.environ)
    supervisor.start()
    await until(lambda: len(lines.seen) == 2)
    started_s = time.monotonic()
    assert not await supervisor.drain(0.3, asyncio.Event())
    assert 0.3 <= time.monotonic() - started_s < 3.0
    assert set(supervisor.pids().values()) == {None}


async def test_hurry_cuts_the_drain_short() -> None:
    lines, hurry = Lines(), asyncio.Event()
    supervisor = Supervisor([spec("a", STUBBORN)], lines, os.environ)
    supervisor.start()
    await until(lambda: len(lines.seen) == 1)
    asyncio.get_running_loop().call_later(0.1, hurry.set)
    started_s = time.monotonic()
    assert not await supervisor.drain(60.0, hurry)
    assert time.monotonic() - started_s < 5.0
    assert supervisor.pids() == {"a": None}


async def test_a_drain_during_a_pause_starts_nothing_more() -> None:
    lines = Lines()
    policy = RestartPolicy(first_s=60.0, longest_s=60.0)
    supervisor = Supervisor([spec("a", "raise SystemExit(1)")], lines, os.environ, policy)
    supervisor.start()
    await until(lambda: len(lines.seen) == 1)
    assert await supervisor.drain(5.0, asyncio.Event())
    assert len(lines.seen) == 1


async def test_a_left_behind_grandchild_does_not_hide_the_end_of_a_child() -> None:
    lines = Lines()
    code = "import subprocess, sys; subprocess.Popen(['sleep', '30']); sys.exit(1)"
    supervisor = Supervisor([spec("a", code)], lines, os.environ, QUICK)
    supervisor.start()
    with pytest.raises(ChildrenFailed):
        await asyncio.wait_for(supervisor.failed(), WAIT_BUDGET_S)
    await supervisor.drain(1.0, asyncio.Event())


async def test_what_only_a_terminal_would_obey_is_handed_on_escaped() -> None:
    lines = Lines()
    code = r"print('a\x1b[2Kb\rc\u2028d', flush=True); import time; time.sleep(60)"
    supervisor = Supervisor([spec("a", code)], lines, {**os.environ, "PYTHONIOENCODING": "utf-8"})
    supervisor.start()
    await until(lambda: bool(lines.of("a")))
    await supervisor.drain(0.0, asyncio.Event())
    assert lines.of("a")[0] == r"a\u001b[2Kb\rc\u2028d"


async def test_endless_output_without_a_newline_is_cut_into_lines() -> None:
    lines = Lines()
    code = "import sys, time; sys.stdout.write('x' * 100_000); sys.stdout.flush(); time.sleep(60)"
    supervisor = Supervisor([spec("a", code)], lines, os.environ)
    supervisor.start()
    await until(lambda: len(lines.seen) >= 1)
    assert all(len(line) <= 16384 for line in lines.of("a"))
    await supervisor.drain(0.1, asyncio.Event())


@pytest.fixture
def supervising_process(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Yield a process that supervises one stubborn child, and the child's pid."""
    child = "import os, signal, time; signal.signal(15, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(60)"
    code = (
        "import asyncio, os, sys\n"
        "from baton.supervisor import ChildSpec, Supervisor\n"
        "async def main():\n"
        "    show = lambda name, line: print(line, flush=True)\n"
        f"    spec = ChildSpec('a', (sys.executable, '-S', '-c', {child!r}))\n"
        "    Supervisor([spec], show, os.environ).start()\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process, process.stdout:
        yield process, int(process.stdout.readline())
        process.kill()


def test_children_die_with_a_killed_supervisor(supervising_process: tuple[subprocess.Popen[str], int]) -> None:
    process, child_pid = supervising_process
    assert is_alive(child_pid)
    process.kill()
    process.wait(WAIT_BUDGET_S)
    deadline_s = time.monotonic() + WAIT_BUDGET_S
    while is_alive(child_pid) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not is_alive(child_pid)
