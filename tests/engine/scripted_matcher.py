"""A matcher that does what a test says, for what no library can be made to do on the spot: to be slow, stuck, empty."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np

from engine.grammar import GrammarState, Matcher, Pace, Words
from protocol.errors import GrammarError
from protocol.request import Grammar, GrammarKind, SamplingParams

ANY = Grammar(kind=GrammarKind.REGEX, text="any")


@dataclass(slots=True)
class ScriptedMatcher:
    """Allows the same tokens always.

    Attributes:
        allowed: token ids.
        costs_s: CPU time of each token, in order; the last one for all that follow.
        gate: what everybody but the caller's own thread waits for before a token.
        paces: who worked off each token.
        fails_at: the token, counted from 1, that the library gives up at.
    """

    allowed: tuple[int, ...] = (4, 5, 6, 7)
    costs_s: tuple[float, ...] = (0.0,)
    gate: threading.Event | None = None
    fails_at: int = 0
    paces: list[Pace] = field(default_factory=list)
    clock_s: float = 0.0

    def fill(self, words: Words, pace: Pace = Pace.HERE) -> None:
        words.fill(0)
        for token_id in self.allowed:
            words[token_id // 32] |= np.int32(1 << token_id % 32)

    def accept(self, token_id: int, pace: Pace = Pace.HERE) -> None:
        if pace is not Pace.HERE and self.gate is not None:
            assert self.gate.wait(10.0)
        self.clock_s += self.costs_s[min(len(self.paces), len(self.costs_s) - 1)]
        self.paces.append(pace)
        if len(self.paces) == self.fails_at:
            raise GrammarError("it gave up")

    def may_end(self) -> bool:
        return False

    def cpu_s(self, pace: Pace = Pace.HERE) -> float:
        return self.clock_s


@dataclass(slots=True)
class ScriptedBackend:
    """Gives out matchers that were made before, in order."""

    matchers: list[ScriptedMatcher]
    name = "scripted"

    def compile(self, grammar: Grammar) -> ScriptedBackend:
        """Compile nothing."""
        return self

    def matcher(self) -> Matcher:
        """Return the next one."""
        return self.matchers.pop(0)


def scripted(matcher: ScriptedMatcher, eos_token_ids: tuple[int, ...] = (2,)) -> GrammarState:
    """Give the state of a fresh sequence over a vocabulary of 256."""
    return GrammarState(matcher, SamplingParams(seed=0, eos_token_ids=eos_token_ids, grammar=ANY), 8)
