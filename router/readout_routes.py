"""HTTP of what is read off prompts: decisions, System One, scores and reranking.

1. The body is read and parsed. 2. `decide` answers its questions on prefill workers. 3. The answer takes the shape that
the client's kind of API has. A client that leaves cancels its handler, and with it every question.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any, Final, TypeVar

import msgspec
from aiohttp import web

from router import decisions, scoring, systemone
from router.answers import AnswerWriter
from router.api import parse
from router.core import Core
from router.deciding import Inquiry, Verdict, decide
from router.decisions import DecisionsRequest
from router.generated import shaped
from router.scoring import RerankRequest, ScoreRequest
from router.systemone import SystemOneRequest

SCORE_PATHS: Final = ("/v1/score", "/score")
RERANK_PATHS: Final = ("/v1/rerank", "/v2/rerank", "/rerank")

Request = TypeVar("Request", bound=msgspec.Struct)


class ReadoutRoutes:
    """Handlers of one router.

    Args:
        core: admits and carries out.
        writer: of answers.
        model: the name that is reported where a client gives none.
        read: reads the body of a request.
        salt: makes of a client's salt one that no other tenant has.
    """

    def __init__(
        self,
        core: Core,
        writer: AnswerWriter,
        model: str,
        read: Callable[[web.Request], Awaitable[bytes]],
        salt: Callable[[web.Request, str], str],
    ) -> None:
        self._core = core
        self._writer = writer
        self._model = model
        self._read = read
        self._salt = salt

    def add_to(self, app: web.Application) -> None:
        """Register the handlers; score and rerank under the other paths that their clients use, too."""
        post = app.router.add_post
        post("/v1/decisions", self._decisions)
        post("/v1/systemone", self._system_one)
        for path in SCORE_PATHS:
            post(path, self._score)
        for path in RERANK_PATHS:
            post(path, self._rerank)

    async def _decisions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, DecisionsRequest, decisions.inquiry_of, decisions.parts)

    async def _system_one(self, request: web.Request) -> web.StreamResponse:
        def shape(asked: SystemOneRequest, verdict: Verdict) -> Iterator[bytes]:
            return systemone.parts(asked, verdict, self._model)

        return await self._answer(request, SystemOneRequest, systemone.inquiry_of, shape)

    async def _score(self, request: web.Request) -> web.StreamResponse:
        def shape(asked: ScoreRequest, verdict: Verdict) -> Iterator[bytes]:
            yield scoring.scores(asked, verdict, self._model)

        return await self._answer(request, ScoreRequest, scoring.inquiry_of, shape)

    async def _rerank(self, request: web.Request) -> web.StreamResponse:
        def shape(asked: RerankRequest, verdict: Verdict) -> Iterator[bytes]:
            yield scoring.ranking(asked, verdict, self._model)

        return await self._answer(request, RerankRequest, scoring.inquiry_of, shape)

    async def _answer(
        self,
        request: web.Request,
        kind: type[Request],
        ask: Callable[[Any], Inquiry],
        shape: Callable[[Any, Verdict], Iterator[bytes]],
    ) -> web.StreamResponse:
        arrived_s = time.monotonic()
        body = await self._read(request)
        parsed: list[Request] = []

        def make() -> Inquiry:
            parsed.append(self._core.intake.named(parse(body, kind)))
            inquiry = ask(parsed[0])
            return replace(inquiry, cache_salt=self._salt(request, inquiry.cache_salt))

        verdict = await decide(self._core, len(body), make, arrived_s)
        with self._core.answering():
            return await self._writer.send(request, await shaped(self._core, shape(parsed[0], verdict)))
