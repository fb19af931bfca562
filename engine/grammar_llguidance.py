"""llguidance behind `engine.grammar`: no dependencies, compiles in a millisecond, masks in about ten microseconds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from engine.grammar import Matcher, Words
from protocol.errors import GrammarError
from protocol.request import Grammar, GrammarKind
from protocol.vocabulary import TokenBytes

DEFAULT_WHITESPACE: Final = " ?"
# A tenth of the library's own: what asks for more holds up the decode step, and every sequence in it, for seconds.
LIMITS: Final = LLParserLimits(
    initial_lexer_fuel=200_000, step_lexer_fuel=20_000, max_lexer_states=5_000, verbose_errors=False
)
MAX_REASON_CHARS: Final = 300


class LlguidanceBackend:
    """Compiles for one vocabulary.

    Args:
        vocabulary: of the model.
        vocab_size: of its logits, which may be padded beyond the vocabulary.

    Takes a tenth of a second. Raises GrammarError for a vocabulary without EOS.
    """

    name = "llguidance"

    def __init__(self, vocabulary: TokenBytes, vocab_size: int) -> None:
        if not vocabulary.eos_token_ids:
            raise GrammarError("the vocabulary has no token that ends an answer")
        wrapped = TokenizerWrapper(_Source(vocabulary, vocab_size))
        eos = list(vocabulary.eos_token_ids)
        self._tokenizer = LLTokenizer(wrapped, vocab_size, eos, LLTokenizer.json_slices())

    def compile(self, grammar: Grammar) -> _Compiled:
        """Compile; see `GrammarBackend`."""
        try:
            matcher = LLMatcher(self._tokenizer, _native(grammar), log_level=0, limits=LIMITS)
        except (ValueError, RecursionError) as error:
            raise GrammarError(_short(str(error))) from error
        if matcher.is_error():
            raise GrammarError(_reason(matcher))
        return _Compiled(matcher)


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
        if self.matcher.is_error():
            raise GrammarError(_reason(self.matcher))

    def accept(self, token_id: int) -> bool:
        return self.matcher.consume_token(token_id)

    def may_end(self) -> bool:
        return self.matcher.is_accepting()


class _Source:
    """A vocabulary as the library wants it."""

    def __init__(self, vocabulary: TokenBytes, vocab_size: int) -> None:
        missing = vocab_size - len(vocabulary.tokens)
        self.tokens = [*vocabulary.tokens[:vocab_size], *[b""] * missing]
        self.special_token_ids = sorted(vocabulary.special_ids)
        self.bos_token_id = vocabulary.bos_token_id
        self.eos_token_id = vocabulary.eos_token_ids[0]
        self._encode = vocabulary.encode

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text.decode() if isinstance(text, bytes) else text)


def _native(grammar: Grammar) -> str:
    if grammar.kind == GrammarKind.JSON_SCHEMA:
        pattern = DEFAULT_WHITESPACE if grammar.whitespace_pattern is None else grammar.whitespace_pattern
        options = {"whitespace_pattern": pattern} if pattern else {"whitespace_flexible": False}
        return LLMatcher.grammar_from_json_schema(grammar.text, overrides=options)  # type: ignore[arg-type]
    if grammar.kind == GrammarKind.REGEX:
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == GrammarKind.CHOICE:
        choices = json.loads(grammar.text)
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(choice) for choice in choices))
    return LLMatcher.grammar_from_lark(grammar.text)


def _reason(matcher: LLMatcher) -> str:
    return _short(matcher.get_error())


def _short(message: str) -> str:
    """Return the library's reason without the parser's state, which it appends."""
    return " ".join(message.split("<state>")[0].split())[:MAX_REASON_CHARS] or "the library gave no reason"
