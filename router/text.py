"""From the tokens of one choice to what its client sees.

1. A token's bytes become characters as soon as they are whole.
2. Text that may be the beginning of a stop string is held back until that is decided.
3. The first stop string to be complete ends the choice: the text is cut before it, whatever tokens it straddled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from protocol.request import FinishReason, TokenLogprobs, TokenRow
from router.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How tokens become text.

    Attributes:
        stops: stop strings, none of them empty.
        min_tokens: stop strings count only in text that begins after this many tokens.
        include_stop: keep the stop string in the text.
        stop_token_ids: the client's own, to tell which one ended the choice.
    """

    stops: tuple[str, ...] = ()
    min_tokens: int = 0
    include_stop: bool = False
    skip_special: bool = True
    stop_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class LoggedToken:
    """A token with its log probabilities, to be reported.

    Attributes:
        offset: where its text begins in that of its choice, before a stop string is cut off; parts of one character
            share its place, and what is left out takes no room.
    """

    token_id: int
    logprobs: TokenLogprobs
    offset: int = 0


@dataclass(slots=True)
class Piece:
    """What one or more tokens add to a choice. The last piece of a choice has a finish reason."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logged: list[LoggedToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def add(self, other: Piece) -> None:
        """Append what follows."""
        self.text += other.text
        self.token_ids += other.token_ids
        self.logged += other.logged
        self.finish_reason, self.stop_reason = other.finish_reason, other.stop_reason


class Whole:
    """One choice as it becomes whole: text is joined once, not for each token."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._piece = Piece()

    def add(self, piece: Piece) -> None:
        """Append what follows."""
        whole = self._piece
        self._texts.append(piece.text)
        whole.token_ids += piece.token_ids
        whole.logged += piece.logged
        whole.finish_reason, whole.stop_reason = piece.finish_reason, piece.stop_reason

    def piece(self) -> Piece:
        """Return all of it in one."""
        self._piece.text = "".join(self._texts)
        return self._piece


class StopMatcher:
    """Finds the first stop string to be complete in a text that arrives in pieces, however it is cut."""

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Return the text that is certain now; once `matched` is set, nothing more will come."""
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, start, self.matched = min(found)
            self._held = ""
            return text[: end if self._include_stop else start]
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """Return what was held back: the text has ended."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Return the length of the longest end of the text that begins a stop string."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


class ChoiceText:
    """Text of one choice, token by token."""

    def __init__(self, tokenizer: Tokenizer, options: TextOptions) -> None:
        self._decoder = tokenizer.stream_decoder(options.skip_special)
        self._matcher = StopMatcher(options.stops, options.include_stop)
        self._options = options
        self._has_stops = bool(options.stops)
        self._ending_ids = options.stop_token_ids | frozenset(tokenizer.eos_token_ids)
        self._num_chars = 0
        self.num_tokens = 0
        self.is_over = False

    def feed(self, row: TokenRow) -> Piece:
        """Take the next token. A finish reason in the piece ends the choice: from the worker, or by a stop string."""
        assert not self.is_over
        self.num_tokens += 1
        if row.finish_reason is None and row.logprobs is None and not self._has_stops:
            return Piece(self._decoder.feed(row.token_id), [row.token_id])
        piece = Piece(token_ids=[row.token_id])
        if row.logprobs is not None:
            offset = self._num_chars + self._decoder.num_broken(row.token_id)
            piece.logged.append(LoggedToken(row.token_id, row.logprobs, offset))
        # One whose grammar is complete ends with a token of its text.
        ends_by_token = row.finish_reason is FinishReason.STOP and row.token_id in self._ending_ids
        if not ends_by_token or self._options.include_stop:
            text = self._decoder.feed(row.token_id)
            self._num_chars += len(text)
            piece.text = self._matcher.feed(text) if self.num_tokens > self._options.min_tokens else text
        if self._matcher.matched is not None:
            piece.finish_reason, piece.stop_reason = FinishReason.STOP, self._matcher.matched
        elif row.finish_reason is not None:
            self._end(piece, row)
        self.is_over = piece.finish_reason is not None
        return piece

    def _end(self, piece: Piece, row: TokenRow) -> None:
        piece.text += self._matcher.feed(self._decoder.flush())
        if self._matcher.matched is not None:
            piece.finish_reason, piece.stop_reason = FinishReason.STOP, self._matcher.matched
            return
        piece.text += self._matcher.flush()
        piece.finish_reason = row.finish_reason
        if row.finish_reason is FinishReason.STOP and row.token_id in self._options.stop_token_ids:
            piece.stop_reason = row.token_id
