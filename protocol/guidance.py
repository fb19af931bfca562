"""Grammars in the hands of llguidance: what a worker runs by, and what the router's expendable child checks with.

Imported by those two alone: the router's own process never loads the library.
"""

from __future__ import annotations

import json
from typing import Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from protocol.errors import GrammarError
from protocol.request import Grammar, GrammarKind
from protocol.vocabulary import TokenBytes

DEFAULT_WHITESPACE: Final = " ?"
# A tenth of the library's own: what asks for more holds up the decode step, and every sequence in it, for seconds.
LIMITS: Final = LLParserLimits(
    initial_lexer_fuel=200_000, step_lexer_fuel=20_000, max_lexer_states=5_000, verbose_errors=False
)
MAX_REASON_CHARS: Final = 300


def open_tokenizer(vocabulary: TokenBytes, vocab_size: int) -> LLTokenizer:
    """Return a vocabulary as the library wants it; takes a tenth of a second.

    Args:
        vocabulary: of the model.
        vocab_size: of its logits, which may be padded beyond the vocabulary.

    Raises:
        GrammarError: the vocabulary has no EOS.
    """
    if not vocabulary.eos_token_ids:
        raise GrammarError("the vocabulary has no token that ends an answer")
    wrapped = TokenizerWrapper(_Source(vocabulary, vocab_size))
    return LLTokenizer(wrapped, vocab_size, list(vocabulary.eos_token_ids), LLTokenizer.json_slices())


def compile_matcher(tokenizer: LLTokenizer, grammar: Grammar) -> LLMatcher:
    """Return a matcher at the beginning of a grammar. Lets other threads run. Raises GrammarError with the reason."""
    try:
        matcher = LLMatcher(tokenizer, _native(grammar), log_level=0, limits=LIMITS)
    except (ValueError, RecursionError) as error:
        raise GrammarError(_short(str(error))) from error
    require_sound(matcher)
    return matcher


def require_sound(matcher: LLMatcher) -> None:
    """Raise GrammarError if the library has given up on a matcher: it has met one of its limits."""
    if matcher.is_error():
        raise GrammarError(_short(matcher.get_error()))


class _Source:
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


def _short(message: str) -> str:
    """Return the library's reason without the parser's state, which it appends."""
    reason = " ".join(message.split("<state>")[0].replace("<non-verbose/>", "").split())
    if reason.startswith("NoExtension"):
        return "no output obeys it"
    return reason[:MAX_REASON_CHARS] or "the library gave no reason"
