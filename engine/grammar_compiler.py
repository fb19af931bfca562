"""Grammars of one worker process: compiled in threads, kept by their text.

1. With the model a thread is told to read the vocabulary; it takes a quarter of a second, beside the start.
2. A placement with a grammar awaits `state_of`. Neither the event loop nor the compute thread works for it, and
   placements without one pass by.
3. What was emitted before is replayed in slices, so that a long or slow one holds up nobody: of a slow grammar on the
   lane where it will go on while it runs.
4. The same grammar is compiled once; the last `MAX_KEPT` are kept. One that fails fails its placement alone, and is
   forgotten, so that what was asked for too early or too late is tried again.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from engine.grammar import CompiledGrammar, GrammarBackend, GrammarBudgets, GrammarLanes, GrammarState, Pace
from engine.grammar_threads import HELD_UP_S, GrammarThreads, start_waited_for
from protocol.errors import ConfigError, GrammarError, GrammarUnavailable
from protocol.request import Grammar, SamplingParams
from protocol.vocabulary import TokenBytes

MAX_KEPT: Final = 64  # a hostile one may take some 10 MiB
MAX_WAITING: Final = 256
# Of wall time, in which the machine may have had other things to do: what takes longer is tried elsewhere.
COMPILE_BUDGET_S: Final = 10.0
REPLAY_BUDGET_S: Final = 60.0
# Of CPU time: what takes longer takes it everywhere.
REPLAY_CPU_S: Final = 5.0
SLICE_S: Final = 1e-3

Result = TypeVar("Result")


class GrammarCompiler:
    """Makes the grammar states of sequences. Shared by the workers of a process; used on their event loop.

    Args:
        backend: one of `engine.config.GRAMMAR_BACKENDS`.
        model_path: where the vocabulary is read.
        vocab_size: of the model's logits.
        budgets: what the grammar of a sequence may cost.
    """

    def __init__(self, backend: str, model_path: Path, vocab_size: int, budgets: GrammarBudgets | None = None) -> None:
        self._name = backend
        self._model_path = model_path
        self._vocab_size = vocab_size
        self._num_words = -(-vocab_size // 32)
        self._budgets = budgets or GrammarBudgets()
        self._threads = GrammarThreads()
        self._lanes = GrammarLanes()
        self._backend: Future[GrammarBackend] = Future()
        start_waited_for(partial(_fulfil, self._backend, self._open), "vocabulary")
        self._kept: OrderedDict[Grammar, Future[CompiledGrammar]] = OrderedDict()
        self._num_waiting = 0

    async def state_of(self, sampling: SamplingParams, emitted: Sequence[int]) -> GrammarState | None:
        """Return the state of a sequence after the tokens that were emitted before; None if it has no grammar.

        Cancel-safe: what is being compiled is kept for the next one.

        Raises:
            GrammarError: it cannot be compiled, is too costly, or does not allow what was emitted; it never will.
            GrammarUnavailable: this worker cannot do it, or not now.
        """
        if sampling.grammar is None:
            return None
        if self._num_waiting >= MAX_WAITING:
            raise GrammarUnavailable("too many grammars are waiting to be compiled")
        self._num_waiting += 1
        try:
            async with asyncio.timeout(COMPILE_BUDGET_S):
                backend = await asyncio.shield(asyncio.wrap_future(self._backend))
                compiled = await self._done(self._compiled(backend, sampling.grammar))
            async with asyncio.timeout(REPLAY_BUDGET_S):
                return await self._state(compiled, sampling, emitted)
        except (ConfigError, ImportError) as error:
            raise GrammarUnavailable(f"this worker cannot compile grammars: {error}") from error
        except TimeoutError:
            raise GrammarUnavailable("this worker had no time to compile it and to follow what was written") from None
        finally:
            self._num_waiting -= 1

    def _compiled(self, backend: GrammarBackend, grammar: Grammar) -> Future[CompiledGrammar]:
        found = self._kept.pop(grammar, None)
        if found is None or (found.done() and (found.cancelled() or found.exception() is not None)):
            found = self._threads.submit(lambda: backend.compile(grammar))
        self._kept[grammar] = found
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return found

    async def _state(self, compiled: CompiledGrammar, sampling: SamplingParams, emitted: Sequence[int]) -> GrammarState:
        state, place = await self._done(self._threads.submit(lambda: self._begin(compiled, sampling, emitted)))
        while place < len(emitted):
            place = await self._on_thread_of(state, partial(state.replay, emitted, place, SLICE_S))
            if state.spent_s > REPLAY_CPU_S:
                raise GrammarError(f"it is too costly: what was written before took {REPLAY_CPU_S:g} s to follow again")
        if not state.is_prepared:
            await self._on_thread_of(state, state.prepare)
        if state.failure is not None:
            raise GrammarError(state.failure)
        if state.is_over and not emitted:
            raise GrammarError("nothing but the empty output obeys it")
        return state

    async def _on_thread_of(self, state: GrammarState, work: Callable[[], Result]) -> Result:
        pace = state.pace
        if pace is Pace.HERE:
            return await self._done(self._threads.submit(work))
        future: Future[Result] = Future()
        self._lanes.submit(pace, partial(_fulfil, future, work))
        return await self._done(future)

    async def _done(self, future: Future[Result]) -> Result:
        """Wait for a piece of work, and see to it that no thread holds up the others."""
        waiting = asyncio.shield(asyncio.wrap_future(future))
        while not (await asyncio.wait({waiting}, timeout=HELD_UP_S))[0]:
            self._threads.let_go()
        return waiting.result()

    # --- on a thread ---

    def _open(self) -> GrammarBackend:
        try:
            return open_backend(self._name, TokenBytes.of_model(self._model_path), self._vocab_size)
        except GrammarError as error:
            raise ConfigError(str(error)) from error  # of the vocabulary: no grammar's own fault

    def _begin(
        self, compiled: CompiledGrammar, sampling: SamplingParams, emitted: Sequence[int]
    ) -> tuple[GrammarState, int]:
        """Return a state, and how much of what was emitted it has taken; it is prepared if that was everything."""
        state = GrammarState(compiled.matcher(), sampling, self._num_words, self._budgets, self._lanes)
        place = state.replay(emitted, 0, SLICE_S)
        if place == len(emitted) and state.pace is Pace.HERE:
            state.prepare()
        return state, place


def _fulfil(future: Future[Result], work: Callable[[], Result]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001  told to whoever asked for it
        future.set_exception(error)


def open_backend(name: str, vocabulary: TokenBytes, vocab_size: int) -> GrammarBackend:
    """Return a library made for a vocabulary. Raises ImportError where it is not installed."""
    if name == "xgrammar":
        from engine.grammar_xgrammar import XgrammarBackend

        return XgrammarBackend(vocabulary, vocab_size)
    from engine.grammar_llguidance import LlguidanceBackend

    return LlguidanceBackend(vocabulary, vocab_size)
