"""llguidance behind `engine.grammar`: no dependencies, compiles in a millisecond, masks in about ten microseconds.

What is not asked for at once is done by a thread of the library's own, one for each pace, made with the first call:

1. It holds no lock of the interpreter while it works, neither for a mask nor for a token (called directly, the library
   keeps the lock for a token, and a compute thread that wants it would wait).
2. It has its pace's priority, and runs on any core that this process was given.
3. Its clock is read by its thread id, which is found by the name that threads inherit from whoever starts them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer

from engine.grammar import Matcher, Pace, Words
from engine.grammar_threads import slow_down
from protocol.guidance import compile_matcher, open_tokenizer, require_sound
from protocol.request import Grammar
from protocol.vocabulary import TokenBytes

_TASKS: Final = Path("/proc/self/task")


class LlguidanceBackend:
    """Compiles for one vocabulary.

    Args:
        vocabulary: of the model.
        vocab_size: of its logits, which may be padded beyond the vocabulary.

    Takes a tenth of a second. Raises GrammarError for a vocabulary without EOS.
    """

    name = "llguidance"

    def __init__(self, vocabulary: TokenBytes, vocab_size: int) -> None:
        self._tokenizer = open_tokenizer(vocabulary, vocab_size)
        num_words = -(-vocab_size // 32)
        self._aside = {pace: _Aside(self._tokenizer, num_words, pace) for pace in (Pace.ASIDE, Pace.IDLE)}

    def compile(self, grammar: Grammar) -> _Compiled:
        """Compile; see `GrammarBackend`."""
        return _Compiled(compile_matcher(self._tokenizer, grammar), self._aside)


@dataclass(frozen=True, slots=True)
class _Compiled:
    pristine: LLMatcher
    aside: Mapping[Pace, _Aside]

    def matcher(self) -> Matcher:
        """Return a copy at the beginning, with a lexer of its own: what one sequence meets costs no other."""
        return _Matcher(self.pristine.deep_copy(), self.aside)


@dataclass(slots=True)
class _Matcher:
    matcher: LLMatcher
    aside: Mapping[Pace, _Aside]
    # Whose address is known already: to ask an array for it takes as long as a cheap mask does.
    words: Words | None = None
    address: int = 0

    def fill(self, words: Words, pace: Pace = Pace.HERE) -> None:
        if pace is Pace.HERE:
            if words is not self.words:
                self.words, self.address = words, words.ctypes.data
            self.matcher.unsafe_compute_mask_ptr(self.address, words.nbytes)
        else:
            self.aside[pace].fill(self.matcher, words)
        require_sound(self.matcher)

    def accept(self, token_id: int, pace: Pace = Pace.HERE) -> None:
        is_here = pace is Pace.HERE
        if not (self.matcher.consume_token(token_id) if is_here else self.aside[pace].accept(self.matcher, token_id)):
            require_sound(self.matcher)

    def may_end(self) -> bool:
        return self.matcher.is_accepting()

    def cpu_s(self, pace: Pace = Pace.HERE) -> float:
        return time.thread_time() if pace is Pace.HERE else self.aside[pace].cpu_s()


class _Aside:
    """A thread of the library's for one pace; used by one caller at a time."""

    def __init__(self, tokenizer: LLTokenizer, num_words: int, pace: Pace) -> None:
        self._pace = pace
        self._name = f"mask-{pace.name}"  # the kernel keeps 15 characters
        # The library hands over to its thread only what has company: a matcher that has failed already costs nothing.
        self._company = LLMatcher(tokenizer, "start: nothing", log_level=0)
        self._words = np.zeros((2, num_words), np.int32)
        self._executor: LLExecutor | None = None
        self._clock_id: int | None = None

    def fill(self, matcher: LLMatcher, words: Words) -> None:
        """Write a mask."""
        pairs = [(matcher, 0), (self._company, 1)]
        self._opened().unsafe_compute_mask_ptr(pairs, self._words.ctypes.data, words.nbytes, len(pairs))
        words[:] = self._words[0]

    def accept(self, matcher: LLMatcher, token_id: int) -> bool:
        """Take a token; return whether it was allowed."""
        return bool(self._opened().consume_token_par([(matcher, token_id), (self._company, token_id)])[0])

    def cpu_s(self) -> float:
        """Return the thread's clock; of wall time where it cannot be read."""
        self._opened()
        return time.monotonic() if self._clock_id is None else time.clock_gettime(self._clock_id)

    def _opened(self) -> LLExecutor:
        if self._executor is None:
            starter = threading.Thread(target=self._open, name=self._name)
            starter.start()
            starter.join()
            assert self._executor is not None
        return self._executor

    def _open(self) -> None:
        mine = threading.get_native_id()
        with suppress(OSError):
            (_TASKS / str(mine) / "comm").write_text(self._name)
        self._executor = LLExecutor(num_threads=1)
        for thread_id in _threads_named(self._name):
            if thread_id != mine:
                slow_down(thread_id, is_idle=self._pace is Pace.IDLE)
                self._clock_id = ((~thread_id) << 3) | 6  # Linux's name for the CPU clock of a thread by its id


def _threads_named(name: str) -> list[int]:
    found = []
    for task in _TASKS.iterdir() if _TASKS.is_dir() else ():
        with suppress(OSError):
            if (task / "comm").read_text().strip() == name:
                found.append(int(task.name))
    return found
