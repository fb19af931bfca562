"""The nursery with its real process: workers that are forked, named, adopted, ended and replaced."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from baton.config import child_environment
from baton.nursery import Nursery
from baton.supervisor import ChildSpec, Supervisor

WAIT_BUDGET_S = 60.0
ROUTER = "http://127.0.0.1:9"


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_BUDGET_S):
        while not condition():
            await asyncio.sleep(0.01)


class Children:
    """A supervisor with one worker that finds no router, and its nursery."""

    def __init__(self, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("a secret of enough bytes\n")
        model = tmp_path / "config.json"
        model.write_text(
            '{"architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,'
            ' "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,'
            ' "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2}'
        )
        arguments = (
            *("decode", f"dummy:{model}", f"--secret-file={tmp_path / 'secret'}", f"--router-url={ROUTER}"),
            *("--worker-id=forked", "--num-kv-blocks=16", "--device=cpu", "--threads=1", "--cores=0"),
        )
        self.lines: list[str] = []
        self.nursery = Nursery(child_environment())
        # By exec it would end at once: what runs was forked.
        spec = ChildSpec("forked", ("/nonexistent/program",), arguments=arguments)
        self.supervisor = Supervisor([spec], lambda _, line: self.lines.append(line), os.environ, nursery=self.nursery)
        self.supervisor.mark_ready()

    @property
    def pid(self) -> int | None:
        """Of the worker."""
        return self.supervisor.pids()["forked"]

    async def serving(self) -> int:
        """Wait until the worker serves; return its pid."""
        await until(lambda: any("admin of forked" in line for line in self.lines))
        self.lines.clear()
        assert self.pid is not None
        return self.pid


@asynccontextmanager
async def running(tmp_path: Path) -> AsyncIterator[Children]:
    children = Children(tmp_path)
    children.nursery.start()
    children.supervisor.start()
    try:
        yield children
    finally:
        assert await children.supervisor.drain(10.0, asyncio.Event()), "SIGTERM ends it"
        await children.nursery.close()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def own_children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def sockets_of(pid: int) -> set[str]:
    opened = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    return {name for name in opened if name.startswith("socket:")}


async def test_a_worker_is_forked_adopted_named_and_replaced(tmp_path: Path) -> None:
    async with running(tmp_path) as children:
        pid = await children.serving()
        assert parent_of(pid) == os.getpid() and os.getsid(pid) == pid
        assert command_line(pid).startswith(b"baton decode dummy:")
        assert os.sched_getaffinity(pid) == {0}
        assert children.nursery.pid is not None
        assert not sockets_of(pid) & sockets_of(children.nursery.pid), "the way to the nursery stays its own"
        os.kill(pid, signal.SIGKILL)
        await until(lambda: "was ended by SIGKILL; starting again in 0.05 s" in children.lines)
        successor = await children.serving()
        assert successor != pid and str(pid) not in os.listdir("/proc"), "reaped"
    assert not is_alive(successor)


async def test_workers_outlive_their_nursery_and_a_new_one_forks_the_next(tmp_path: Path) -> None:
    async with running(tmp_path) as children:
        pid, nursery_pid = await children.serving(), children.nursery.pid
        assert nursery_pid is not None
        os.kill(nursery_pid, signal.SIGKILL)
        await until(lambda: children.nursery.pid not in (None, nursery_pid))
        assert is_alive(pid)
        await until(lambda: children.nursery._socket is not None)
        os.kill(pid, signal.SIGKILL)
        assert await children.serving() != pid


async def test_without_a_nursery_a_worker_is_started_by_exec(tmp_path: Path) -> None:
    children = Children(tmp_path)
    children.supervisor.start()
    await until(lambda: any("cannot start" in line for line in children.lines))
    await children.supervisor.drain(1.0, asyncio.Event())


async def test_a_worker_without_a_permit_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nursery = Nursery(child_environment())
    nursery.start()
    read_fd, write_fd = os.pipe()
    granted = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: None if data == b"!" else granted(fd, data))
    process = await nursery.fork(("decode", "--no-such-option"), write_fd)
    os.close(write_fd)
    assert process is not None and await asyncio.wait_for(process.wait(), WAIT_BUDGET_S) == 0
    with os.fdopen(read_fd, "rb") as output:
        assert output.read() == b"", "it has not even read its command line"
    await nursery.close()


async def test_a_nursery_that_cannot_come_up_is_not_tried_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )
    nursery = Nursery({**child_environment(), "PYTHONPATH": f"{tmp_path}:{child_environment()['PYTHONPATH']}"})
    before = own_children()
    nursery.start()
    assert await nursery.fork(("decode",), 1) is None and nursery.pid is None
    await nursery.close()
    assert own_children() == before, "killed, and reaped as well"
    assert "an import has started threads" in capfd.readouterr().err


async def test_the_exit_code_of_a_forked_worker_is_told(tmp_path: Path) -> None:
    nursery = Nursery(child_environment())
    nursery.start()
    read_fd, write_fd = os.pipe()
    process = await nursery.fork(("decode", "--no-such-option"), write_fd)
    os.close(write_fd)
    assert process is not None and await asyncio.wait_for(process.wait(), WAIT_BUDGET_S) == 2
    with os.fdopen(read_fd, "rb") as output:
        assert b"--no-such-option: there is no such option" in output.read()
    process.send_signal(signal.SIGTERM)  # too late, and harmless
    await nursery.close()
