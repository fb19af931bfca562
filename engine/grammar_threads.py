"""The threads that compile grammars and bring them to where their sequences stand.

    submit(work) ─► a quick thread ─ done ──────────────────────► it takes the next
                                  └ not done after HELD_UP_S ──► idle priority, on any core; another takes its place

So a grammar that takes long holds up neither those behind it nor the compute thread on the same core. A thread that was
let go ends with its work: it may not get its priority back. Only so many are let go at once.

A thread that is in the library's code while the interpreter is torn down takes the process with it: the end of the
process waits for those at work, within END_BUDGET_S.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Final, TypeVar

NUM_QUICK: Final = 2
MAX_LET_GO: Final = 4
HELD_UP_S: Final = 0.01
END_BUDGET_S: Final = 10.0
_NICENESS: Final = 10
# As this process was given them: a worker pins itself to some of them later.
_ALL_CORES: Final = os.sched_getaffinity(0)

Result = TypeVar("Result")
_Inbox = queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]


def start_waited_for(work: Callable[[], None], name: str) -> None:
    """Start a thread that the end of the process waits for."""

    def run() -> None:
        try:
            work()
        finally:
            atexit.unregister(wait)

    def wait() -> None:
        thread.join(END_BUDGET_S)

    thread = threading.Thread(target=run, name=name, daemon=True)
    atexit.register(wait)
    thread.start()


class GrammarThreads:
    """Does pieces of work; used on one event loop."""

    def __init__(self) -> None:
        self._inbox: _Inbox = queue.SimpleQueue()
        self._quick: list[_Thread] = []
        self._let_go: list[_Thread] = []
        _at_work.add(self)

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        """Queue a piece of work; the threads begin with the first."""
        while len(self._quick) < NUM_QUICK:
            self._quick.append(_Thread(self._inbox))
        future: Future[Result] = Future()
        self._inbox.put((future, work))
        return future

    def end(self) -> None:
        """Let the threads end, and wait for those at work; nothing may be submitted after it."""
        threads, end_s = [*self._quick, *self._let_go], time.monotonic() + END_BUDGET_S
        for thread in threads:
            thread.is_last_work = True
            self._inbox.put(None)
        for thread in threads:
            thread.join(max(0.0, end_s - time.monotonic()))

    def let_go(self) -> None:
        """Replace the threads that are held up; whoever waits for work calls it now and then."""
        self._let_go = [thread for thread in self._let_go if thread.is_alive()]
        now_s = time.monotonic()
        for place, thread in enumerate(self._quick):
            since_s = thread.busy_since_s
            if since_s is not None and now_s - since_s >= HELD_UP_S and len(self._let_go) < MAX_LET_GO:
                thread.is_last_work = True
                assert thread.native_id is not None, "it works, so it has begun"
                slow_down(thread.native_id, is_idle=True)
                self._let_go.append(thread)
                self._quick[place] = _Thread(self._inbox)


class _Thread(threading.Thread):
    """One thread; `busy_since_s` is when its present work began, `is_last_work` that it takes no more."""

    def __init__(self, inbox: _Inbox) -> None:
        super().__init__(name="grammar", daemon=True)
        self._inbox = inbox
        self.busy_since_s: float | None = None
        self.is_last_work = False
        self.start()

    def run(self) -> None:
        with suppress(OSError):  # off the compute thread's core, where another is free
            os.sched_setaffinity(0, _ALL_CORES)
        while not self.is_last_work:
            given = self._inbox.get()
            if given is None:
                return
            future, work = given
            self.busy_since_s = time.monotonic()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:  # noqa: BLE001  told to whoever asked for it
                    future.set_exception(error)
            self.busy_since_s = None


def slow_down(thread_id: int, is_idle: bool) -> None:
    """Let a thread of this process run on any core that the process was given, at a low priority, for good.

    Args:
        thread_id: the system's.
        is_idle: let it have only what everybody else leaves of the cores; else about a tenth of a busy one.
    """
    with suppress(OSError):
        os.sched_setaffinity(thread_id, _ALL_CORES)
    with suppress(OSError):
        if is_idle:
            os.sched_setscheduler(thread_id, os.SCHED_IDLE, os.sched_param(0))
        else:
            os.setpriority(os.PRIO_PROCESS, thread_id, _NICENESS)


_at_work: weakref.WeakSet[GrammarThreads] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    for threads in list(_at_work):
        threads.end()
