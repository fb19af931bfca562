"""Every grammar that a client sends is tried in a child process before anything else knows of it.

    check ─ known? ──────────────────────────────────────► the verdict, at once
          └ new ─► a child ─ verdict ────────────────────► kept, good or bad
             ▲             ├ ended by its own limits ────► bad, and kept; the next child is started at once
             └─── once ────┤
                           └ lost: killed, stopped, late ► 503, nothing kept; tried again after a rest that doubles

1. Nothing of it runs on the event loop or in this process: a grammar may crash its child, hang it or eat its memory.
2. There are at most `NUM_CHILDREN`; who waits too long for one is told to come back (429).
3. Verdicts are kept by a digest of the grammar, so that a hostile one costs its budget once. Only the child's own end
   is one: what it wrote, or how its own limits ended it. Who else ended it (an operator, a machine short of memory) has
   said nothing of the grammar: the client is told that it was our fault, and one that keeps losing its children is
   tried less and less often.
4. Where no child can be started nothing is said of any grammar either, and the next start waits a little.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import signal
import sys
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from protocol.errors import GrammarError, NotReady, Overloaded, RequestFailed
from protocol.request import Grammar
from router.grammar_child import Question, Verdict

log = logging.getLogger(__name__)

NUM_CHILDREN: Final = 2
MAX_KEPT: Final = 4096
START_BUDGET_S: Final = 60.0
# Of wall time. The child's own budget is of CPU time, so that a busy machine condemns no good grammar.
CHECK_BUDGET_S: Final = 10.0
WAIT_BUDGET_S: Final = 15.0
RETRY_S: Final = 2.0
MAX_RETRY_S: Final = 64.0
# Of a child whose pipe has closed: how long it may take to be gone.
END_BUDGET_S: Final = 1.0
# What a child's own limits and faults end it with; any other signal came from outside.
OWN_ENDS: Final = frozenset(
    {signal.SIGPROF, signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP}
)
_LENGTH_BYTES: Final = 4
_MAX_VERDICT_BYTES: Final = 1 << 20
# Where the first part of this module's name lies: in a wheel there are more parts than in a checkout.
_ROOT: Final = str(Path(__file__).resolve().parents[__name__.count(".")])
_NOT_AVAILABLE: Final = "structured output is not available"
_TOO_MUCH: Final = "it takes too much time or memory to compile"


class GrammarChecks:
    """Tries grammars for one model; used on one event loop.

    Args:
        model_path: where the vocabulary is read.
    """

    def __init__(self, model_path: str) -> None:
        self._model_path = model_path
        self._free: list[_Child] = []
        self._gate = asyncio.Semaphore(NUM_CHILDREN)
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()
        self._losses: OrderedDict[bytes, _Losses] = OrderedDict()
        self._running: dict[bytes, asyncio.Task[Verdict]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self._no_start, self._next_start_s = "", 0.0

    async def check(self, grammar: Grammar) -> Grammar:
        """Return the grammar as workers take it; cancel-safe: a trial that has begun goes on for the next one.

        Raises:
            GrammarError: it is broken, or too costly; with the reason.
            Overloaded: too many new grammars are being tried.
            NotReady: its child was ended from outside, or none can be started; nothing is known of the grammar.
            RequestFailed: a fault of ours; the log has it.
        """
        digest = hashlib.sha256(msgspec.json.encode(grammar)).digest()
        verdict = self._verdicts.get(digest)
        if verdict is None:
            task = self._running.get(digest)
            if task is None:
                task = self._running[digest] = asyncio.create_task(self._try(digest, grammar))
                task.add_done_callback(lambda done: self._forget(digest, done))
            verdict = await asyncio.shield(task)
        else:
            self._verdicts.move_to_end(digest)
        if verdict.is_ours:
            raise RequestFailed("the schema cannot be compiled here: internal error")
        if verdict.error:
            raise GrammarError(verdict.error)
        return grammar if verdict.text == grammar.text else msgspec.structs.replace(grammar, text=verdict.text)

    def warm(self) -> None:
        """Start the first child, so that no request waits for it."""
        task = asyncio.create_task(self._add_child())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """End every child; what is being tried is dropped."""
        self._is_closed = True
        tasks = [*self._running.values(), *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while self._free:
            await self._free.pop().kill()

    def _forget(self, digest: bytes, done: asyncio.Task[Verdict]) -> None:
        self._running.pop(digest, None)
        if not done.cancelled():
            done.exception()  # every waiter may have left

    async def _try(self, digest: bytes, grammar: Grammar) -> Verdict:
        try:
            async with asyncio.timeout(WAIT_BUDGET_S):
                await self._gate.acquire()
        except TimeoutError:
            raise Overloaded("too many new schemas are being compiled", RETRY_S) from None
        try:
            verdict = await self._tried(digest, grammar)
        finally:
            self._gate.release()
        self._verdicts[digest] = verdict
        while len(self._verdicts) > MAX_KEPT:
            self._verdicts.popitem(last=False)
        return verdict

    async def _tried(self, digest: bytes, grammar: Grammar) -> Verdict:
        """Return a verdict of one child, or of a second and fresh one. Raises NotReady if both are lost."""
        losses = self._losses.get(digest, _NO_LOSSES)
        if (rest_s := losses.until_s - time.monotonic()) > 0:
            raise NotReady(f"the trial of this schema was ended from outside; come back in {rest_s:.0f} s", rest_s)
        for child in (await self._child(), None):
            try:
                verdict = await self._ask(child or await self._started(), grammar)
            except _Lost as error:
                log.warning("a process that compiles grammars was lost: %s", error)
                if error.is_final:
                    break
            else:
                self._losses.pop(digest, None)
                return verdict
        rest_s = min(MAX_RETRY_S, RETRY_S * 2**losses.number)
        self._losses[digest] = _Losses(losses.number + 1, time.monotonic() + rest_s)
        while len(self._losses) > MAX_KEPT:
            self._losses.popitem(last=False)
        self.warm()
        raise NotReady("the process that compiles schemas was ended from outside", rest_s)

    async def _ask(self, child: _Child, grammar: Grammar) -> Verdict:
        try:
            verdict = await child.ask(Question(grammar), CHECK_BUDGET_S)
        except _Gone as error:
            code = await child.end()
            if -code not in OWN_ENDS and code <= 0:
                raise _Lost(f"{error or 'gone'}, exit status {code}") from None
            log.warning("a grammar ended the process that compiled it: exit status %d", code)
            self.warm()
            return Verdict(error=_TOO_MUCH)
        except TimeoutError:
            # It has had no CPU: its own share would have ended it long ago.
            await child.kill()
            raise _Lost("no verdict in time", is_final=True) from None
        except BaseException:
            await child.kill()
            raise
        self._free.append(child)
        if verdict.is_ours:
            log.error("a grammar cannot be tried:\n%s", verdict.error)
        return verdict

    async def _child(self) -> _Child:
        while self._free:
            child = self._free.pop()
            if child.is_alive:
                return child
            await child.kill()
        return await self._started()

    async def _started(self) -> _Child:
        """Return a new child. Raises NotReady where none starts, and for a while after that."""
        if self._no_start and time.monotonic() < self._next_start_s:
            raise NotReady(self._no_start, RETRY_S)
        try:
            child = await _Child.start(self._model_path)
        except (NotReady, OSError) as error:
            self._no_start, self._next_start_s = str(error), time.monotonic() + RETRY_S
            if isinstance(error, OSError):
                self._no_start = f"{_NOT_AVAILABLE}: no process to compile schemas can be started"
            log.warning("%s", error)
            raise NotReady(self._no_start, RETRY_S) from error
        self._no_start = ""
        return child

    async def _add_child(self) -> None:
        async with self._gate:
            if not self._free:
                try:
                    self._free.append(await self._started())
                except NotReady:
                    return  # it is in the log


@dataclass(frozen=True, slots=True)
class _Losses:
    """How often all children that tried a grammar were lost, and until when it rests."""

    number: int = 0
    until_s: float = 0.0


_NO_LOSSES: Final = _Losses()


class _Gone(Exception):
    """The child has ended."""


class _Lost(Exception):
    """A child was ended from outside, or had no time to work. `is_final`: another one would fare no better."""

    def __init__(self, reason: str, is_final: bool = False) -> None:
        super().__init__(reason)
        self.is_final = is_final


class _Child:
    """One process of `router.grammar_child`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, model_path: str) -> _Child:
        """Start a child and wait until it is ready. Raises NotReady if it will never be."""
        run = f"from {__package__}.grammar_child import main; main(sys.argv[1])"
        code = f"import sys; sys.path.insert(0, {_ROOT!r}); {run}"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", code, model_path),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        child = cls(process)
        try:
            async with asyncio.timeout(START_BUDGET_S):
                verdict = await child._read()
        except (_Gone, TimeoutError):
            await child.kill()
            raise NotReady(f"{_NOT_AVAILABLE}: the process that compiles schemas does not start") from None
        except BaseException:
            await child.kill()
            raise
        if verdict.error:
            await child.kill()
            raise NotReady(f"{_NOT_AVAILABLE}: {verdict.error}")
        return child

    async def ask(self, question: Question, budget_s: float) -> Verdict:
        """Return the child's verdict. Raises _Gone or TimeoutError, after which it must be killed."""
        data, writer = msgspec.json.encode(question), self._process.stdin
        assert writer is not None
        async with asyncio.timeout(budget_s):
            writer.write(len(data).to_bytes(_LENGTH_BYTES, "little") + data)
            return await self._read()

    @property
    def is_alive(self) -> bool:
        """Whether it can still be asked, as far as is known."""
        return self._process.returncode is None

    async def end(self) -> int:
        """Return what a child that is gone ended with: a signal is negative, as in `subprocess`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(END_BUDGET_S):
                return await self._process.wait()
        await self.kill()
        return await self._process.wait()

    async def kill(self) -> None:
        """End it at once; idempotent."""
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    async def _read(self) -> Verdict:
        reader = self._process.stdout
        assert reader is not None
        try:
            length = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "little")
            if length > _MAX_VERDICT_BYTES:
                raise _Gone("its answer is too long")
            return msgspec.json.decode(await reader.readexactly(length), type=Verdict)
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.MsgspecError) as error:
            raise _Gone(str(error)) from error
