"""The router's side of `router/template_child.py`: one child, started when it is needed, and anew when it has ended.

    render ─ child there? ─ no ─► started, given the recipe
        └──────── asked ─► text, or what the template refuses
                    └── dead, or silent for ANSWER_BUDGET_S ─► killed; RequestFailed

`render` blocks: it belongs into a thread. The child ends with whoever holds this object, and with the process.
"""

from __future__ import annotations

import logging
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any, Final

import msgspec

from protocol.errors import InvalidRequest, Overloaded, RequestFailed
from router.template_child import LENGTH_BYTES, MAX_TEXT_CHARS, RENDER_CPU_S, Recipe, Rendered, framed

log = logging.getLogger(__name__)

# Of wall time. The child's own budget is of CPU time, so that a busy machine fails no good template.
ANSWER_BUDGET_S: Final = 15.0
WAIT_BUDGET_S: Final = 15.0
RETRY_S: Final = 2.0
# Where the first part of this module's name lies: in a wheel there are more parts than in a checkout.
_ROOT: Final = str(Path(__file__).resolve().parents[__name__.count(".")])
_CODE: Final = f"import sys; sys.path.insert(0, {_ROOT!r}); from {__package__}.template_child import main; main()"
_READ_BYTES: Final = 1 << 20


class TemplateProcess:
    """Renders one template elsewhere. Safe to share between threads, which wait for each other."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._child: _Child | None = None
        self._turn = threading.Lock()

    def warm(self) -> None:
        """Start the child, so that no request waits for it."""
        with self._turn:
            if self._child is None:
                self._child = _Child(self._source)

    def render(self, context: dict[str, Any]) -> str:
        """Return the text of a context.

        Raises:
            InvalidRequest: the template refuses it.
            RequestFailed: the template takes more than its budget.
            Overloaded: too many wait for the child.
        """
        if not self._turn.acquire(timeout=WAIT_BUDGET_S):
            raise Overloaded("too many conversations wait to be written as prompts", RETRY_S)
        try:
            child, self._child = self._child or _Child(self._source), None
            try:
                answer = child.ask(context)
            except (_Gone, OSError) as error:
                child.kill()
                log.warning("the chat template ended the process that rendered it: %s", error)
                raise RequestFailed(_excess(f"{RENDER_CPU_S:g} s of computing")) from None
            except BaseException:
                child.kill()
                raise
            self._child = child
        finally:
            self._turn.release()
        if answer.excess is not None:
            raise RequestFailed(_excess(answer.excess))
        if answer.refusal is not None:
            raise InvalidRequest(f"the model's chat template refuses these messages: {answer.refusal}", "messages")
        return answer.text


def _excess(what: str) -> str:
    return f"the chat template of the model took more than its budget of {what} for these messages"


class _Gone(Exception):
    """The child has ended, or does not answer."""


class _Child:
    """One process of `router.template_child`."""

    def __init__(self, source: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._input, False)
        self.kill = weakref.finalize(self, _end, self._process)
        self._is_ready = False
        self._recipe = framed(Recipe(source))

    def ask(self, context: dict[str, Any]) -> Rendered:
        """Return the child's answer. Raises _Gone or OSError, after which it must be killed."""
        if not self._is_ready:
            compiled = self._exchange(self._recipe)
            if compiled != Rendered():
                return compiled
            self._is_ready = True
        return self._exchange(framed(context))

    def _exchange(self, data: bytes) -> Rendered:
        deadline_s, rest = time.monotonic() + ANSWER_BUDGET_S, memoryview(data)
        while rest:
            _await(self._input, select.POLLOUT, deadline_s)
            rest = rest[os.write(self._input, rest[:_READ_BYTES]) :]
        length = int.from_bytes(self._read(LENGTH_BYTES, deadline_s), "little")
        if length > 6 * MAX_TEXT_CHARS:
            raise _Gone("its answer is too long")
        return msgspec.json.decode(self._read(length, deadline_s), type=Rendered)

    def _read(self, num_bytes: int, deadline_s: float) -> bytes:
        found = bytearray()
        while len(found) < num_bytes:
            _await(self._output, select.POLLIN, deadline_s)
            data = os.read(self._output, min(num_bytes - len(found), _READ_BYTES))
            if not data:
                raise _Gone("it has ended")
            found += data
        return bytes(found)


def _await(descriptor: int, event: int, deadline_s: float) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
        raise _Gone("out of time")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    process.wait()
