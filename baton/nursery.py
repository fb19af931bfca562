"""A process that has imported what workers import, and forks one whenever the supervisor asks.

Importing torch takes most of a worker's start. A forked worker has it already, and shares its memory.

    supervisor                                 nursery (baton/fork_server.py)
    ──────────                                 ──────────────────────────────
    start ───────────────────────────────────► imports, one thread only
          ◄──────────────────────────── ready ─┘
    fork(arguments) ── with output, permit ──► forks twice: the worker is an orphan, and ours
          ◄────────────────────────────── pid ─┘
    permit ──────────────────────────────────► the worker begins; without a permit it ends

1. The supervisor is a subreaper (PR_SET_CHILD_SUBREAPER), so that it is the orphan's parent and learns how it ends.
2. A nursery that dies is started again. Workers live on; one that must start meanwhile is started by exec, and so are
   all of them where a nursery cannot come up.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
MAX_MESSAGE_BYTES = 131072
READY_BUDGET_S = 60.0
FORK_BUDGET_S = 5.0
RESTART_PAUSE_S = 1.0
# numpy's BLAS would start threads when it is imported, which no fork would have, and which are never used here.
SINGLE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}

_libc = ctypes.CDLL(None, use_errno=True)


class AdoptedProcess:
    """A process that somebody else forked and that is our child all the same; looks like asyncio's own.

    Needs a running event loop. The pidfd is closed when the process has ended and been reaped.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._fd = os.pidfd_open(pid)
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._loop.add_reader(self._fd, self._on_end)

    async def wait(self) -> int:
        """Wait for its end; return the exit status, negative for a signal. Cancel-safe."""
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _on_end(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._ended.set()


class Nursery:
    """The supervisor's side. All methods belong to one event loop.

    Args:
        environment: what the nursery and its workers start with.
        example: arguments of one of the workers, whose model is prepared for all of them; empty: none is.
    """

    def __init__(self, environment: Mapping[str, str], example: Sequence[str] = ()) -> None:
        self._example = tuple(example)
        self._environment = {**environment, **SINGLE_THREAD}
        self._socket: socket.socket | None = None
        self._is_settled = asyncio.Event()
        self._turn = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self.pid: int | None = None

    def start(self) -> None:
        """Start the process and keep it running until `close`; one that never becomes ready is not tried again."""
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._task = asyncio.create_task(self._keep())

    async def fork(self, arguments: Sequence[str], output_fd: int) -> AdoptedProcess | None:
        """Start `baton` with these arguments; None if there is no nursery now. It waits for one that is starting.

        Args:
            arguments: of the command line.
            output_fd: becomes the worker's standard output and error.
        """
        if self._task is None or self._task.done():
            return None
        with contextlib.suppress(TimeoutError):
            async with self._turn, asyncio.timeout(READY_BUDGET_S):
                await self._is_settled.wait()
                if self._socket is not None:
                    return await self._ask(self._socket, arguments, output_fd)
        return None

    async def close(self) -> None:
        """End the process; workers are not touched."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._process is not None:  # killed by now; the task may have been cancelled while it waited for that
            await self._process.wait()

    async def _ask(self, nursery: socket.socket, arguments: Sequence[str], output_fd: int) -> AdoptedProcess | None:
        loop = asyncio.get_running_loop()
        permit, grant = os.pipe()
        try:
            socket.send_fds(nursery, [json.dumps(list(arguments)).encode()], [output_fd, permit])
            async with asyncio.timeout(FORK_BUDGET_S):
                answer = await loop.sock_recv(nursery, MAX_MESSAGE_BYTES)
            if not answer:
                return None
            process = AdoptedProcess(int(answer))
            os.write(grant, b"!")
            return process
        except (OSError, TimeoutError):
            # Whatever is left of this conversation must not be taken for the next one's.
            with contextlib.suppress(OSError):
                nursery.shutdown(socket.SHUT_RDWR)
            return None
        finally:
            os.close(permit)
            os.close(grant)

    async def _keep(self) -> None:
        while True:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.setblocking(False)
            with ours:
                with theirs:
                    process = self._process = await self._start(theirs.fileno())
                self.pid = process.pid
                try:
                    is_ready = await self._hear_ready(ours)
                    self._socket = ours if is_ready else None
                    self._is_settled.set()
                    if not is_ready:
                        return
                    await process.wait()
                finally:
                    self._socket = self.pid = None
                    if process.returncode is None:
                        process.kill()
                        await process.wait()
            await asyncio.sleep(RESTART_PAUSE_S)

    async def _start(self, fd: int) -> asyncio.subprocess.Process:
        parent_pid = os.getpid()
        # -P keeps the working folder off the import path: a folder called `model` there must not stand in for ours.
        command = (sys.executable, "-P", "-m", "baton.fork_server", str(fd), str(parent_pid), *self._example)
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            env=self._environment,
            pass_fds=(fd,),
            start_new_session=True,
            preexec_fn=lambda: begin_as_child(parent_pid),
        )

    async def _hear_ready(self, nursery: socket.socket) -> bool:
        try:
            async with asyncio.timeout(READY_BUDGET_S):
                return bool(await asyncio.get_running_loop().sock_recv(nursery, MAX_MESSAGE_BYTES))
        except (OSError, TimeoutError):
            return False


def begin_as_child(parent_pid: int) -> None:
    """Die with the parent, and let no SIGHUP that comes before it can be answered end this process."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    die_with(parent_pid)


def die_with(parent_pid: int) -> None:
    """Let the kernel kill this process when its parent is gone, or already is."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def await_parent(parent_pid: int, budget_s: float = FORK_BUDGET_S) -> None:
    """Wait until this process has been handed to its new parent, and die with it."""
    deadline_s = time.monotonic() + budget_s
    while os.getppid() != parent_pid and time.monotonic() < deadline_s:
        time.sleep(0.0005)
    die_with(parent_pid)
