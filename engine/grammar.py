"""What a sequence's output must obey: the interface that grammar libraries stand behind, and the state of one sequence.

    Grammar ─compile, in a thread─► CompiledGrammar ─matcher()─► Matcher, wrapped in a GrammarState of one sequence

    SETTLED ──accept(token): cheap so far──────────────────► SETTLED     mask() and is_over are those after the token
       │                                                       ▲
       └──accept(token): slow so far──► on a lane ─────────────┘         its sequence sits out steps meanwhile
       (either may end in FAILED: `failure` says why, and nothing more is asked)

1. A state begins after the tokens that the client has: they are replayed when the placement comes, off the compute
   thread. So it follows its sequence across the hand-off, and from one worker to another when one dies.
2. EOS tokens are the grammar's to allow: exactly where its output may end, unless the request ignores them.
3. The sequence ends with the token after which only an end could follow; no EOS is computed for it.
4. Each token's work is timed, in CPU time. Where it is dear on the average it is done by a thread of lower priority
   (`Pace`, `GrammarLanes`); beyond `GrammarBudgets` the grammar fails.
5. A library that gives up (too complex a state, a token that it did not allow, or no token left to allow) and a budget
   that is overrun leave a `failure`: the request ends with it, and nobody else's does.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from protocol.errors import GrammarError
from protocol.request import FinishReason, Grammar, SamplingParams

_MEAN_TOKENS: Final = 8
_ERRORS: Final = (GrammarError, ValueError, RuntimeError)  # ours, and those of the libraries

Words = NDArray[np.int32]
"""int32 `[ceil(vocab_size / 32)]`: bit i % 32 of word i // 32 allows token i."""


@dataclass(frozen=True, slots=True)
class GrammarBudgets:
    """What the grammar of one sequence may cost, in seconds of CPU time per token.

    Attributes:
        slow_s: moving mean from which its work is done aside from the compute thread.
        heavy_s: moving mean from which it gets only what everything else leaves of the machine.
        mean_s: moving mean from which it fails.
        worst_s: of a single token, from which it fails.
    """

    slow_s: float = 0.5e-3
    heavy_s: float = 3e-3
    mean_s: float = 25e-3
    worst_s: float = 200e-3


class Pace(IntEnum):
    """Who works for a grammar: its caller, a thread of low priority, or one that runs only when nobody else would."""

    HERE = 0
    ASIDE = 1
    IDLE = 2


class Matcher(Protocol):
    """Where one output stands in its grammar. Used by one thread at a time.

    Where the library has threads of its own a call is done at the pace that it asks for, while other threads run.
    """

    def fill(self, words: Words, pace: Pace = Pace.HERE) -> None:
        """Write which tokens may come next, an EOS or not. Raises GrammarError where the library gives up."""
        ...

    def accept(self, token_id: int, pace: Pace = Pace.HERE) -> None:
        """Take the next token. Raises GrammarError if the grammar does not allow it, or the library gives up."""
        ...

    def may_end(self) -> bool:
        """Whether the output so far is complete."""
        ...

    def cpu_s(self, pace: Pace = Pace.HERE) -> float:
        """Return a clock of the CPU time that calls at this pace take."""
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


@dataclass(frozen=True, slots=True)
class GrammarSettled:
    """Event for a stepper: a slow grammar has gone on, so that its sequence may."""


class GrammarLanes:
    """Where slow grammars go on, a lane for each pace but `HERE`: one token, or a few, of one sequence at a time.

    So the heavy ones wait for each other and for nobody else.
    """

    def __init__(self) -> None:
        self._inboxes: dict[Pace, queue.SimpleQueue[Callable[[], None]]] = {}

    def submit(self, pace: Pace, work: Callable[[], None]) -> None:
        """Queue work that does not raise; thread-safe. A lane's thread begins with the first."""
        inbox = self._inboxes.get(pace)
        if inbox is None:
            inbox = self._inboxes.setdefault(pace, queue.SimpleQueue())
            threading.Thread(target=_run_lane, args=(inbox,), name=f"grammar-{pace.name}", daemon=True).start()
        inbox.put(work)


