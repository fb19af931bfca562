"""Lines of the log, in every process of ours: what a client or a peer says stays within its line.

1. Whatever cannot be printed (line breaks of any script, terminal escapes, marks that turn the direction of text, lone
   surrogates) is written as JSON would escape it, so that a line which is JSON stays JSON.
2. A traceback keeps its own line breaks. Messages of exceptions within it are escaped like any other text.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from types import TracebackType
from typing import Final

LONG: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"
SHORT: Final = "%(levelname)s %(name)s: %(message)s"
_FRAME: Final = '  File "'
_WITHIN_FRAME: Final = "    "
# An error and its cause.
_BETWEEN: Final = ("\nThe above exception was ", "\nDuring handling of ")

_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class OneLineFormatter(logging.Formatter):
    """Writes each record as one line, and its traceback as lines below it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        return escaped(super().formatMessage(record))

    def formatException(self, ei: _ExcInfo) -> str:
        """Return a traceback, with every message in it on one line."""
        kind, error, where = ei
        if kind is None or error is None:
            return ""
        told = traceback.TracebackException(kind, error, where, compact=True)
        _escape_notes(told)
        return "\n".join(line for part in told.format() for line in _lines(part))

    def formatStack(self, stack_info: str) -> str:
        """Return a stack, whose lines are our own files'."""
        return "\n".join(escaped(line) for line in stack_info.split("\n"))


def start_log(level: str | int, form: str) -> None:
    """Send this process's log to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLineFormatter(form, datefmt="%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler])


def escaped(text: str) -> str:
    """Return a text with all that cannot be printed escaped."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


def _escape_notes(told: traceback.TracebackException) -> None:
    """Write each note of an exception, and of those behind it, on one line."""
    notes = getattr(told, "__notes__", None)
    if notes is not None:
        told.__notes__ = [escaped(str(note)) for note in notes]
    for behind in (told.__cause__, told.__context__):
        if behind is not None:
            _escape_notes(behind)


def _lines(part: str) -> list[str]:
    """Return the lines of one part of a traceback: several where it is a frame, one where it is a message."""
    part = part.removesuffix("\n")
    if part.startswith(_FRAME):
        first, *rest = part.split("\n")
        if all(line.startswith(_WITHIN_FRAME) for line in rest):
            return [escaped(line) for line in (first, *rest)]
    if part.startswith(_BETWEEN):
        return ["", *(escaped(line) for line in part.strip("\n").split("\n")), ""]
    return [escaped(part)]
