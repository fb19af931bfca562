"""Every grammar that a client sends is tried in a child process before anything else knows of it.

    check ─ known? ─────────────────────────────────► the verdict, at once
          └ new ─► a free child ─ verdict in time ──► kept, good or bad
                                └ dead or too late ─► killed; bad, and kept; the next child is started at once

1. Nothing of it runs on the event loop or in this process: a grammar may crash its child, hang it or eat its memory.
2. There are at most `NUM_CHILDREN`; who waits too long for one is told to come back (429).
3. Verdicts are kept by a digest of the grammar, so that a hostile one costs its budget once.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import sys
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from protocol.errors import GrammarError, Overloaded
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
_LENGTH_BYTES: Final = 4
_MAX_VERDICT_BYTES: Final = 1 << 20
# Where the first part of this module's name lies: in a wheel there are more parts than in a checkout.
_ROOT: Final = str(Path(__file__).resolve().parents[__name__.count(".")])
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
        self._running: dict[bytes, asyncio.Task[Verdict]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False

    async def check(self, grammar: Grammar) -> Grammar:
        """Return the grammar as workers take it; cancel-safe: a trial that has begun goes on for the next one.

        Raises:
            GrammarError: it is broken, or too costly; with the reason.
            Overloaded: too many new grammars are being tried.
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
            verdict = await self._ask(grammar)
        finally:
            self._gate.release()
        self._verdicts[digest] = verdict
        while len(self._verdicts) > MAX_KEPT:
            self._verdicts.popitem(last=False)
        return verdict

    async def _ask(self, grammar: Grammar) -> Verdict:
        child = self._free.pop() if self._free else await _Child.start(self._model_path)
        try:
            verdict = await child.ask(Question(grammar), CHECK_BUDGET_S)
        except (_Gone, TimeoutError) as error:
            log.warning("a grammar ended the process that compiled it: %s", error or "out of time")
            await child.kill()
            self.warm()
            return Verdict(error=_TOO_MUCH)
        except BaseException:
            await child.kill()
            raise
        self._free.append(child)
        return verdict

    async def _add_child(self) -> None:
        async with self._gate:
            if not self._free:
                try:
                    self._free.append(await _Child.start(self._model_path))
                except GrammarError as error:
                    log.warning("structured output is not available: %s", error)


class _Gone(Exception):
    """The child has ended."""


class _Child:
    """One process of `router.grammar_child`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, model_path: str) -> _Child:
        """Start a child and wait until it is ready. Raises GrammarError if it will never be."""
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
            raise GrammarError("the process that compiles grammars does not start") from None
        except BaseException:
            await child.kill()
            raise
        if verdict.error:
            await child.kill()
            raise GrammarError(verdict.error)
        return child

    async def ask(self, question: Question, budget_s: float) -> Verdict:
        """Return the child's verdict. Raises _Gone or TimeoutError, after which it must be killed."""
        data, writer = msgspec.json.encode(question), self._process.stdin
        assert writer is not None
        async with asyncio.timeout(budget_s):
            writer.write(len(data).to_bytes(_LENGTH_BYTES, "little") + data)
            return await self._read()

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
