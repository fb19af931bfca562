"""llguidance behind `engine.grammar`: no dependencies, compiles in a millisecond, masks in about ten microseconds."""

from __future__ import annotations

from dataclasses import dataclass

from llguidance import LLMatcher

from engine.grammar import Matcher, Words
from protocol.guidance import compile_matcher, open_tokenizer, require_sound
from protocol.request import Grammar
from protocol.vocabulary import TokenBytes


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

    def compile(self, grammar: Grammar) -> _Compiled:
        """Compile; see `GrammarBackend`."""
        return _Compiled(compile_matcher(self._tokenizer, grammar))


@dataclass(frozen=True, slots=True)
class _Compiled:
    pristine: LLMatcher

    def matcher(self) -> Matcher:
        """Return a copy at the beginning; copies share what the lexer has learnt."""
        return _Matcher(self.pristine.deep_copy())


@dataclass(frozen=True, slots=True)
class _Matcher:
    matcher: LLMatcher

    def fill(self, words: Words) -> None:
        self.matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        require_sound(self.matcher)

    def accept(self, token_id: int) -> None:
        if not self.matcher.consume_token(token_id):
            require_sound(self.matcher)

    def may_end(self) -> bool:
        return self.matcher.is_accepting()
