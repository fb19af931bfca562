"""Tells clients what was generated for them: whole, as a stream, or the prompt alone where nothing is generated.

1. What was read off the prompts is shaped first, in slices. 2. A whole answer is gathered, shaped in slices, and sent
part by part. 3. A stream is written by the session itself, token by token; one that is wide (many choices with log
probabilities each) by its handler, in slices. 4. Places are held until the client has everything, however few tokens
it was: whoever does not read counts as whoever generates.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Final

from aiohttp import web

from protocol.errors import RequestFailed
from protocol.request import FinishReason
from router.access_log import current
from router.answers import AnswerWriter
from router.core import Core
from router.event_stream import EventStream, Nothing
from router.intake import Job
from router.outlet import Unread
from router.shape import Shape
from router.switchboard import Session
from router.text import Piece, Whole

log = logging.getLogger(__name__)

# Of all choices of a step: some 0.3 ms of shaping, beyond which one step of a stream would hold up others.
WIDE_VALUES: Final = 256


class GeneratedAnswers:
    """Used by the handlers of one server."""

    def __init__(self, core: Core, writer: AnswerWriter, unread: Unread) -> None:
        self._core = core
        self._writer = writer
        self._unread = unread

    async def tell(self, request: web.Request, session: Session, shape: Shape) -> web.StreamResponse:
        """Answer with what a session generates; whoever opened it closes it.

        Raises:
            RequestFailed: it failed before its first event.
        """
        if session.job.is_stream:
            return await self._stream(request, session, shape)
        choices = [Whole() for _ in session.job.choices]
        while events := await session.events():
            for index, piece in events:
                choices[index].add(piece)
        shape.num_cached_tokens = session.num_cached_tokens
        with self._core.answering():
            parts = await shaped(self._core, shape.parts([choices.pop(0).piece() for _ in session.job.choices]))
            return await self._writer.send(request, parts)

    async def tell_prompts(self, request: web.Request, job: Job, shape: Shape) -> web.StreamResponse:
        """Answer where nothing is generated: prompts echoed, or told about."""
        if not job.is_stream:
            pieces = [Piece(finish_reason=FinishReason.LENGTH) for _ in job.choices]
            return await self._writer.send(request, await shaped(self._core, shape.parts(pieces)))
        stream = EventStream(request, shape, Nothing(), self._unread, self._core.slices)
        try:
            await stream.begin()
            for choice in job.choices:
                await stream.write([(choice.index, Piece(finish_reason=FinishReason.LENGTH))])
            await stream.finish(shape.closing())
        except (ConnectionError, TimeoutError) as error:
            _cut(stream, shape, error)
        return stream.response

    async def _stream(self, request: web.Request, session: Session, shape: Shape) -> web.StreamResponse:
        events = await session.events()
        stream = EventStream(request, shape, session, self._unread, self._core.slices)
        try:
            await stream.begin()
            await self._follow(session, stream, shape, events)
        except (ConnectionError, TimeoutError) as error:
            _cut(stream, shape, error)
        return stream.response

    async def _follow(
        self, session: Session, stream: EventStream, shape: Shape, events: list[tuple[int, Piece]]
    ) -> None:
        """Write events until the last one has been read; generation waits for a client that does not read."""

        def counted(index: int, piece: Piece) -> bool:
            shape.num_cached_tokens = session.num_cached_tokens
            return stream.offer(index, piece)

        sink = None if is_wide(session.job) else counted if session.job.has_running_usage else stream.offer
        try:
            while events:
                shape.num_cached_tokens = session.num_cached_tokens
                await stream.write(events)
                events = await session.events(sink)
            # Prompts whose first token went straight to the sink have been counted since.
            shape.num_cached_tokens = session.num_cached_tokens
            last = shape.closing()
        except RequestFailed as error:
            log.warning("stream %s failed: %s", shape.answer_id, error)
            last = shape.failure(error)
        with self._core.answering():
            await stream.finish(last)


async def shaped(core: Core, steps: Iterable[bytes]) -> list[bytes]:
    """Return the parts of an answer, shaped in slices; a part is what one slice made."""
    return [data async for parts in core.slices.each(steps) if (data := b"".join(parts))]


def is_wide(job: Job) -> bool:
    """Whether a step of a job's stream is much to shape."""
    asked = (choice.sampling.num_logprobs for choice in job.choices)
    return sum(1 + num_top for num_top in asked if num_top is not None) > WIDE_VALUES


def _cut(stream: EventStream, shape: Shape, error: Exception) -> None:
    current().failed(error)
    log.info("stream %s: connection ended: %s", shape.answer_id, error)
    stream.cut()
