"""The expendable process in which chat templates are rendered whose cost nobody knows beforehand.

1. The first message on stdin is the `Recipe`: the template is compiled under the same budget as a rendering, since
   compiling computes what is constant.
2. Each further message is a context; the answer is a `Rendered`, both as JSON behind a length of four bytes.
3. Who takes more than RENDER_CPU_S of CPU is ended by a signal, wherever it is; MAX_MEMORY_BYTES is all it gets.
4. The end of stdin ends it: no router, no child.
"""

from __future__ import annotations

import datetime
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn

import jinja2
import msgspec
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

RENDER_CPU_S: Final = 1.0
MAX_MEMORY_BYTES: Final = 512 << 20
MAX_TEXT_CHARS: Final = 32 << 20
NICENESS: Final = 5
LENGTH_BYTES: Final = 4
REFUSALS: Final = (
    jinja2.TemplateError,
    ArithmeticError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    RecursionError,
)


class Recipe(msgspec.Struct, frozen=True):
    """The source of a template."""

    source: str


class Rendered(msgspec.Struct, frozen=True):
    """What became of a context: a text, what the template refuses, or what it took too much of."""

    text: str = ""
    refusal: str | None = None
    excess: str | None = None


def new_environment() -> ImmutableSandboxedEnvironment:
    """Return what templates are compiled and rendered in: they change nothing and reach nothing private."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


def framed(message: Any) -> bytes:
    """Return a message as it travels."""
    data = msgspec.json.encode(message)
    return len(data).to_bytes(LENGTH_BYTES, "little") + data


def main() -> None:
    """Render contexts until stdin ends."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the router's to answer
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = num_pages * resource.getpagesize() + MAX_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    reader, writer = sys.stdin.buffer, sys.stdout.buffer
    template: jinja2.Template | None = None
    while (data := _next(reader)) is not None:
        # By default SIGPROF kills, wherever the process is.
        signal.setitimer(signal.ITIMER_PROF, RENDER_CPU_S)
        if template is None:
            template, answer = _compile(data)
        else:
            answer = _render(template, data)
        signal.setitimer(signal.ITIMER_PROF, 0)
        writer.write(framed(answer))
        writer.flush()


def _next(reader: BinaryIO) -> bytes | None:
    head = reader.read(LENGTH_BYTES)
    return reader.read(int.from_bytes(head, "little")) if len(head) == LENGTH_BYTES else None


def _compile(data: bytes) -> tuple[jinja2.Template | None, Rendered]:
    try:
        return new_environment().from_string(msgspec.json.decode(data, type=Recipe).source), Rendered()
    except jinja2.TemplateError as error:
        return None, Rendered(refusal=str(error)[:1000])
    except MemoryError:
        return None, Rendered(excess="memory")


def _render(template: jinja2.Template, data: bytes) -> Rendered:
    try:
        text = template.render(msgspec.json.decode(data))
    except REFUSALS as error:
        return Rendered(refusal=str(error)[:1000])
    except MemoryError:
        return Rendered(excess="memory")
    return Rendered(text=text) if len(text) <= MAX_TEXT_CHARS else Rendered(excess="text")


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)
