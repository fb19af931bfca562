"""Calls of functions in the shapes of chat: one object in a whole answer, deltas in a stream.

A stream tells id, type and name of a call first, then its arguments, piece by piece; nothing is ever taken back.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec
from msgspec import UNSET, UnsetType

from protocol.request import FinishReason
from router.text import Piece
from router.tool_calls import Arguments, Call, CallParser, Content, ForcedCallParser, FreeCallParser, Part
from router.tools import ToolUse


class FunctionDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a chunk adds to a function's name and arguments."""

    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a chunk adds to the `index`-th call of a message; `id`, `type` and name come once."""

    index: int
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: FunctionDelta | UnsetType = UNSET


class AnsweredFunction(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be called, and with which arguments: an object written as JSON."""

    name: str
    arguments: str


class AnsweredCall(msgspec.Struct, frozen=True, kw_only=True):
    """One call in a whole answer."""

    id: str
    function: AnsweredFunction
    type: str = "function"


@dataclass(slots=True)
class SaidCalls:
    """What a whole text comes to: content, and calls of functions; the counts as a `CallParser` has them."""

    content: str = ""
    names: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    num_whole: int = 0
    is_cut: bool = False

    @property
    def num_calls(self) -> int:
        """How many calls there are."""
        return len(self.names)

    def add(self, parts: Iterable[Part]) -> None:
        """Take what a parser found."""
        for part in parts:
            if isinstance(part, Content):
                self.content += part.text
            elif isinstance(part, Call):
                self.names.append(part.name)
                self.arguments.append("")
            else:
                self.arguments[part.index] += part.text

    def answered(self) -> list[AnsweredCall]:
        """Return the calls as a message has them."""
        pairs = zip(self.names, self.arguments, strict=True)
        return [AnsweredCall(id=new_call_id(), function=AnsweredFunction(name=n, arguments=a)) for n, a in pairs]


def parser_for(use: ToolUse) -> CallParser:
    """Return a parser for the answer to a request with functions."""
    return ForcedCallParser() if use.is_forced else FreeCallParser(use.names, use.is_parallel)


def said_in(use: ToolUse, text: str) -> SaidCalls:
    """Return content and calls of a whole answer."""
    parser, said = parser_for(use), SaidCalls()
    said.add(parser.feed(text))
    said.add(parser.flush())
    said.num_whole, said.is_cut = parser.num_whole, parser.is_cut
    return said


def is_cut_by_stop(said: CallParser | SaidCalls, piece: Piece) -> bool:
    """Whether the client's own stop string or token ended an answer within its calls."""
    return said.is_cut and piece.stop_reason is not None


def ends_in_calls(said: CallParser | SaidCalls, piece: Piece) -> bool:
    """Whether an answer ends because its calls are made: it has some, and nothing cut them."""
    return said.num_calls > 0 and piece.finish_reason is FinishReason.STOP and not is_cut_by_stop(said, piece)


def delta_of(part: Call | Arguments) -> ToolCallDelta:
    """Return what a chunk says of a call."""
    if isinstance(part, Arguments):
        return ToolCallDelta(index=part.index, function=FunctionDelta(arguments=part.text))
    function = FunctionDelta(name=part.name, arguments="")
    return ToolCallDelta(index=part.index, id=new_call_id(), type="function", function=function)


def new_call_id() -> str:
    """Return an id for a call."""
    return f"call_{secrets.token_hex(12)}"
