"""Readouts of one request of the API: questions to one state, documents to one query, the prompts of an echo.

    open ─► all are counted ─► WINDOW of them are submitted ── one is read: the next is submitted ──► all are read
                                         └─ the first failure, or `close`: the submitted are cancelled, the rest dropped

1. A session's queries are counted at once, so that admission knows of all of them, and submitted a window at a time, so
that no session fills a worker's queue, and that those behind find the shared prefix where the first ones left it.
2. The answers come in any order; the session has them in the order of its queries. 3. Each query that was submitted
ends with exactly one terminal record, as any request does.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from protocol.errors import NotReady, RequestFailed
from protocol.readout import Readout
from protocol.request import SamplingParams
from protocol.timeline import Timeline
from protocol.wire import Readings
from router.access_log import RequestRecord, current
from router.admission import Admission
from router.instructions import Cancelled, Fail, Finish, IdSource, Submission, Terminal
from router.metrics import Metrics

WINDOW: Final = 32
_NO_SAMPLING: Final = SamplingParams(seed=0, max_tokens=1)


@dataclass(frozen=True, slots=True)
class ReadQuery:
    """One prompt and what to read off it.

    Attributes:
        tokens: of its own.
        shared: what comes before them. Queries with a common prefix share the one tuple: whole prompts are made only
            when they are submitted.
    """

    tokens: tuple[int, ...]
    readout: Readout
    shared: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Length of the whole prompt."""
        return len(self.shared) + len(self.tokens)

    @property
    def kind(self) -> str:
        """Name of its kind, for metrics."""
        return str(self.readout.__struct_config__.tag)


class ReadSession:
    """One open request for readouts; whoever opened it closes it."""

    def __init__(self, queries: Sequence[ReadQuery], close: Callable[[ReadSession], None]) -> None:
        self.queries = tuple(queries)
        self.record = current()
        self.failure: RequestFailed | None = None
        self.num_unread = len(self.queries)
        self.unsubmitted = deque(range(len(self.queries)))
        self.running: set[int] = set()
        self._found: list[Readings | None] = [None] * len(self.queries)
        self._close = close
        self._is_over = asyncio.Event()
        if not self.queries:
            self._is_over.set()

    async def readings(self) -> list[Readings]:
        """Wait for all; returns one for each query, in their order. Cancel-safe: close the session afterwards.

        Raises:
            RequestFailed: one of them cannot be completed.
        """
        await self._is_over.wait()
        if self.failure is not None:
            raise self.failure
        return [readings for readings in self._found if readings is not None]

    def put(self, index: int, readings: Readings) -> None:
        """Take what was read for a query."""
        self._found[index] = readings
        self.num_unread -= 1
        if not self.num_unread:
            self._is_over.set()

    def fail(self, error: RequestFailed) -> None:
        """End the session; the first failure counts."""
        if self.failure is None:
            self.failure = error
        self._is_over.set()

    def close(self) -> None:
        """Cancel what still runs, and drop the rest; idempotent."""
        self._close(self)


@dataclass(frozen=True, slots=True)
class _Run:
    session: ReadSession
    index: int
    timeline: Timeline


class Readers:
    """Open readouts of one router, between its clients and its dispatch. Used on one event loop.

    Args:
        submit: hands a submission to dispatch, tells the pace of it, and carries out what follows.
        cancel: forgets a request, the same way.
        due_s: how long after its arrival a prompt of so many tokens should have been computed.
        clock: monotonic seconds.
        admission: each query holds a place until it is read, or dropped.
    """

    def __init__(
        self,
        ids: IdSource,
        metrics: Metrics,
        submit: Callable[[Submission], None],
        cancel: Callable[[int], None],
        due_s: Callable[[int], float],
        clock: Callable[[], float],
        admission: Admission,
    ) -> None:
        self._ids = ids
        self._metrics = metrics
        self._submit = submit
        self._cancel = cancel
        self._due_s = due_s
        self._clock = clock
        self._places = admission.places
        self._runs: dict[int, _Run] = {}
        self._sessions: dict[ReadSession, tuple[float, str]] = {}
        self.num_unread = 0
        self._pace = admission.reading_pace

    def open(self, queries: Sequence[ReadQuery], cache_salt: str, arrived_s: float) -> ReadSession:
        """Begin a session; the caller has asked for capacity, and closes it."""
        session = ReadSession(queries, self.close)
        self._sessions[session] = (arrived_s, cache_salt)
        self.num_unread += len(queries)
        self._places.take(session.record.client, len(queries))
        session.record.reads(len(queries), sum(query.num_tokens for query in queries))
        for query in queries:
            self._metrics.accepted(query.num_tokens)
        while session.unsubmitted and len(session.running) < WINDOW:
            self._submit_next(session)
        return session

    def close(self, session: ReadSession) -> None:
        """End a session; idempotent."""
        if self._sessions.pop(session, None) is None:
            return
        self.num_unread -= len(session.unsubmitted)
        self._places.give(session.record.client, len(session.unsubmitted))
        session.unsubmitted.clear()
        for request_id in tuple(session.running):
            self._cancel(request_id)

    def abandon(self) -> None:
        """Fail every session: the router ends."""
        for session in tuple(self._sessions):
            session.fail(NotReady("the server is shutting down"))
            session.close()

    def has(self, request_id: int) -> bool:
        """Whether a request is a readout."""
        return request_id in self._runs

    def placed(self, request_id: int) -> None:
        """Note that a readout has a worker; those that have ended are no matter."""
        if run := self._runs.get(request_id):
            run.timeline.placed(self._clock())

    def record_of(self, request_id: int) -> RequestRecord | None:
        """Return the record of a readout's request; None if it has ended."""
        run = self._runs.get(request_id)
        return None if run is None else run.session.record

    def put(self, request_id: int, readings: Readings) -> None:
        """Take what a worker has read; the terminal record follows."""
        run = self._runs[request_id]
        self._metrics.read(run.session.queries[run.index].kind, self._clock() - run.timeline.arrived_s)
        run.session.record.num_cached_tokens += readings.num_cached_tokens
        self._pace.served(request_id, self._clock())
        run.session.put(run.index, readings)

    def end(self, terminal: Terminal) -> None:
        """Take the terminal record of a readout, and submit the next one of its session."""
        run = self._runs.pop(terminal.request_id)
        self._pace.gone(terminal.request_id, self._clock())
        self.num_unread -= 1
        session, record = run.session, run.session.record
        self._places.give(record.client)
        session.running.discard(terminal.request_id)
        match terminal:
            case Finish():
                record.ended(run.timeline, "read")
                if session.unsubmitted:
                    self._submit_next(session)
            case Fail(_, error):
                record.ended(run.timeline, "failed")
                record.failed(error)
                self._metrics.failed("not_ready" if isinstance(error, NotReady) else "placements")
                session.fail(error)
                session.close()
            case Cancelled():
                record.ended(run.timeline, "cancelled")
                self._metrics.cancelled()

    def _submit_next(self, session: ReadSession) -> None:
        index = session.unsubmitted.popleft()
        query, request_id = session.queries[index], self._ids.next()
        arrived_s, cache_salt = self._sessions[session]
        self._runs[request_id] = _Run(session, index, Timeline(arrived_s))
        session.running.add(request_id)
        prompt, due_s = query.shared + query.tokens, arrived_s + self._due_s(query.num_tokens)
        client = session.record.client
        self._submit(Submission(request_id, prompt, _NO_SAMPLING, due_s, cache_salt, query.readout, client=client))
