"""Carries out what dispatch decides, for workers on one side and open requests on the other.

    worker ── message ──► Switchboard ── event ──► Dispatch
       ▲                       │ ◄─ instructions ──┘
       └──────── Send ─────────┤
                               └── Deliver, terminal ──► ChoiceRun ── pieces ──► Session.events ──► HTTP

1. A session is opened for an admitted job: each of its choices is submitted on its own.
2. Tokens become text here, at once, so that a stop string aborts the workers before their next step. While a session's
   handler waits, its pieces go to the handler's sink at once; what the sink does not take wakes the handler.
3. The first failure of a choice fails its session. Closing a session cancels whatever of it still runs.
4. Readouts have sessions of their own (router/reading.py), and the same admission.
5. What becomes of a request is noted in its record, which makes one line of the access log (router/access_log.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from protocol.channel import Conversation
from protocol.errors import AnswerImpossible, NotReady, RequestFailed
from protocol.timeline import Timeline
from protocol.wire import (
    Declined,
    Dismissed,
    FirstToken,
    GrammarFailed,
    Heartbeat,
    Links,
    Members,
    Preempted,
    Pulse,
    Readings,
    Register,
    Role,
    Tokens,
    TransferFailed,
    WorkerMessage,
)
from router.access_log import RequestRecord, current
from router.admission import Admission
from router.config import RouterConfig
from router.dispatch import Dispatch
from router.fairness import Shares
from router.instructions import (
    Cancelled,
    Deliver,
    Fail,
    Finish,
    IdSource,
    Instruction,
    Placed,
    Read,
    Send,
    Submission,
    Terminal,
)
from router.intake import Choice, Job
from router.members import Refusal, Registry, Worker, WorkerKey
from router.metrics import Metrics
from router.reading import Readers, ReadQuery, ReadSession
from router.text import ChoiceText, Piece
from router.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# No deadline is as far away as this: of a client's prompts prefill takes those of a lower priority number first.
PRIORITY_STEP_S = 1e4


Sink = Callable[[int, Piece], bool]
"""Takes a piece of a choice at once, or returns False and does nothing."""


class ChoiceRun:
    """One choice while it is generated."""

    def __init__(self, session: Session, choice: Choice, text: ChoiceText, arrived_s: float) -> None:
        self.session = session
        self.choice = choice
        self.text = text
        self.timeline = Timeline(arrived_s)
        self.piece: Piece | None = None


class Session:
    """One open request of the API. Its events are pieces (choice index, piece), or the error that ends it."""

    def __init__(self, job: Job, close: Callable[[Session], None], switch: Callable[[Session, bool], None]) -> None:
        self.job = job
        self.record = current()
        self.request_ids: list[int] = []
        self.num_unfinished = len(job.choices)
        self.num_cached_tokens = 0
        self._close = close
        self._switch = switch
        self._events: deque[tuple[int, Piece] | RequestFailed] = deque()
        self._has_events = asyncio.Event()
        self._sink: Sink | None = None
        self._seen_prompts: set[int] = set()

    @property
    def is_over(self) -> bool:
        """Whether nothing will be read of it any more."""
        return self.num_unfinished == 0 and not self._events

    async def events(self, sink: Sink | None = None) -> list[tuple[int, Piece]]:
        """Return what has happened since the last call, at least one event; empty when every choice is finished.

        Cancel-safe.

        Args:
            sink: takes pieces while this waits; those that it refuses are returned here, in order.

        Raises:
            RequestFailed: the request cannot be completed.
        """
        while not self._events:
            if self.num_unfinished == 0:
                return []
            self._has_events.clear()
            self._sink = sink
            try:
                await self._has_events.wait()
            finally:
                self._sink = None
        found: list[tuple[int, Piece]] = []
        while self._events:
            event = self._events.popleft()
            if isinstance(event, RequestFailed):
                if found:
                    self._events.appendleft(event)
                    return found
                raise event
            found.append(event)
        return found

    def put(self, event: tuple[int, Piece] | RequestFailed) -> None:
        """Append an event, or let the sink have it where nothing waits before it."""
        if self._sink is not None and not self._events and not isinstance(event, RequestFailed):
            try:
                if self._sink(*event):
                    return
            except Exception:
                # What is wrong with one answer must not end the conversation with a worker, which everybody shares.
                log.exception("request %s: its answer could not be streamed", self.record.request_id)
                event = RequestFailed("internal error")
        self._events.append(event)
        self._has_events.set()

    def end_choice(self) -> None:
        """Note that one more choice is finished."""
        self.num_unfinished -= 1
        self._has_events.set()

    def note_prefill(self, choice: Choice, num_cached_tokens: int) -> None:
        """Count the cached tokens of a prompt once, by the first of its choices that was prefilled."""
        if id(choice.prompt) not in self._seen_prompts:
            self._seen_prompts.add(id(choice.prompt))
            self.num_cached_tokens += num_cached_tokens
            self.record.num_cached_tokens += num_cached_tokens

    def pause(self) -> None:
        """Stop generating until `go_on`: every choice gives up its workers and what it holds there. Idempotent."""
        self._switch(self, False)

    def go_on(self) -> None:
        """Go on after a pause, token for token; idempotent."""
        self._switch(self, True)

    def close(self) -> None:
        """Cancel what still runs; idempotent."""
        self._close(self)


class Switchboard:
    """All state of a running router that changes with traffic. Used on one event loop.

    Args:
        clock: monotonic seconds.
    """

    def __init__(
        self, config: RouterConfig, tokenizer: Tokenizer, metrics: Metrics, clock: Callable[[], float]
    ) -> None:
        self.registry = Registry(config.lease_ttl_s, config.stall_s)
        self.is_draining = False
        self._config = config
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._clock = clock
        self._started_s = clock()
        self._ids = IdSource()
        self._admission = Admission(config, metrics)
        self.dispatch = Dispatch(self.registry, config.max_placements, config.placement_wait_s, self._ids)
        self._runs: dict[int, ChoiceRun] = {}
        self._readers = Readers(
            self._ids,
            metrics,
            self._submit_readout,
            lambda request_id: self._run(self.dispatch.cancel(request_id, clock())),
            self._due_s,
            clock,
            self._admission,
        )
        self._todo: deque[Instruction] = deque()
        self._is_running = False
        self._channels: dict[WorkerKey, Conversation] = {}
        self._num_answering = 0
        self.has_started = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()

    # --- for clients ---

    @property
    def max_model_len(self) -> int | None:
        """Prompt plus output tokens that fit; None until the first worker has registered."""
        limits = [n for n in (self._config.max_model_len, self.registry.max_model_len) if n is not None]
        return min(limits) if self.registry.max_model_len is not None else None

    @property
    def num_requests(self) -> int:
        """Unfinished choices and readouts, and answers that are being written."""
        return len(self._runs) + self._readers.num_unread + self._num_answering

    def check_capacity(self, num_choices: int = 1, is_readout: bool = False, admitting: Shares | None = None) -> int:
        """Return the context length, or refuse before any work is done. Readouts wait only for each other.

        Args:
            num_choices: places that the running task's request wants.
            is_readout: whether these are readouts.
            admitting: places of requests that are not open yet and count as well.

        Raises:
            NotReady: draining, or no worker has registered yet.
            Overloaded: too many unfinished requests, or a newcomer would wait too long.
        """
        if self.is_draining:
            raise NotReady("the server is shutting down")
        max_model_len = self.max_model_len
        if max_model_len is None:
            raise NotReady("no worker has registered yet: " + ", ".join(self.registry.missing()))
        self._admission.check(current().client, num_choices, is_readout, admitting)
        return max_model_len

    def open(self, job: Job, arrived_s: float) -> Session:
        """Submit every choice of a job; the caller must close the session. Raises as `check_capacity` does."""
        self.check_capacity(len(job.choices))
        session = Session(job, self._close, self._switch)
        client, now_s = session.record.client, self._clock()
        session.record.opened(job.model, len(job.choices), sum(len(prompt.token_ids) for prompt in job.prompts))
        self.idle.clear()
        for choice in job.choices:
            request_id = self._ids.next()
            session.request_ids.append(request_id)
            self._runs[request_id] = ChoiceRun(session, choice, ChoiceText(self._tokenizer, job.text), arrived_s)
            num_tokens = len(choice.prompt.token_ids)
            due_s = arrived_s + self._due_s(num_tokens) + job.priority * PRIORITY_STEP_S
            submission = Submission(
                request_id,
                choice.prompt.token_ids,
                choice.sampling,
                due_s,
                job.cache_salt,
                priority=job.priority,
                client=client,
            )
            self._metrics.accepted(num_tokens)
            self._admission.places.take(client)
            instructions = self.dispatch.submit(submission, now_s)
            self._admission.pace.begin(request_id, num_tokens, now_s, client, self.dispatch.cost_of(request_id))
            self._run(instructions)
        return session

    def open_readouts(self, queries: Sequence[ReadQuery], cache_salt: str, arrived_s: float) -> ReadSession:
        """Submit readouts; the caller must close the session. Raises as `check_capacity` does."""
        self.check_capacity(len(queries), is_readout=True)
        self.idle.clear()
        return self._readers.open(queries, cache_salt, arrived_s)

    def _submit_readout(self, submission: Submission) -> None:
        now_s = self._clock()
        instructions = self.dispatch.submit(submission, now_s)
        num_tokens, cost = len(submission.prompt), self.dispatch.cost_of(submission.request_id)
        self._admission.reading_pace.begin(submission.request_id, num_tokens, now_s, submission.client, cost)
        self._run(instructions)

    @contextmanager
    def answering(self, num_places: int = 1) -> Iterator[None]:
        """Hold places for an answer until its client, that of the running task, has it."""
        client = current().client
        self._num_answering += num_places
        self._admission.places.take(client, num_places)
        self.idle.clear()
        try:
            yield
        finally:
            self._num_answering -= num_places
            self._admission.places.give(client, num_places)
            if not self.num_requests:
                self.idle.set()

    def _due_s(self, num_prompt_tokens: int) -> float:
        return self._config.ttft_slo_s + num_prompt_tokens * self._config.ttft_slo_per_token_s

    def _close(self, session: Session) -> None:
        for request_id in session.request_ids:
            if request_id in self._runs:
                self._run(self.dispatch.cancel(request_id, self._clock()))

    def _switch(self, session: Session, goes_on: bool) -> None:
        change = self.dispatch.go_on if goes_on else self.dispatch.pause
        for request_id in session.request_ids:
            if request_id in self._runs:
                self._run(change(request_id, self._clock()))

    # --- for workers ---

    def register(self, registration: Register, channel: Conversation) -> Worker | Refusal:
        """Take a worker in, or say why not."""
        now_s = self._clock()
        key = WorkerKey(registration.worker_id, registration.instance)
        # The same instance on a new connection: what its old one held is given up on both sides.
        self.lose(key, "it connected again")
        result = self.registry.register(registration, now_s)
        if isinstance(result, Worker):
            self._channels[key] = channel
            self._metrics.worker_came(result)
            self._admission.told(self.registry.prefills)
            log.info("%s worker %s registered (%s)", result.role, registration.worker_id, registration.backend)
        return result

    def welcomed(self, worker: Worker) -> None:
        """Tell decode workers about prefill workers, once the new worker has its Welcome."""
        if worker.role is Role.DECODE:
            self._channels[worker.key].post(Members(peers=self.registry.addresses))
        else:
            self._announce_members()
        self._run(self.dispatch.tick(self._clock()))

    def take(self, key: WorkerKey, message: WorkerMessage) -> None:
        """Take one message of a registered worker; those of instances that are gone count for nothing."""
        now_s = self._clock()
        if self.registry.find(key) is None:
            if isinstance(message, Tokens):
                self.dispatch.num_stale_tokens += len(message.rows)
            return
        match message:
            case Tokens():
                self._run(self.dispatch.tokens(key, message.rows, now_s))
            case FirstToken():
                self._run(self.dispatch.first_token(key, message, now_s))
            case Readings():
                self._run(self.dispatch.readings(key, message, now_s))
            case Heartbeat():
                self._heartbeat(key, message, now_s)
            case Declined():
                name, at = self._name_of(message.transfer_id), (message.transfer_id, key.worker_id)
                log.debug("request %s: placement %d declined by %s: %s", name, *at, message.reason)
                self._run(self.dispatch.declined(key, message, now_s))
            case Preempted():
                self._run(self.dispatch.preempted(key, message, now_s))
            case TransferFailed() | GrammarFailed():
                self._run(self._failed(key, message, now_s))
            case Links():
                self.registry.set_links(key, message.peers)
                self._run(self.dispatch.tick(now_s))
            case Register():
                self.lose(key, "it registered twice")

    def _failed(self, key: WorkerKey, message: TransferFailed | GrammarFailed, now_s: float) -> list[Instruction]:
        name, on = self._name_of(message.transfer_id), (message.transfer_id, key.worker_id, message.reason)
        if isinstance(message, GrammarFailed):
            log.info("request %s: the grammar of placement %d failed at %s: %s", name, *on)
            return self.dispatch.grammar_failed(key, message, now_s)
        # What is history by now has failed nobody.
        level = logging.WARNING if self.dispatch.request_of(message.transfer_id) else logging.DEBUG
        log.log(level, "request %s: placement %d failed at %s: %s", name, *on)
        return self.dispatch.transfer_failed(key, message, now_s)

    def lose(self, key: WorkerKey, reason: str) -> None:
        """Give up an instance of a worker: its connection is cut, what it held is placed again. Idempotent."""
        channel = self._channels.pop(key, None)
        worker = self.registry.remove(key)
        if worker is None:
            return
        level = logging.INFO if self.is_draining or worker.is_draining else logging.WARNING
        log.log(level, "%s worker %s is gone: %s", worker.role, key.worker_id, reason)
        if channel is not None:
            channel.abort(reason)
        self._metrics.worker_went(worker)
        self._admission.told(self.registry.prefills)
        self._run(self.dispatch.worker_lost(key, self._clock()))
        if worker.role is Role.PREFILL:
            self._announce_members()

    def owns(self, key: WorkerKey, channel: Conversation) -> bool:
        """Whether this connection is the present one of that instance."""
        return self._channels.get(key) is channel

    def pulse(self) -> None:
        """Renew our leases on every worker."""
        for channel in self._channels.values():
            channel.post(Pulse())

    def tick(self) -> None:
        """Drop overdue workers, place what waits, give up on what waited too long."""
        now_s = self._clock()
        if self.registry.is_ready or now_s - self._started_s >= self._config.startup_wait_s:
            self.has_started.set()
        for key, reason, is_hopeless in self.registry.overdue(now_s):
            channel = self._channels.get(key)
            if is_hopeless and channel is not None:
                # Its event loop lives although its compute thread hangs: it can still end its process.
                channel.post(Dismissed(reason=reason, is_final=True))
                self._channels.pop(key)
            self.lose(key, reason)
        self._run(self.dispatch.tick(now_s))

    def reload(self, config: RouterConfig) -> None:
        """Take over limits, and the deadlines of prompts that come from now on."""
        self._config = config
        self._admission.reload(config)

    def abandon(self) -> None:
        """Fail whatever is unfinished: the router ends."""
        for session in {run.session for run in self._runs.values()}:
            session.put(NotReady("the server is shutting down"))
            session.close()
        self._readers.abandon()

    async def close(self) -> None:
        """Send what is queued and end every conversation with a worker."""
        channels, self._channels = list(self._channels.values()), {}
        await asyncio.gather(*(channel.close() for channel in channels))

    def _heartbeat(self, key: WorkerKey, message: Heartbeat, now_s: float) -> None:
        worker = self.registry.find(key)
        assert worker is not None
        was_draining = worker.is_draining
        self.registry.heartbeat(key, message, now_s)
        self.dispatch.loads.heartbeat(worker)
        self._metrics.heartbeat(worker, self._transport_of(worker))
        if worker.is_draining != was_draining:
            log.info("worker %s is draining", key.worker_id)
            self._admission.told(self.registry.prefills)
        if self.dispatch.num_waiting:
            self._run(self.dispatch.tick(now_s))

    def _transport_of(self, worker: Worker) -> str | None:
        """Return how KV reaches a decode worker: as the prefill workers it is linked with say."""
        for key in sorted(worker.links, key=lambda k: k.worker_id):
            peer = self.registry.find(key)
            if peer is not None and peer.registration.address is not None:
                return peer.registration.address.transport
        return None

    def _announce_members(self) -> None:
        message = Members(peers=self.registry.addresses)
        for worker in self.registry.decodes:
            if channel := self._channels.get(worker.key):
                channel.post(message)

    # --- carrying out ---

    def _run(self, instructions: list[Instruction]) -> None:
        """Carry out, in order; what a client's sink causes meanwhile comes after what was asked before."""
        self._todo.extend(instructions)
        if self._is_running:
            return
        self._is_running = True
        try:
            self._run_all(self._todo)
        finally:
            self._is_running = False
        if not self.num_requests:
            self.idle.set()

    def _run_all(self, todo: deque[Instruction]) -> None:
        while todo:
            match todo.popleft():
                case Deliver() as deliver:
                    if more := self._deliver(deliver):
                        todo.extend(more)
                case Send(key, message):
                    if channel := self._channels.get(key):
                        channel.post(message)
                case Placed() as placed:
                    self._note_placed(placed)
                case Read(request_id, readings):
                    self._readers.put(request_id, readings)
                case Finish() | Fail() | Cancelled() as terminal:
                    self._terminate(terminal)

    def _note_placed(self, placed: Placed) -> None:
        if run := self._runs.get(placed.request_id):
            run.timeline.placed(self._clock())
        else:
            self._readers.placed(placed.request_id)
        if record := self._record_of(placed.request_id):
            record.placed(placed.transfer_id, placed.prefill_id, placed.decode_id)
            on = (placed.transfer_id, placed.prefill_id, placed.decode_id)
            log.debug("request %s: placement %d on %s and %s", record.request_id, *on)

    def _name_of(self, transfer_id: int) -> str:
        """Return what the client calls the request whose present placement this is; empty if it is history."""
        request_id = self.dispatch.request_of(transfer_id)
        record = None if request_id is None else self._record_of(request_id)
        return "" if record is None else record.request_id

    def _record_of(self, request_id: int) -> RequestRecord | None:
        run = self._runs.get(request_id)
        return self._readers.record_of(request_id) if run is None else run.session.record

    def _terminate(self, terminal: Terminal) -> None:
        """Give an accepted request its terminal record."""
        if self._readers.has(terminal.request_id):
            self._readers.end(terminal)
            return
        run = self._end(terminal.request_id)
        record = run.session.record
        match terminal:
            case Finish(_, reason):
                run.timeline.finished(self._clock())
                finished = (run.piece.finish_reason if run.piece else None) or reason
                self._metrics.finished(run.timeline, finished)
                record.ended(run.timeline, str(finished))
                run.session.end_choice()
            case Fail(_, error):
                if isinstance(error, AnswerImpossible):
                    error.param = run.session.job.grammar_field or None
                    self._metrics.grammar_failed()
                else:
                    self._metrics.failed("not_ready" if isinstance(error, NotReady) else "placements")
                record.ended(run.timeline, "failed")
                record.failed(error)
                run.session.put(error)
            case Cancelled():
                self._metrics.cancelled()
                record.ended(run.timeline, "cancelled")

    def _end(self, request_id: int) -> ChoiceRun:
        self._admission.pace.gone(request_id, self._clock())
        run = self._runs.pop(request_id)
        self._admission.places.give(run.session.record.client)
        return run

    def _deliver(self, deliver: Deliver) -> list[Instruction]:
        """Give a token to its choice; returns the end of the request where a stop string is complete."""
        run = self._runs.get(deliver.request_id)
        if run is None or run.text.is_over:
            return []
        now_s = self._clock()
        timeline, row, first = run.timeline, deliver.row, deliver.first
        self._metrics.token(timeline, timeline.token(now_s))
        if first is not None:
            self._admission.pace.served(deliver.request_id, now_s)
            run.session.record.waited(self._metrics.prefilled(timeline, first))
            run.session.note_prefill(run.choice, first.num_cached_tokens)
        piece = run.piece = run.text.feed(row)
        run.session.put((run.choice.index, piece))
        if piece.finish_reason is not None and row.finish_reason is None:
            return self.dispatch.stop(deliver.request_id, now_s)
        return []
