"""A vocabulary of single bytes, for grammars over models with random weights: ids 0 to 3 are special, 2 is EOS."""

from __future__ import annotations

from engine.grammar import GrammarState
from engine.grammar_llguidance import LlguidanceBackend
from protocol.request import Grammar, GrammarKind, SamplingParams
from protocol.vocabulary import TokenBytes

NUM_SPECIAL = 4
EOS_ID = 2
OBJECT = Grammar(
    kind=GrammarKind.JSON_SCHEMA,
    text='{"type":"object","properties":{"a":{"type":"integer"},"b":{"enum":["x","yy"]}},"required":["a","b"],'
    '"additionalProperties":false}',
)
WORDS = Grammar(kind=GrammarKind.REGEX, text="[a-z]{3}( [a-z]{1,4})*")


def bytes_vocabulary(vocab_size: int = 256) -> TokenBytes:
    """Give a vocabulary of that many tokens; the highest bytes are missing where they do not fit."""
    special = [b"<%d>" % i for i in range(NUM_SPECIAL)]
    tokens = (*special, *(bytes([b]) for b in range(min(256, vocab_size - NUM_SPECIAL))))
    return TokenBytes(tokens, frozenset(range(NUM_SPECIAL)), (EOS_ID,), 1, ids_of)


def ids_of(text: str) -> list[int]:
    """Give the tokens of a text."""
    return [NUM_SPECIAL + b for b in text.encode()]


def text_of(token_ids: list[int]) -> str:
    """Give the text of tokens, special ones left out."""
    return bytes(i - NUM_SPECIAL for i in token_ids if i >= NUM_SPECIAL).decode()


def state_of(grammar: Grammar, vocab_size: int = 256, **fields: object) -> GrammarState:
    """Give the state of a fresh sequence."""
    sampling = SamplingParams(seed=0, eos_token_ids=(EOS_ID,), grammar=grammar, **fields)  # type: ignore[arg-type]
    matcher = LlguidanceBackend(bytes_vocabulary(vocab_size), vocab_size).compile(grammar).matcher()
    return GrammarState(matcher, sampling, -(-vocab_size // 32))
