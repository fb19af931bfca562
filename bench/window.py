"""The measured window of a run: its clock, the requests in it, and what the measuring itself costs.

1. `Window()` before anything is sent; requests registered now are warm-up.
2. `open()` is time 0. From here a task sleeps in short steps and notes how late it wakes, and CPU time counts.
3. `close()` ends both. `records` then turns every request into a `Record` with times from the opening.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Final, Self

from bench.client import Reply
from bench.records import Record
from bench.workloads.plan import Ask

_LAG_STEP_S: Final = 0.01
_PROGRESS_EVERY_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a window is.

    Attributes:
        num_total: requests that it will send, or None where time decides.
        num_tokens: output chunks so far, nearly always tokens.
    """

    num_sent: int
    num_done: int
    num_failed: int
    num_total: int | None
    num_tokens: int
    elapsed_s: float


@dataclass(slots=True)
class Sent:
    """A request on its way, and its reply as it grows."""

    ask: Ask
    reply: Reply
    is_warmup: bool


class Window:
    """One measured stretch of time, an async context manager from opening to closing.

    Args:
        num_total: requests that will be sent, or None where time decides.
        on_progress: called about once a second while the window is open.
    """

    def __init__(self, num_total: int | None, on_progress: Callable[[Progress], None]) -> None:
        self._num_total = num_total
        self._on_progress = on_progress
        self._sent: list[Sent] = []
        self._running: dict[int, Sent] = {}
        self._num_counted = self._num_done = self._num_failed = self._num_tokens_done = 0
        self._lags_s: list[float] = []
        self._opened_s = 0.0
        self._is_open = False
        self._watch: asyncio.Task[None] | None = None
        self.duration_s = 0.0
        self.client_cpu_s = 0.0
        self.started_at = ""

    @property
    def now_s(self) -> float:
        """Seconds since the window opened."""
        return time.monotonic() - self._opened_s

    @property
    def client_lag_s(self) -> float:
        """How late the event loop woke, 99th percentile."""
        ordered = sorted(self._lags_s)
        return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] if ordered else 0.0

    def register(self, ask: Ask, reply: Reply, is_warmup: bool = False) -> Sent:
        """Note a request that is about to be sent."""
        sent = Sent(ask, reply, is_warmup)
        self._sent.append(sent)
        if not is_warmup:
            self._num_counted += 1
            self._running[id(sent)] = sent
        return sent

    def finish(self, sent: Sent) -> None:
        """Note that a request is over."""
        if self._running.pop(id(sent), None) is not None:
            self._num_done += 1
            self._num_failed += sent.reply.error is not None
            self._num_tokens_done += len(sent.reply.chunk_s)

    async def __aenter__(self) -> Self:
        self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def open(self) -> None:
        """Begin to measure."""
        self.started_at = datetime.now(UTC).isoformat(timespec="seconds")
        self._watch = asyncio.create_task(self._watch_loop())
        self.client_cpu_s, self._opened_s, self._is_open = time.process_time(), time.monotonic(), True

    async def close(self) -> None:
        """Stop measuring; again is harmless."""
        if not self._is_open:
            return
        self._is_open = False
        self.duration_s, self.client_cpu_s = self.now_s, time.process_time() - self.client_cpu_s
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)

    def records(self) -> tuple[Record, ...]:
        """Return every request in the order of sending."""
        return tuple(self._record(sent) for sent in self._sent)

    def _record(self, sent: Sent) -> Record:
        ask, reply, base_s = sent.ask, sent.reply, self._opened_s
        return Record(
            request_id=ask.request_id,
            kind=ask.kind,
            started_s=reply.started_s - base_s,
            finished_s=reply.finished_s - base_s,
            chunk_s=tuple(at_s - base_s for at_s in reply.chunk_s),
            chunk_tokens=tuple(reply.chunk_tokens),
            planned_prompt_tokens=ask.prompt_tokens,
            num_prompt_tokens=reply.num_prompt_tokens,
            num_output_tokens=reply.num_output_tokens,
            planned_s=ask.due_s,
            is_warmup=sent.is_warmup or reply.finished_s < base_s,
            error=reply.error,
        )

    def progress(self) -> Progress:
        """Return how far the window is."""
        running = self._running.values()
        return Progress(
            num_sent=self._num_counted,
            num_done=self._num_done,
            num_failed=self._num_failed,
            num_total=self._num_total,
            num_tokens=self._num_tokens_done + sum(len(sent.reply.chunk_s) for sent in running),
            elapsed_s=self.now_s,
        )

    async def _watch_loop(self) -> None:
        told_s = time.monotonic()
        while True:
            due_s = time.monotonic() + _LAG_STEP_S
            await asyncio.sleep(_LAG_STEP_S)
            now_s = time.monotonic()
            self._lags_s.append(max(0.0, now_s - due_s))
            if now_s - told_s >= _PROGRESS_EVERY_S:
                told_s = now_s
                self._on_progress(self.progress())
