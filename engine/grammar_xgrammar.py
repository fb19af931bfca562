"""xgrammar behind `engine.grammar`: an optional extra, since it brings transformers along."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import xgrammar

from engine.grammar import Matcher, Pace, Words
from protocol.errors import GrammarError
from protocol.request import Grammar, GrammarKind
from protocol.vocabulary import TokenBytes


class XgrammarBackend:
    """Compiles for one vocabulary; see `GrammarBackend`.

    Args:
        vocabulary: of the model.
        vocab_size: of its logits, which may be padded beyond the vocabulary.
    """

    name = "xgrammar"

    def __init__(self, vocabulary: TokenBytes, vocab_size: int) -> None:
        pieces = [b"" if i in vocabulary.special_ids else piece for i, piece in enumerate(vocabulary.tokens)]
        info = xgrammar.TokenizerInfo(
            pieces, xgrammar.VocabType.RAW, vocab_size=vocab_size, stop_token_ids=list(vocabulary.eos_token_ids)
        )
        self._num_words = -(-vocab_size // 32)
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, grammar: Grammar) -> _Compiled:
        """Compile; see `GrammarBackend`."""
        try:
            return _Compiled(self._native(grammar), self._num_words)
        except (RuntimeError, ValueError) as error:
            raise GrammarError(" ".join(str(error).split())[:300]) from error

    def _native(self, grammar: Grammar) -> xgrammar.CompiledGrammar:
        if grammar.kind == GrammarKind.JSON_SCHEMA:
            if grammar.whitespace_pattern:
                raise GrammarError("xgrammar knows no whitespace_pattern")
            return self._compiler.compile_json_schema(
                grammar.text,
                any_whitespace=grammar.whitespace_pattern is None,
                separators=None if grammar.whitespace_pattern is None else (",", ":"),
                strict_mode=False,
                max_whitespace_cnt=1 if grammar.whitespace_pattern is None else None,
            )
        if grammar.kind == GrammarKind.REGEX:
            return self._compiler.compile_regex(grammar.text)
        if grammar.kind == GrammarKind.CHOICE:
            choices = " | ".join(json.dumps(choice) for choice in json.loads(grammar.text))
            return self._compiler.compile_grammar(f"root ::= {choices}")
        raise GrammarError("xgrammar knows no Lark grammars")


@dataclass(frozen=True, slots=True)
class _Compiled:
    compiled: xgrammar.CompiledGrammar
    num_words: int

    def matcher(self) -> Matcher:
        """Return a matcher that stands at the beginning."""
        return _Matcher(xgrammar.GrammarMatcher(self.compiled), self.num_words)


@dataclass(frozen=True, slots=True)
class _Matcher:
    matcher: xgrammar.GrammarMatcher
    num_words: int

    # The library has no threads of its own: every pace is its caller's.
    def fill(self, words: Words, pace: Pace = Pace.HERE) -> None:
        self.matcher.fill_next_token_bitmask(words.reshape(1, self.num_words))

    def accept(self, token_id: int, pace: Pace = Pace.HERE) -> None:
        if not self.matcher.accept_token(token_id):
            raise GrammarError("it does not obey the grammar")

    def may_end(self) -> bool:
        return bool(self.matcher.is_completed())

    def cpu_s(self, pace: Pace = Pace.HERE) -> float:
        return time.thread_time()
