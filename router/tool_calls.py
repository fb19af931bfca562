"""Finds calls of functions in what a model says. Pure: text in, content and calls out, however the text is cut.

                        ┌──────────── no call after all: all of it is content ──────────┐
                        ▼                                                               │
    free      CONTENT ──┴─ <tool_call> ► HELD ── </tool_call> ──► a whole call, at once ┘
    forced    [ ► HEAD {"name": "f", "arguments": ► ARGUMENTS, a fragment at a time ► } ► HEAD ...

1. A model that may call is free: a call is held back until it is whole, is JSON, and names a function that exists. Only
   then is it told; what turns out to be none, or never closes, is content, word for word.
2. A model that must call writes a list of calls under a grammar, so that nothing has to be held: arguments are told as
   they come. If it is cut off, the last call may be incomplete; `is_cut` tells, and the finish reason says by what.
3. Of the markup nothing is told; white space between content and calls belongs to the markup.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec

OPEN: Final = "<tool_call>"
CLOSE: Final = "</tool_call>"
_BLANK: Final = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Call:
    """A call begins: the `index`-th of its choice."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """Text to be added to the arguments of a call."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """Text that belongs to no call."""

    text: str


Part = Content | Call | Arguments


class CallParser(Protocol):
    """Takes the text of one choice in pieces.

    Attributes:
        num_calls: that have begun.
        num_whole: of these, whose arguments are there to their end.
        is_cut: whether the text, as it ended, ended within its calls.
    """

    num_calls: int
    num_whole: int
    is_cut: bool

    def feed(self, text: str) -> list[Part]:
        """Return what is certain now."""
        ...

    def flush(self) -> list[Part]:
        """Return what is left when the text has ended."""
        ...


class FreeCallParser:
    """Parser for a model that may call.

    Args:
        names: functions that exist.
        is_parallel: whether a second call is one; else the text after the first call is left out.
    """

    def __init__(self, names: Collection[str], is_parallel: bool = True) -> None:
        self._names = names
        self._is_parallel = is_parallel
        self._rest = ""
        # Of a call that is held: the white space before it and its mark, in case that it is none.
        self._mark: str | None = None
        self.num_calls = self.num_whole = 0
        self.is_cut = False

    def feed(self, text: str) -> list[Part]:
        """Return content up to where a call may begin, and each call once it is closed."""
        self._rest += text
        parts: list[Part] = []
        while self._step(parts):
            pass
        return parts

    def flush(self) -> list[Part]:
        """Return what was held back: a call that was never closed is content."""
        rest, self._rest = self._rest, ""
        has_ended = bool(self.num_calls) and not self._is_parallel
        # One character of a mark may be anything.
        self.is_cut = not has_ended and (self._mark is not None or len(rest.strip(_BLANK)) > 1)
        if self._mark is not None:
            rest, self._mark = "" if has_ended else self._mark + rest, None
        elif self.num_calls:
            rest = rest.rstrip(_BLANK)
        return [Content(rest)] if rest else []

    def _step(self, parts: list[Part]) -> bool:
        """Take one stretch of content or one call off the text; False where more text is needed."""
        if self._mark is not None:
            body, found, after = self._rest.partition(CLOSE)
            if found:
                self._take(self._mark, body, parts)
                self._rest, self._mark = after, None
            return bool(found)
        before, found, after = self._rest.partition(OPEN)
        if found:
            said = before.rstrip(_BLANK)
            self._rest, self._mark = after, before[len(said) :] + OPEN
        else:
            num_certain = len(before) - _num_held(before)
            said, self._rest = before[:num_certain], before[num_certain:]
        if said:
            parts.append(Content(said))
        return bool(found)

    def _take(self, mark: str, body: str, parts: list[Part]) -> None:
        found = _call_of(body, self._names)
        if found is None:
            parts.append(Content(mark + body + CLOSE))
        elif self.num_calls == 0 or self._is_parallel:
            name, arguments = found
            parts.append(Call(self.num_calls, name))
            parts.append(Arguments(self.num_calls, arguments))
            self.num_calls = self.num_whole = self.num_calls + 1


class ForcedCallParser:
    """Parser for a model that must call: a JSON list of objects with name and arguments, in this order."""

    def __init__(self) -> None:
        self._head = ""
        self._value: _ValueScanner | None = None
        self.num_calls = self.num_whole = 0
        self.is_cut = True  # until the list is closed

    def feed(self, text: str) -> list[Part]:
        """Return the calls that begin in this text, and what it adds to their arguments."""
        parts: list[Part] = []
        while text:
            text = self._head_of(text, parts) if self._value is None else self._arguments_of(text, parts)
        return parts

    def flush(self) -> list[Part]:
        """Return nothing: what ends before its name is known was no call."""
        self._head = ""
        return []

    def _head_of(self, text: str, parts: list[Part]) -> str:
        """Take text up to where the arguments of a call begin; return the rest."""
        for at, char in enumerate(text):
            self._head += char
            if char == "]":
                self.is_cut = False  # no name has one
            elif char in "[{":
                name = _name_of(self._head[:-1])
                if name is not None:
                    parts.append(Call(self.num_calls, name))
                    self.num_calls += 1
                    self._head, self._value = "", _ValueScanner()
                    return text[at:]
        return ""

    def _arguments_of(self, text: str, parts: list[Part]) -> str:
        assert self._value is not None
        end = self._value.feed(text)
        if end:
            parts.append(Arguments(self.num_calls - 1, text[:end]))
        if self._value.is_over:
            self._value = None
            self.num_whole += 1
        return text[end:]


class _ValueScanner:
    """Finds the end of one JSON object or list."""

    def __init__(self) -> None:
        self._depth = 0
        self._is_string = False
        self._is_escaped = False

    @property
    def is_over(self) -> bool:
        return self._depth < 0

    def feed(self, text: str) -> int:
        """Return how much of the text belongs to the value."""
        for at, char in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_string:
                self._is_escaped = char == "\\"
                self._is_string = char != '"'
            elif char == '"':
                self._is_string = True
            elif char in "[{":
                self._depth += 1
            elif char in "]}":
                self._depth -= 1
                if self._depth == 0:
                    self._depth = -1
                    return at + 1
        return len(text)


def _name_of(head: str) -> str | None:
    """Return the name in `[{"name": "f", "arguments":`, with whatever stood before the object."""
    start = head.find("{")
    if start < 0 or not head.rstrip(_BLANK).endswith(":"):
        return None
    try:
        found = json.loads(head[start:] + "null}")
    except ValueError:
        return None
    name = found.get("name") if isinstance(found, dict) else None
    return name if isinstance(name, str) and list(found) == ["name", "arguments"] else None


def _call_of(body: str, names: Collection[str]) -> tuple[str, str] | None:
    """Return name and arguments of a whole call, these as they were written; None if it is none."""
    try:
        found = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        name = msgspec.json.decode(found.get("name", b"null"))
        raw = bytes(found.get("arguments", found.get("parameters", b"{}")))
        arguments = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return None
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None
    return name, raw.decode()


def _num_held(text: str) -> int:
    """Return how much of the end of a text may belong to a call: the beginning of its mark, white space before it."""
    for length in range(min(len(text), len(OPEN) - 1), -1, -1):
        if text.endswith(OPEN[:length]):
            before = text[: len(text) - length]
            return length + len(before) - len(before.rstrip(_BLANK))
    return 0
