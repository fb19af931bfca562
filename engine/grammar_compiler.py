"""Grammars of one worker process: compiled in a thread, kept by their text.

1. With the model the thread is told to read the vocabulary; it takes a quarter of a second, beside the start.
2. A placement with a grammar awaits `state_of`. Neither the event loop nor the compute thread works for it, and
   placements without one pass by.
3. The same grammar is compiled once; the last `MAX_KEPT` are kept. One that fails fails its placement alone, and is
   forgotten, so that what was asked for too early or too late is tried again.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

from engine.grammar import CompiledGrammar, GrammarBackend, GrammarState
from protocol.errors import BatonError, GrammarError
from protocol.request import Grammar, SamplingParams
from protocol.vocabulary import TokenBytes

MAX_KEPT: Final = 64  # a hostile one may take some 10 MiB
MAX_WAITING: Final = 256
COMPILE_BUDGET_S: Final = 10.0


class GrammarCompiler:
    """Makes the grammar states of sequences. Shared by the workers of a process; used on their event loop.

    Args:
        backend: one of `engine.config.GRAMMAR_BACKENDS`.
        model_path: where the vocabulary is read.
        vocab_size: of the model's logits.
    """

    def __init__(self, backend: str, model_path: Path, vocab_size: int) -> None:
        self._name = backend
        self._model_path = model_path
        self._vocab_size = vocab_size
        self._num_words = -(-vocab_size // 32)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._backend: Future[GrammarBackend] = self._thread.submit(self._open)
        self._kept: OrderedDict[Grammar, Future[CompiledGrammar]] = OrderedDict()
        self._num_waiting = 0

    async def state_of(self, sampling: SamplingParams, emitted: Sequence[int]) -> GrammarState | None:
        """Return the state of a sequence after the tokens that were emitted before; None if it has no grammar.

        Cancel-safe: what is being compiled is kept for the next one.

        Raises:
            GrammarError: it cannot be compiled here, took too long, or does not allow what was emitted.
        """
        if sampling.grammar is None:
            return None
        if self._num_waiting >= MAX_WAITING:
            raise GrammarError("too many grammars are waiting to be compiled")
        self._num_waiting += 1
        try:
            async with asyncio.timeout(COMPILE_BUDGET_S):
                compiled = await asyncio.shield(asyncio.wrap_future(self._compiled(sampling.grammar)))
                work = self._thread.submit(self._state, compiled, sampling, tuple(emitted))
                return await asyncio.wrap_future(work)
        except TimeoutError:
            raise GrammarError(f"its grammar took more than {COMPILE_BUDGET_S:g} s to compile") from None
        finally:
            self._num_waiting -= 1

    def _compiled(self, grammar: Grammar) -> Future[CompiledGrammar]:
        found = self._kept.pop(grammar, None)
        if found is None or (found.done() and (found.cancelled() or found.exception() is not None)):
            found = self._thread.submit(self._compile, grammar)
        self._kept[grammar] = found
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return found

    # --- on the thread ---

    def _open(self) -> GrammarBackend:
        return open_backend(self._name, TokenBytes.of_model(self._model_path), self._vocab_size)

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        try:
            backend = self._backend.result()
        except (BatonError, ImportError) as error:
            raise GrammarError(f"this worker cannot compile grammars: {error}") from error
        return backend.compile(grammar)

    def _state(self, compiled: CompiledGrammar, sampling: SamplingParams, emitted: Sequence[int]) -> GrammarState:
        state = GrammarState(compiled.matcher(), sampling, self._num_words)
        if state.is_over:
            raise GrammarError("nothing but the empty output obeys it")
        state.replay(emitted)
        return state


def open_backend(name: str, vocabulary: TokenBytes, vocab_size: int) -> GrammarBackend:
    """Return a library made for a vocabulary. Raises ImportError where it is not installed."""
    if name == "xgrammar":
        from engine.grammar_xgrammar import XgrammarBackend

        return XgrammarBackend(vocabulary, vocab_size)
    from engine.grammar_llguidance import LlguidanceBackend

    return LlguidanceBackend(vocabulary, vocab_size)