def _run_lane(inbox: queue.SimpleQueue[Callable[[], None]]) -> None:
    while True:
        inbox.get()()


class GrammarState:
    """The grammar of one sequence, owned by the compute thread once the sequence is handed over.

    Args:
        matcher: at the beginning of the output.
        sampling: of the sequence.
        num_words: of a mask.
        budgets: what it may cost.
        lanes: where it goes on while it is slow; None does everything at once, on the caller's thread.

    Attributes:
        failure: why the sequence cannot go on; None while it can.
        is_over: whether the last token completed the output.
        spent_s: CPU time that its tokens have taken.
        is_settled: whether the last token is worked off. While it is not, nothing else here holds or may be called.
        on_settled: called by a lane whenever the state has settled there.
    """

    def __init__(
        self,
        matcher: Matcher,
        sampling: SamplingParams,
        num_words: int,
        budgets: GrammarBudgets | None = None,
        lanes: GrammarLanes | None = None,
    ) -> None:
        self._matcher = matcher
        self._budgets = budgets or GrammarBudgets()
        self._lanes = lanes
        self._words = np.zeros(num_words, np.int32)
        eos = np.array(sampling.eos_token_ids, np.int64)
        self._eos_words = np.zeros(num_words, np.int32)
        np.bitwise_or.at(self._eos_words, eos // 32, np.left_shift(1, eos % 32).astype(np.uint32).view(np.int32))
        self._text_words = ~self._eos_words
        self._may_take_eos = not sampling.ignore_eos
        self._mean_s = 0.0
        self.spent_s = 0.0
        self._is_filled = False
        self.failure: str | None = None
        self.is_over = False
        self.is_settled = True
        self.on_settled: Callable[[], None] | None = None

    @property
    def pace(self) -> Pace:
        """Who works off the next token, by what the last ones have cost."""
        if self._lanes is None or self._mean_s <= self._budgets.slow_s:
            return Pace.HERE
        return Pace.ASIDE if self._mean_s <= self._budgets.heavy_s else Pace.IDLE

    @property
    def is_prepared(self) -> bool:
        """Whether it is known what may come next, or that nothing can."""
        return self._is_filled or self.failure is not None

    def prepare(self) -> None:
        """Find out what may come first, before the compute thread asks; what this costs says nothing of tokens."""
        if not self.is_prepared:
            try:
                self._settle(False, self.pace)
            except _ERRORS as error:
                self.failure = str(error)

    def accept(self, token_id: int, is_last: bool = False) -> None:
        """Take the next token of the output, which is no EOS: at once, or on a lane if it is slow.

        Args:
            token_id: the token.
            is_last: whether the sequence ends with it in any case, so that nothing is asked but whether it is complete.
        """
        if self.failure is not None:
            return
        pace = self.pace
        if self._lanes is None or pace is Pace.HERE:
            self._advance(token_id, is_last, pace)
            return
        self.is_settled = False
        self._lanes.submit(pace, partial(self._advance_on_lane, token_id, is_last, pace))

    def replay(self, token_ids: Sequence[int], start: int = 0, budget_s: float = math.inf) -> int:
        """Take tokens that were emitted before, from `start` on; return where it stopped.

        It stops when they are taken, or when some CPU time is spent, so that a long replay is one of many slices.
        Raises GrammarError if the grammar does not allow them, or fails.
        """
        pace, place = self.pace, start
        end_s = self._matcher.cpu_s(pace) + budget_s
        while place < len(token_ids) and pace is self.pace:
            self._advance(token_ids[place], False, pace, settles=False)
            if self.failure is not None:
                raise GrammarError(self.failure)
            place += 1
            if self._matcher.cpu_s(pace) >= end_s:
                break
        return place

    def mask(self) -> Words:
        """Return which tokens may come next; valid until the next token. A state that has failed allows every one."""
        assert self.is_settled
        self.prepare()
        if self.failure is not None:
            self._words.fill(-1)
        return self._words

    def require_allowed(self, token_id: int) -> None:
        """Fail if a token was sampled that the mask bars: of a mask without a likely token a sampler makes anything."""
        if self._is_filled and self.failure is None and not (int(self._words[token_id >> 5]) >> (token_id & 31)) & 1:
            self.failure = f"no token that it allows has any likelihood; token {token_id} was sampled"

    def _advance_on_lane(self, token_id: int, is_last: bool, pace: Pace) -> None:
        try:
            self._advance(token_id, is_last, pace)
        except BaseException as error:  # noqa: BLE001  a library that panics must not end the lane of others
            self.failure = f"its library broke down: {error!r}"
        self.is_settled = True
        if self.on_settled is not None:
            self.on_settled()

    def _advance(self, token_id: int, is_last: bool, pace: Pace, settles: bool = True) -> None:
        """Do what a token asks for, and count what it costs; whoever is done anyway is let go."""
        matcher = self._matcher
        begin_s = matcher.cpu_s(pace)
        self._is_filled = False
        try:
            matcher.accept(token_id, pace)
            if settles:
                self._settle(is_last, pace)
        except _ERRORS as error:
            self.failure = f"after token {token_id}: {error}"
        cost_s = matcher.cpu_s(pace) - begin_s
        self.spent_s += cost_s
        self._mean_s += (cost_s - self._mean_s) / _MEAN_TOKENS
        if self.failure is None and not is_last and not self.is_over:
            self._check_budgets(cost_s)

    def _settle(self, is_last: bool, pace: Pace) -> None:
        """Find out what may follow; after the last token that is in question only where the output is complete."""
        may_end = self._matcher.may_end()
        if is_last and not may_end:
            return
        words = self._words
        self._matcher.fill(words, pace)
        words &= self._text_words
        self._is_filled = True
        may_go_on = np.count_nonzero(words) > 0  # a third of the time that any() takes
        self.is_over = may_end and not may_go_on
        if not may_end and not may_go_on:
            raise GrammarError("no token goes on with it")
        if self.is_over or (may_end and self._may_take_eos):
            words |= self._eos_words

    def _check_budgets(self, cost_s: float) -> None:
        if cost_s <= self._budgets.worst_s and self._mean_s <= self._budgets.mean_s:
            return
        cost, budget = (cost_s, self._budgets.worst_s)
        if cost <= budget:
            cost, budget = self._mean_s, self._budgets.mean_s
        self.failure = f"it is too costly: {cost * 1e3:.0f} ms for a token, at most {budget * 1e3:.0f} are taken"


def follow(
    sampling: SamplingParams, grammar: GrammarState | None, token_id: int, num_output_tokens: int, room_tokens: int
) -> FinishReason | None:
    """Let a sequence's grammar follow the token just sampled; called once per token.

    Returns why the sequence ends but for its grammar; once that `is_settled`, `ended` tells the rest.

    Args:
        sampling: of the sequence.
        grammar: after the tokens before this one; afterwards its `failure` tells whether it still stands.
        token_id: the token just sampled.
        num_output_tokens: how many tokens are out, this one included.
        room_tokens: how many more tokens the context can hold after this one.
    """
    reason = sampling.finish_reason(token_id, num_output_tokens, room_tokens)
    if grammar is not None:
        grammar.require_allowed(token_id)
        if reason is not FinishReason.STOP:
            grammar.accept(token_id, is_last=reason is not None)
    return reason


def ended(grammar: GrammarState | None, reason: FinishReason | None) -> FinishReason | None:
    """Return why a sequence ends, if it does: what `follow` said, or that its settled grammar is complete."""
    return FinishReason.STOP if grammar is not None and grammar.is_over else reason


def allowed_tokens(words: Words, vocab_size: int) -> NDArray[np.bool_]:
    """Return a mask as bool `[vocab_size]`."""
    return np.unpackbits(words.view(np.uint8), bitorder="little", count=vocab_size).view(np.bool_)
