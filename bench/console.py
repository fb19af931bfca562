"""What the reader sees while a benchmark runs, and the file of prompts that it publishes."""

from __future__ import annotations

import time
from typing import Any, Final, TextIO

import msgspec
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType

from bench.generator import Listener
from bench.servers import Server
from bench.window import Progress
from bench.workloads.plan import Ask

_PLAIN_EVERY_S: Final = 10.0


class ConsoleListener(Listener):
    """Shows remarks, and progress as one line that renews itself on a terminal, else as a line now and then.

    Args:
        console: where all of it goes, usually standard error.
        prompts: an open file that gets one JSON object for each prompt, or None.
    """

    def __init__(self, console: Console, prompts: TextIO | None = None) -> None:
        self._console = console
        self._prompts = prompts
        self._told_s = time.monotonic()

    def line(self, text: str) -> None:
        """Print a remark."""
        self.clear()
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def progress(self, what: str, progress: Progress) -> None:
        """Show how far a window is."""
        text = describe(what, progress)
        if self._console.is_terminal:
            self.clear()
            self._console.print(text[: self._console.width - 1], markup=False, highlight=False, end="")
        elif time.monotonic() - self._told_s >= _PLAIN_EVERY_S:
            self._told_s = time.monotonic()
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def prompt(self, server: Server, ask: Ask, text: str) -> None:
        """Write a prompt to the file."""
        if self._prompts is None:
            return
        row: dict[str, Any] = {
            "server": server.label,
            "request_id": ask.request_id,
            "kind": ask.kind,
            "planned_s": ask.due_s,
            "planned_prompt_tokens": ask.prompt_tokens,
            "max_tokens": ask.output_tokens,
            "prompt": text,
        }
        self._prompts.write(msgspec.json.encode(row).decode() + "\n")

    def clear(self) -> None:
        """Take the progress line away."""
        if self._console.is_terminal:
            self._console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))


def describe(what: str, progress: Progress) -> str:
    """Return a progress line."""
    of_all = "" if progress.num_total is None else f" of {progress.num_total}"
    failed = f", {progress.num_failed} failed" if progress.num_failed else ""
    rate = progress.num_tokens / progress.elapsed_s if progress.elapsed_s > 0 else 0.0
    return (
        f"{what}: {progress.elapsed_s:.0f} s, {progress.num_done}{of_all} done, "
        f"{progress.num_sent - progress.num_done} running{failed}, {rate:.0f} tokens/s"
    )
