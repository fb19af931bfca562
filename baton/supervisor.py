"""Keep a set of child processes running, and end them in order.

    STARTING ─► RUNNING ─exit─► BACKOFF ─► STARTING ...                        (each child)
        │           └─ drain: SIGTERM, stage by stage ─► ENDED, or SIGKILL when the budget is over
        └─ not ready and out of attempts, or its configuration cannot be used ─► the whole set has failed

1. A child lives in a session of its own, so that Ctrl-C reaches it only through here, in order; and it dies with this
   process, however that ends (PR_SET_PDEATHSIG). It is forked by the nursery where it may be, else started by exec.
2. Its output is read line by line, handed on without what only a terminal would obey, and its last lines kept for the
   message that says why it failed.
3. An ended child is started again after a pause that doubles, and is short again once the child has run for a while.
4. Until `mark_ready`, giving up is right: a child that never worked will not work by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from baton.log_lines import escaped
from baton.nursery import AdoptedProcess, Nursery, begin_as_child
from protocol.errors import BatonError

EXIT_UNUSABLE = 2
READ_BYTES = 65536
MAX_LINE_BYTES = 16384
NUM_KEPT_LINES = 20
OUTPUT_GRACE_S = 1.0


class ChildrenFailed(BatonError):
    """The children could not be brought up; the message names the child and shows its last lines."""


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """One child process.

    Attributes:
        name: how its lines and messages call it.
        command: what is executed.
        stage: children of a lower stage are asked to end first; the next stage follows when they have.
        pass_fds: descriptors it inherits, under the same numbers.
        arguments: of `baton`, for the nursery to fork it with; None: always by exec.
        stop_signal: what asks it to end when the whole set does.
    """

    name: str
    command: tuple[str, ...]
    stage: int = 0
    pass_fds: tuple[int, ...] = ()
    arguments: tuple[str, ...] | None = None
    stop_signal: signal.Signals = signal.SIGTERM


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Pauses between attempts: `first_s` doubling up to `longest_s`, from the start again after `healthy_s` of running.

    Before the set was ready once, `max_attempts` failures of one child end it.
    """

    first_s: float = 0.05
    longest_s: float = 5.0
    healthy_s: float = 3.0
    max_attempts: int = 5


@dataclass(slots=True)
class _Child:
    spec: ChildSpec
    process: asyncio.subprocess.Process | AdoptedProcess | None = None
    num_failures: int = 0
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=NUM_KEPT_LINES))


