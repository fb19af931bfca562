"""Streams that outlive their connection: a client that lost it comes back for the rest.

                      ┌─────────────── read: by one connection, the latest ◄──────────┐
    keep ─► KEPT ─────┤                                                               │ the same POST again,
                      └─ connection lost ─► DETACHED ── keep_s over ─► dropped        │ with Last-Event-ID
                                               └──────────────────────────────────────┘

1. A client asks for it: X-Request-ID names the request among its tenant's, X-Resume-For says for how long it is kept
   after a connection is lost, or after its end. Every event then carries an id: the number of output tokens up to it.
2. A task takes the session's events into a log of at most LIMIT_BYTES, and a connection reads them from there. What
   was read is dropped first. When too much is unread, generation is paused until somebody reads.
3. Who comes back with an id and the identical body reads on after that id, and the connection before it is cut.
4. What the log has no more, or never had (another router, a request forgotten), is generated again: tokens follow from
   prompt and seed alone, and a request without a seed gets one from its id. Events up to the client's are not sent.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from protocol.errors import InvalidRequest, RequestFailed
from protocol.request import MAX_SEED
from router.event_stream import LIMIT_BYTES, PAUSE_BYTES, EventStream
from router.outlet import GO_ON_BYTES, Unread
from router.shape import Shape
from router.slices import Slices
from router.switchboard import Session
from router.text import Piece

log = logging.getLogger(__name__)

_NUMBER: Final = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class Claim:
    """What a client says about the stream that it wants to read, now and perhaps again.

    Attributes:
        tenant: whose client it is; the ids of one say nothing to another.
        after: tokens that it has.
        digest: of path and body; who cannot repeat them has no right to the stream.
    """

    tenant: str
    request_id: str
    keep_s: float
    after: int
    digest: bytes

    @property
    def name(self) -> tuple[str, str]:
        """What the stream is known by."""
        return self.tenant, self.request_id

    @property
    def seed(self) -> int:
        """The seed of a request that names none: the same every time that it is asked."""
        digest = hashlib.blake2b(self.request_id.encode(), digest_size=8, person=b"baton-seed").digest()
        return int.from_bytes(digest, "big") & MAX_SEED


def asks_to_resume(headers: Mapping[str, str]) -> bool:
    """Whether these headers say anything about resuming."""
    return "X-Resume-For" in headers or "Last-Event-ID" in headers


def claim_of(
    headers: Mapping[str, str], tenant: str, request_id: str | None, max_resume_s: float, asked: bytes
) -> Claim:
    """Read the headers that ask for a stream to be kept, or for the rest of it.

    Args:
        headers: of the request, by names in any case.
        tenant: of the client.
        request_id: the client's X-Request-ID, if it is fit for a header.
        max_resume_s: the longest time that may be asked for.
        asked: path and body.

    Raises:
        InvalidRequest: one is malformed, or missing beside the others.
    """
    if request_id is None:
        raise InvalidRequest("X-Request-ID: to be resumed, a stream needs an id of printable ASCII", "X-Request-ID")
    keep = headers.get("X-Resume-For")
    if keep is None:
        raise InvalidRequest("X-Resume-For: must be given together with Last-Event-ID", "X-Resume-For")
    if not _NUMBER.fullmatch(keep) or not 1 <= int(keep) <= max_resume_s:
        raise InvalidRequest(f"X-Resume-For: must be whole seconds from 1 to {max_resume_s:g}", "X-Resume-For")
    after = headers.get("Last-Event-ID", "0")
    if not _NUMBER.fullmatch(after):
        raise InvalidRequest("Last-Event-ID: must be the id of an event of this stream", "Last-Event-ID")
    return Claim(tenant, request_id, float(keep), int(after), hashlib.blake2b(asked).digest())


@dataclass(frozen=True, slots=True)
class Entry:
    """One event, or the last few; `num_tokens` is its id. Without a token it repeats the id of the last one."""

    num_tokens: int
    has_token: bool
    data: bytes


class EventLog:
    """The events of one stream, with one cursor. What is before the cursor is dropped when there is too much."""

    def __init__(self) -> None:
        self._read: deque[Entry] = deque()
        self._unread: deque[Entry] = deque()
        self.num_bytes = 0
        self.unread_bytes = 0
        self.num_dropped_tokens = 0

    def append(self, entry: Entry) -> None:
        """Add an event, unread."""
        self._unread.append(entry)
        self.num_bytes += len(entry.data)
        self.unread_bytes += len(entry.data)
        self._trim()

    def rewind(self) -> None:
        """Put the cursor before everything that is kept."""
        self._read.extend(self._unread)
        self._read, self._unread = deque(), self._read
        self.unread_bytes = self.num_bytes

    def read(self, after: int, max_bytes: int) -> bytes:
        """Return the next events, without tokens up to `after`; empty if none is left. One event is never divided."""
        found: list[bytes] = []
        num_bytes = 0
        while self._unread:
            entry = self._unread[0]
            is_wanted = entry.num_tokens > after or not entry.has_token
            if is_wanted and found and num_bytes + len(entry.data) > max_bytes:
                break
            self._read.append(self._unread.popleft())
            self.unread_bytes -= len(entry.data)
            if is_wanted:
                found.append(entry.data)
                num_bytes += len(entry.data)
        self._trim()
        return b"".join(found)

    def _trim(self) -> None:
        while self.num_bytes > LIMIT_BYTES and self._read:
            entry = self._read.popleft()
            self.num_bytes -= len(entry.data)
            self.num_dropped_tokens = entry.num_tokens


class KeptStream:
    """One stream that goes on without its client. Its task closes the session; `stop` ends it early."""

    def __init__(self, claim: Claim, session: Session, shape: Shape, unread: Unread, slices: Slices) -> None:
        self.claim = claim
        self.is_over = self.is_delivered = False
        self.is_failed = False
        self._session = session
        self._shape = shape
        self._unread = unread
        self._slices = slices
        self._log = EventLog()
        self._reader: EventStream | None = None
        self._failure: RequestFailed | None = None
        self._news = asyncio.Event()
        self._has_room = asyncio.Event()
        self.task = asyncio.create_task(self._follow(), name=f"keep {shape.answer_id}")

    @property
    def has_reader(self) -> bool:
        """Whether a connection reads it now."""
        return self._reader is not None

    def has_rest(self, after: int) -> bool:
        """Whether everything after that many tokens is kept, or still to come."""
        return self._log.num_dropped_tokens <= after

    def stop(self) -> None:
        """Cancel what still runs, and cut who reads."""
        self.task.cancel()
        if self._reader is not None:
            self._reader.cut()

    # --- generation ---

    async def _follow(self) -> None:
        """Take the events of the session until it ends."""
        try:
            while events := await self._session.events(self._offer):
                for index, piece in events:
                    self._take(index, piece)
                if self._is_full():
                    self._has_room.clear()
                    self._session.pause()
                    await self._has_room.wait()
                self._session.go_on()
            self._shape.num_cached_tokens = self._session.num_cached_tokens
            self._append(self._shape.closing(), has_token=False)
        except RequestFailed as error:
            log.warning("stream %s failed: %s", self._shape.answer_id, error)
            self._failure, self.is_failed = error, True
            self._append(self._shape.failure(error), has_token=False)
        finally:
            self._session.close()
            self._session.record.close()
            self.is_over = True
            self._news.set()

    def _offer(self, index: int, piece: Piece) -> bool:
        if self._is_full():
            self._session.pause()
            return False
        self._take(index, piece)
        return True

    def _take(self, index: int, piece: Piece) -> None:
        self._shape.num_cached_tokens = self._session.num_cached_tokens
        self._append(self._shape.chunk(index, piece), has_token=True)

    def _append(self, data: bytes, has_token: bool) -> None:
        if data:
            num_tokens = self._shape.num_output_tokens
            self._log.append(Entry(num_tokens, has_token, numbered(data, num_tokens)))
            self._news.set()

    def _unsent_bytes(self) -> int:
        return self._log.unread_bytes + (self._reader.unsent_bytes if self._reader is not None else 0)

    def _is_full(self) -> bool:
        return self._unsent_bytes() > PAUSE_BYTES

    # --- readers ---

    async def read(self, request: web.Request, after: int) -> web.StreamResponse:
        """Answer with every event after that many tokens, as they come; a connection that reads now is cut.

        Raises:
            RequestFailed: it failed before its first event.
        """
        if self._reader is not None:
            log.info("stream %s: another connection takes over", self._shape.answer_id)
            self._reader.cut()
        stream = self._reader = EventStream(request, self._shape, self._session, self._unread, self._slices)
        self._log.rewind()
        try:
            await self._await_news(stream)
            if self._failure is not None and self._shape.num_output_tokens == 0:
                raise self._failure
            await stream.begin()
            await self._send(stream, after)
        except (ConnectionError, TimeoutError) as error:
            log.info("stream %s: connection ended: %s", self._shape.answer_id, error)
            stream.cut()
        finally:
            if self._reader is stream:
                self._reader = None
        return stream.response

    async def _send(self, stream: EventStream, after: int) -> None:
        while True:
            await self._await_news(stream)
            data = self._log.read(after, GO_ON_BYTES)
            await stream.push(data)
            if data:
                await stream.settle(GO_ON_BYTES)
            if self._unsent_bytes() <= GO_ON_BYTES:
                self._has_room.set()
            if self.is_over and not self._log.unread_bytes:
                break
        await stream.finish(b"")
        self.is_delivered = True

    async def _await_news(self, stream: EventStream) -> None:
        """Wait for something unread, or for the end."""
        while not self._log.unread_bytes and not self.is_over:
            self._news.clear()
            await self._news.wait()
        if self._reader is not stream:
            raise ConnectionResetError("another connection has taken over")


class KeptStreams:
    """All kept streams of one router, by tenants and the ids that their clients chose.

    Args:
        max_num_streams: finished ones beyond it are forgotten, the oldest of the tenant that has most: nobody's streams
            give way to those of one that has more.
        unread: of all connections.
        slices: of the event loop.
    """

    def __init__(self, max_num_streams: int, unread: Unread, slices: Slices) -> None:
        self._max_num_streams = max_num_streams
        self._unread = unread
        self._slices = slices
        self._streams: dict[tuple[str, str], KeptStream] = {}
        self._timers: dict[tuple[str, str], asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def find(self, claim: Claim) -> KeptStream | None:
        """Return the stream of a claim; None if it must be generated (again).

        Raises:
            web.HTTPConflict: the id belongs to another request of this tenant.
        """
        kept = self._streams.get(claim.name)
        if kept is None:
            return None
        if not hmac.compare_digest(kept.claim.digest, claim.digest):
            raise web.HTTPConflict(text="X-Request-ID: this id is in use for a request with another body")
        if kept.has_rest(claim.after) and not kept.is_failed:
            return kept
        self._forget(kept)
        kept.stop()
        return None

    def keep(self, claim: Claim, session: Session, shape: Shape) -> KeptStream:
        """Follow a session, from now on owned by what is returned."""
        assert claim.name not in self._streams
        self._make_room(claim.tenant)
        kept = self._streams[claim.name] = KeptStream(claim, session, shape, self._unread, self._slices)
        return kept

    def _make_room(self, tenant: str) -> None:
        """Forget finished streams until there is room for one more of a tenant, if enough of them are finished."""
        num_of = Counter(name[0] for name in self._streams)
        num_of[tenant] += 1
        over = [kept for kept in self._streams.values() if kept.is_over]
        for _ in range(min(len(over), len(self) + 1 - self._max_num_streams)):
            # Of several with as many the newcomer gives way; of one tenant's the oldest.
            old = max(over, key=lambda one: (num_of[one.claim.tenant], one.claim.tenant == tenant))
            num_of[old.claim.tenant] -= 1
            over.remove(old)
            self._forget(old)

    async def read(self, kept: KeptStream, request: web.Request, claim: Claim) -> web.StreamResponse:
        """Answer a request with the rest of a stream; afterwards its time runs. Raises as `KeptStream.read`."""
        self._stop_timer(kept)
        try:
            return await kept.read(request, claim.after)
        finally:
            if not kept.has_reader and self._streams.get(claim.name) is kept:
                if kept.is_failed:
                    self._forget(kept)
                else:
                    self._start_timer(kept, claim.keep_s)

    def close(self) -> None:
        """End everything; call it when no handler runs any more."""
        for kept in list(self._streams.values()):
            self._forget(kept)
            kept.stop()

    def _expire(self, kept: KeptStream) -> None:
        if not kept.is_delivered:
            log.info("stream %s: nobody came back for it", kept.claim.request_id)
        self._forget(kept)
        kept.stop()

    def _forget(self, kept: KeptStream) -> None:
        self._stop_timer(kept)
        self._streams.pop(kept.claim.name, None)

    def _start_timer(self, kept: KeptStream, keep_s: float) -> None:
        self._stop_timer(kept)
        self._timers[kept.claim.name] = asyncio.get_running_loop().call_later(keep_s, self._expire, kept)

    def _stop_timer(self, kept: KeptStream) -> None:
        timer = self._timers.pop(kept.claim.name, None)
        if timer is not None:
            timer.cancel()


def numbered(data: bytes, num_tokens: int) -> bytes:
    """Return events with an id line each; no event contains an empty line."""
    return b"".join(b"id: %d\n%b\n\n" % (num_tokens, event) for event in data.split(b"\n\n") if event)
