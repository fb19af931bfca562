"""Show how a start is going: a live table on a terminal, plain lines everywhere else.

Both take the children's lines; on a terminal only each child's latest one shows until the start is over, and from then
on all of them pass through, with the child's name in front.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live
    from rich.spinner import Spinner

PLAIN_REPORT_EVERY_S = 5.0
REFRESHES_PER_S = 8.0


class Startup(Protocol):
    """A context in which children start; `on_line` also works after it has been left."""

    def on_line(self, name: str, line: str) -> None:
        """Take a line that a child wrote."""

    def __enter__(self) -> Startup:
        """Begin to show."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop showing; later lines pass through."""


def new_startup(names: Sequence[str], stream: TextIO = sys.stderr) -> Startup:
    """Give the display that fits the stream."""
    return LiveStartup(names, stream) if stream.isatty() else PlainStartup(names, stream)


class PlainStartup:
    """Lines with the child's name in front, and every few seconds one that says how long it has been."""

    def __init__(self, names: Sequence[str], stream: TextIO) -> None:
        self._names = names
        self._stream = stream
        self._started_s = time.monotonic()
        self._ticker: asyncio.Task[None] | None = None

    def on_line(self, name: str, line: str) -> None:
        """Print the line."""
        print(f"[{name}] {line}", file=self._stream, flush=True)

    def __enter__(self) -> PlainStartup:
        """Say what is being started; needs a running event loop."""
        self._started_s = time.monotonic()
        print(f"starting {', '.join(self._names)}", file=self._stream, flush=True)
        self._ticker = asyncio.create_task(self._tick())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the regular lines."""
        if self._ticker is not None:
            self._ticker.cancel()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(PLAIN_REPORT_EVERY_S)
            elapsed_s = time.monotonic() - self._started_s
            print(f"still starting after {elapsed_s:.0f} s", file=self._stream, flush=True)


class LiveStartup:
    """A spinner per child with the seconds since the start and the child's latest line."""

    def __init__(self, names: Sequence[str], stream: TextIO) -> None:
        self._stream = stream
        self._latest = dict.fromkeys(names, "starting")
        self._started_s = time.monotonic()
        self._spinners: dict[str, Spinner] = {}
        self._live: Live | None = None
        self._is_over = False

    def on_line(self, name: str, line: str) -> None:
        """Show the line as the child's latest, or print it once the start is over."""
        if not self._is_over:
            self._latest[name] = line
        elif self._live is not None:
            self._live.console.print(f"[{name}] {line}", markup=False)

    def __enter__(self) -> LiveStartup:
        """Draw the table. What draws is imported here, while the children start."""
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner
        from rich.text import Text

        self._spinners = {name: Spinner("dots", Text(name)) for name in self._latest}
        self._live = Live(
            get_renderable=self._table,
            console=Console(file=self._stream, highlight=False, soft_wrap=True),
            refresh_per_second=REFRESHES_PER_S,
            transient=True,
        )
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wipe the table."""
        if self._live is not None:
            self._live.stop()
        self._is_over = True

    def _table(self) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        elapsed_s = time.monotonic() - self._started_s
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, justify="right")
        table.add_column()  # may wrap, thus it is the one that gives way on a narrow terminal; its text is cut instead
        for name, line in self._latest.items():
            table.add_row(self._spinners[name], f"{elapsed_s:.0f} s", Text(line, no_wrap=True, overflow="ellipsis"))
        return table