class Supervisor:
    """Runs children until `drain`; all methods belong to one event loop.

    Args:
        specs: the children.
        on_line: takes (child name, line) for each line that a child writes.
        environment: what the children start with.
        policy: pauses and attempts.
        nursery: started by the caller; forks those children that have `arguments`.
    """

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        on_line: Callable[[str, str], None],
        environment: Mapping[str, str],
        policy: RestartPolicy | None = None,
        nursery: Nursery | None = None,
    ) -> None:
        self._children = [_Child(spec) for spec in specs]
        self._on_line = on_line
        self._environment = dict(environment)
        self._nursery = nursery
        self._policy = policy or RestartPolicy()
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._is_ready = False

    def start(self) -> None:
        """Start every child; they are kept running from here on."""
        self._tasks = [asyncio.create_task(self._keep(child), name=child.spec.name) for child in self._children]

    def mark_ready(self) -> None:
        """Note that the whole set has worked once: from now on a child that ends is always started again."""
        self._is_ready = True

    def pids(self) -> dict[str, int | None]:
        """Give the process id of each child by name, None for one that is not running."""
        return {child.spec.name: _pid(child) for child in self._children}

    def reload(self) -> None:
        """Ask every child that runs to read its configuration again; one that is started later does so anyway."""
        for child in self._children:
            _signal(child, signal.SIGHUP)

    async def failed(self) -> None:
        """Wait until the set cannot be brought up, then raise ChildrenFailed. Cancel-safe."""
        await asyncio.shield(self._failure)

    async def drain(self, budget_s: float, hurry: asyncio.Event) -> bool:
        """Ask the children to end, stage by stage, and kill what is left when the budget is over or `hurry` is set.

        Returns whether all ended by themselves. On cancellation everything is killed and the error re-raised.
        """
        self._stopping.set()
        hurried = asyncio.create_task(hurry.wait())
        deadline_s = time.monotonic() + budget_s
        try:
            for stage in sorted({child.spec.stage for child in self._children}):
                members = [child for child in self._children if child.spec.stage == stage]
                for child in members:
                    _signal(child, child.spec.stop_signal)
                names = {child.spec.name for child in members}
                tasks = {task for task in self._tasks if task.get_name() in names}
                while tasks and not hurried.done() and (left_s := deadline_s - time.monotonic()) > 0:
                    done, _ = await asyncio.wait({*tasks, hurried}, timeout=left_s, return_when="FIRST_COMPLETED")
                    tasks -= done
            return not any(_is_running(child) for child in self._children)
        finally:
            hurried.cancel()
            for child in self._children:
                _signal(child, signal.SIGKILL)
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _keep(self, child: _Child) -> None:
        """Run one child again and again; ends when draining, or when the set has failed."""
        policy, pause_s = self._policy, self._policy.first_s
        while not self._stopping.is_set():
            started_s = time.monotonic()
            code = await self._run_once(child)
            if self._stopping.is_set():
                return
            if time.monotonic() - started_s >= policy.healthy_s:
                pause_s = policy.first_s
            child.num_failures += 1
            if not self._is_ready and (code == EXIT_UNUSABLE or child.num_failures >= policy.max_attempts):
                self._give_up(child, code)
                return
            with contextlib.suppress(OSError):
                self._on_line(child.spec.name, f"{_describe_exit(code)}; starting again in {pause_s:g} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause_s)
            pause_s = min(pause_s * 2, policy.longest_s)

    async def _run_once(self, child: _Child) -> int:
        """Start a child and wait for its end; give its exit status, negative for a signal."""
        child.last_lines.clear()
        # A pipe of our own: asyncio's would let a process that the child left behind hide the child's end.
        read_fd, write_fd = os.pipe()
        reading = asyncio.create_task(self._read(child, read_fd))
        try:
            process = await self._spawn(child.spec, write_fd)
        except OSError as error:
            self._take_line(child, f"cannot start: {error}")
            return EXIT_UNUSABLE
        else:
            child.process = process
            if self._stopping.is_set():  # the drain began while it was being started and has not seen it
                _signal(child, child.spec.stop_signal)
            code = await process.wait()
            _end_group(process.pid)
            return code
        finally:
            os.close(write_fd)
            await asyncio.wait({reading}, timeout=OUTPUT_GRACE_S)
            reading.cancel()

    async def _spawn(self, spec: ChildSpec, output_fd: int) -> asyncio.subprocess.Process | AdoptedProcess:
        if self._nursery is not None and spec.arguments is not None:
            process = await self._nursery.fork(spec.arguments, output_fd)
            if process is not None:
                return process
        parent_pid = os.getpid()
        return await asyncio.create_subprocess_exec(
            *spec.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output_fd,
            stderr=asyncio.subprocess.STDOUT,
            env=self._environment,
            pass_fds=spec.pass_fds,
            start_new_session=True,
            preexec_fn=lambda: begin_as_child(parent_pid),
        )

    async def _read(self, child: _Child, read_fd: int) -> None:
        """Hand on a child's output by lines until its pipe is closed; a line that never ends is cut."""
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_fd, "rb")
        )
        rest = b""
        with contextlib.closing(transport):
            while chunk := await reader.read(READ_BYTES):
                *lines, rest = (rest + chunk).split(b"\n")
                if len(rest) > MAX_LINE_BYTES:
                    lines, rest = [*lines, rest], b""
                for line in lines:
                    self._take_line(child, line[:MAX_LINE_BYTES].decode(errors="replace").rstrip())
            if rest:
                self._take_line(child, rest.decode(errors="replace").rstrip())

    def _take_line(self, child: _Child, line: str) -> None:
        line = escaped(line)
        child.last_lines.append(line)
        # Who reads our own output may be gone; the children's is read all the same, or they would wait to write.
        with contextlib.suppress(OSError):
            self._on_line(child.spec.name, line)

    def _give_up(self, child: _Child, code: int) -> None:
        tail = "\n".join(f"    {line}" for line in child.last_lines) or "    (it wrote nothing)"
        attempts = f" {child.num_failures} times" if child.num_failures > 1 else ""
        if not self._failure.done():
            message = f"{child.spec.name} {_describe_exit(code)}{attempts} before it was ready; its last lines:\n{tail}"
            self._failure.set_exception(ChildrenFailed(message))
            self._failure.exception()  # seen: a drain may come before anybody waits for it


def _pid(child: _Child) -> int | None:
    return None if child.process is None or child.process.returncode is not None else child.process.pid


def _is_running(child: _Child) -> bool:
    return _pid(child) is not None


def _signal(child: _Child, number: signal.Signals) -> None:
    """Signal a running child; SIGKILL goes to all it may have started itself."""
    if child.process is None or child.process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        if number == signal.SIGKILL:
            os.killpg(child.process.pid, number)
        else:
            child.process.send_signal(number)


def _describe_exit(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _end_group(group: int) -> None:
    """Kill what a child left behind, which must not go on without it, and reap what became ours by that."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass
