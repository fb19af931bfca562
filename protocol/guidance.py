"""Grammars in the hands of llguidance: what a worker runs by, and what the router's expendable child checks with.

Imported by those two alone: the router's own process never loads the library.
"""

from __future__ import annotations

import json
from typing import Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from protocol.errors import GrammarError
from protocol.request import Grammar, GrammarKind
from protocol.vocabulary import Spelling, TokenBytes

DEFAULT_WHITESPACE: Final = " ?"
# A tenth of the library's own: what asks for more holds up the decode step, and every sequence in it, for seconds.
INITIAL_LEXER_FUEL: Final = 200_000
STEP_LEXER_FUEL: Final = 20_000
MAX_LEXER_STATES: Final = 5_000
# What an ambiguous grammar costs grows with the square of the items in a row of its parser. A row of a grammar that is
# not ambiguous has no more of them than its text has alternatives, and each of these takes some characters.
BASE_ROW_ITEMS: Final = 400
BYTES_PER_ROW_ITEM: Final = 2
MAX_ROW_ITEMS: Final = 2_000  # the library's own
STEP_ITEMS_PER_ROW_ITEM: Final = 15
# A schema takes four items for each property that may be left out, and what it costs grows with their number alone,
# since every value in it ends by its own marks: some 20 ms where all of this is used.
SCHEMA_ROW_ITEMS: Final = 5_000
SCHEMA_STEP_ITEMS: Final = 150_000
MAX_REASON_CHARS: Final = 300
# The library asks anew, with every mask, how the whole text that is forced is spelled, and uses the first token alone.
MAX_SPELLED_BYTES: Final = 512


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


def compile_matcher(tokenizer: LLTokenizer, grammar: Grammar, is_trial: bool = False) -> LLMatcher:
    """Return a matcher at the beginning of a grammar. Lets other threads run. Raises GrammarError with the reason.

    Args:
        tokenizer: of the vocabulary.
        grammar: what to compile.
        is_trial: allow a grammar of the client's own the library's own ambiguity: a random answer may run into what a
            sensible one never meets, and one that does meet it is ended for itself. A schema has the same limits here
            and there.
    """
    try:
        matcher = LLMatcher(tokenizer, _native(grammar), log_level=0, limits=_limits(grammar, is_trial))
    except (ValueError, RecursionError) as error:
        raise GrammarError(_short(str(error))) from error
    require_sound(matcher)
    return matcher


def _limits(grammar: Grammar, is_trial: bool) -> LLParserLimits:
    """Return what the library may spend on a step of a grammar."""
    if grammar.kind == GrammarKind.JSON_SCHEMA:
        row_items, step_items = SCHEMA_ROW_ITEMS, SCHEMA_STEP_ITEMS
    else:
        row_items = MAX_ROW_ITEMS
        if not is_trial:
            row_items = min(row_items, BASE_ROW_ITEMS + len(grammar.text) // BYTES_PER_ROW_ITEM)
        step_items = row_items * STEP_ITEMS_PER_ROW_ITEM
    return LLParserLimits(
        initial_lexer_fuel=INITIAL_LEXER_FUEL,
        step_lexer_fuel=STEP_LEXER_FUEL,
        max_lexer_states=MAX_LEXER_STATES,
        max_items_in_row=row_items,
        step_max_items=step_items,
        verbose_errors=False,
    )


def require_sound(matcher: LLMatcher) -> None:
    """Raise GrammarError if the library has given up on a matcher: it has met one of its limits."""
    if matcher.is_error():
        raise GrammarError(_short(matcher.get_error()))


class _Source:
    """A vocabulary as the library reads it: the tokens' bytes, and how a text is spelled with ordinary ones."""

    def __init__(self, vocabulary: TokenBytes, vocab_size: int) -> None:
        missing = vocab_size - len(vocabulary.tokens)
        self.tokens = [*vocabulary.tokens[:vocab_size], *[b""] * missing]
        self.special_token_ids = sorted(i for i in vocabulary.special_ids if i < vocab_size)
        self.bos_token_id = vocabulary.bos_token_id
        self.eos_token_id = vocabulary.eos_token_ids[0]
        self._spelling = Spelling(vocabulary)

    def __call__(self, text: bytes | str) -> list[int]:
        if isinstance(text, str):
            text = text.encode()
        return self._spelling.of(text[:MAX_SPELLED_BYTES].decode(errors="ignore"))


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
    if "Too many items" in reason or ("Current row has" in reason and "items" in reason):
        return "it is too large or too ambiguous: its parser needs more items at one place than are allowed"
    return reason[:MAX_REASON_CHARS] or "the library gave no reason"
