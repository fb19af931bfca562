"""The engine in this process as the target of a batch: bodies take the way that they take over HTTP."""

from __future__ import annotations

import secrets
import time
from typing import Final

import msgspec

from baton.batch import BadLine, BatchLine, Reply, Response
from baton.in_process import InProcess
from protocol.errors import RequestFailed, RequestRejected
from router.api import ChatRequest, CompletionRequest, parse
from router.core import Core
from router.intake import Job
from router.response_request import ResponsesRequest
from router.response_shape import shape_of
from router.responses import body_of_error, encode_json
from router.text import Piece

_KINDS: Final[dict[str, type[ChatRequest] | type[CompletionRequest] | type[ResponsesRequest]]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
}


class EngineTarget:
    """Answers with what HTTP would say."""

    def __init__(self, engine: InProcess) -> None:
        self._engine = engine

    async def answer(self, line: BatchLine) -> Reply:
        """Run one request; raises as `Target.answer` does, and EngineDead."""
        kind = _KINDS.get(line.url)
        if kind is None:
            raise BadLine("invalid_url", f"url: one of {', '.join(_KINDS)}, not {line.url[:64]!r}", line.custom_id)
        core, arrived_s, request_id = self._engine.core, time.monotonic(), secrets.token_hex(12)
        body = encode_json(line.body)

        def job_of(max_model_len: int) -> Job:
            parsed: ChatRequest | CompletionRequest | ResponsesRequest = parse(body, kind)
            return core.intake.job(parsed, max_model_len)

        try:
            job = await core.admit(len(body), job_of)
            told, status = await _whole(core, job, arrived_s, request_id), 200
        except (RequestRejected, RequestFailed) as error:
            if self._engine.failure is not None:
                raise self._engine.failure from error
            told, status = encode_json(body_of_error(error)), error.status
        return Reply(Response(status_code=status, request_id=request_id, body=msgspec.Raw(told)))


async def _whole(core: Core, job: Job, arrived_s: float, request_id: str) -> bytes:
    """Return the whole answer to a job. Cancel-safe."""
    session = core.open(job, arrived_s)
    try:
        choices = [Piece() for _ in job.choices]
        while events := await session.events():
            for index, piece in events:
                choices[index].add(piece)
    finally:
        session.close()
    shape = shape_of(job, core.tokenizer, request_id)
    shape.num_cached_tokens = session.num_cached_tokens
    return shape.answer(choices)
