"""What a sequence's output must obey: the interface that grammar libraries stand behind, and the state of one sequence.

    Grammar ─compile, in a thread─► CompiledGrammar ─matcher()─► Matcher, wrapped in a GrammarState of one sequence
                                                                     │  mask() before a token is sampled
                                                                     └─ accept(token) after it, on the compute thread

1. A state begins after the tokens that the client has: they are replayed when the placement comes, off the compute
   thread. So it follows its sequence across the hand-off, and from one worker to another when one dies.
2. EOS tokens are the grammar's to allow: exactly where its output may end, unless the request ignores them.
3. The sequence ends with the token after which only an end could follow; no EOS is computed for it.
4. A library that gives up (too complex a state, or a token that it did not allow) leaves a `failure`: the sequence is
   given up with it, and nobody else is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from protocol.errors import GrammarError
from protocol.request import FinishReason, Grammar, SamplingParams

Words = NDArray[np.int32]
"""int32 `[ceil(vocab_size / 32)]`: bit i % 32 of word i // 32 allows token i."""


class Matcher(Protocol):
    """Where one output stands in its grammar. Used by one thread at a time."""

    def fill(self, words: Words) -> None:
        """Write which tokens may come next, an EOS or not. Raises GrammarError where the library gives up."""
        ...

    def accept(self, token_id: int) -> None:
        """Take the next token. Raises GrammarError if the grammar does not allow it, or the library gives up."""
        ...

    def may_end(self) -> bool:
        """Whether the output so far is complete."""
        ...


class CompiledGrammar(Protocol):
    """A grammar ready for use; shared between sequences and threads."""

    def matcher(self) -> Matcher:
        """Return a matcher that stands at the beginning; takes microseconds."""
        ...


class GrammarBackend(Protocol):
    """A library, made for the vocabulary of one model.

    Attributes:
        name: as the option has it.
    """

    name: str

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Compile, in milliseconds for most; lets other threads run. Raises GrammarError with the library's reason."""
        ...


class GrammarState:
    """The grammar of one sequence, owned by the compute thread once the sequence is handed over.

    Args:
        matcher: at the beginning of the output.
        sampling: of the sequence.
        num_words: of a mask.

    Attributes:
        failure: why the sequence cannot go on; None while it can.
        is_over: whether the last token completed the output.
    """

    def __init__(self, matcher: Matcher, sampling: SamplingParams, num_words: int) -> None:
        self._matcher = matcher
        self._words = np.zeros(num_words, np.int32)
        eos = np.array(sampling.eos_token_ids, np.int64)
        self._eos_words = np.zeros(num_words, np.int32)
        np.bitwise_or.at(self._eos_words, eos // 32, np.left_shift(1, eos % 32).astype(np.uint32).view(np.int32))
        self._may_take_eos = not sampling.ignore_eos
        self.failure: str | None = None
        self.is_over = self._is_filled = False
        self._settle()

    def accept(self, token_id: int) -> None:
        """Take the next token of the output, which is no EOS."""
        self._take(token_id)
        self._settle()

    def replay(self, token_ids: Iterable[int]) -> None:
        """Take the tokens that were emitted before. Raises GrammarError if the grammar does not allow them."""
        for token_id in token_ids:
            self._take(token_id)
        self._settle()
        if self.failure is not None:
            raise GrammarError(self.failure)

    def mask(self) -> Words:
        """Return which tokens may come next; valid until the next call. A state that has failed allows every one."""
        self._fill()
        words = self._words
        if self.failure is not None:
            words.fill(-1)
        elif self.is_over or (self._may_take_eos and self._matcher.may_end()):
            words |= self._eos_words
        return words

    def _take(self, token_id: int) -> None:
        self._is_filled = False
        try:
            if self.failure is None:
                self._matcher.accept(token_id)
        except GrammarError as error:
            self.failure = f"after token {token_id}: {error}"

    def _settle(self) -> None:
        """Find out whether anything may follow; only where the output is complete is that in question."""
        if self.failure is None and self._matcher.may_end():
            self._fill()
            self.is_over = self.failure is None and not self._words.any()

    def _fill(self) -> None:
        """Let the matcher write its mask, less EOS, once per token."""
        if self._is_filled or self.failure is not None:
            return
        try:
            self._matcher.fill(self._words)
        except GrammarError as error:
            self.failure = str(error)
        self._words &= ~self._eos_words
        self._is_filled = True


def finish_reason(
    sampling: SamplingParams, grammar: GrammarState | None, token_id: int, num_output_tokens: int, room_tokens: int
) -> FinishReason | None:
    """Tell whether a sequence ends with the token just sampled, and let its grammar follow; called once per token.

    Args:
        sampling: of the sequence.
        grammar: after the tokens before this one; afterwards its `failure` tells whether it still stands.
        token_id: the token just sampled.
        num_output_tokens: how many tokens are out, this one included.
        room_tokens: how many more tokens the context can hold after this one.
    """
    reason = sampling.finish_reason(token_id, num_output_tokens, room_tokens)
    if grammar is None or reason is FinishReason.STOP:
        return reason
    grammar.accept(token_id)
    return FinishReason.STOP if grammar.is_over else reason


def allowed_tokens(words: Words, vocab_size: int) -> NDArray[np.bool_]:
    """Return a mask as bool `[vocab_size]`."""
    return np.unpackbits(words.view(np.uint8), bitorder="little", count=vocab_size).view(np.bool_)
