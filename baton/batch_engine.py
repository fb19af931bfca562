"""The engine in this process as the target of a batch: bodies take the way that they take over HTTP."""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from baton.batch import BatchLine, Reply, Response, endpoint_of
from baton.in_process import InProcess
from protocol.errors import RequestFailed, RequestRejected
from protocol.request import FinishReason
from router.api import ChatRequest, CompletionRequest, parse
from router.core import Core
from router.deciding import Inquiry, decide
from router.decisions import DecisionsRequest, answer, inquiry_of
from router.embeddings import EmbeddingsRequest, embed, parts_of
from router.intake import Job
from router.prompt_logprobs import read_prompts
from router.response_request import ResponsesRequest
from router.response_shape import shape_of
from router.responses import body_of_error, encode_json
from router.text import Piece, Whole

Kind = type[ChatRequest] | type[CompletionRequest] | type[ResponsesRequest]

_KINDS: Final[dict[str, Kind]] = {
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
        endpoint = endpoint_of(line, (*_KINDS, *_READ))
        kind, read = _KINDS.get(endpoint), _READ.get(endpoint)
        core, request_id, body = self._engine.core, secrets.token_hex(12), encode_json(line.body)
        try:
            if read is not None:
                told = await read(core, body)
            elif kind is not None:
                told = await _whole(core, kind, body, request_id)
            status = 200
        except (RequestRejected, RequestFailed) as error:
            if self._engine.failure is not None:
                raise self._engine.failure from error
            told, status = encode_json(body_of_error(error)), error.status
        return Reply(Response(status_code=status, request_id=request_id, body=msgspec.Raw(told)))


async def _whole(core: Core, kind: Kind, body: bytes, request_id: str) -> bytes:
    """Return the whole answer to a body. Cancel-safe; raises RequestRejected, RequestFailed."""
    arrived_s = time.monotonic()

    def job_of(max_model_len: int) -> Job:
        parsed: ChatRequest | CompletionRequest | ResponsesRequest = parse(body, kind)
        return core.intake.job(parsed, max_model_len)

    with core.admission():
        job = await core.admit(len(body), job_of)
    shape = shape_of(job, core.tokenizer, request_id, await read_prompts(core, job, arrived_s))
    if job.is_prompt_only:
        pieces = [Piece(finish_reason=FinishReason.LENGTH) for _ in job.choices]
        return b"".join(await core.slices.run(shape.parts(pieces)))
    session = core.open(job, arrived_s)
    try:
        choices = [Whole() for _ in job.choices]
        while events := await session.events():
            for index, piece in events:
                choices[index].add(piece)
    finally:
        session.close()
    shape.num_cached_tokens = session.num_cached_tokens
    return b"".join(await core.slices.run(shape.parts([choice.piece() for choice in choices])))


async def _decide(core: Core, body: bytes) -> bytes:
    """Return the answer to a body of /v1/decisions; as `_whole`."""
    parsed: list[DecisionsRequest] = []

    def make() -> Inquiry:
        parsed.append(core.intake.named(parse(body, DecisionsRequest)))
        return inquiry_of(parsed[0])

    verdict = await decide(core, len(body), make, time.monotonic())
    return answer(parsed[0], verdict)


async def _embed(core: Core, body: bytes) -> bytes:
    """Return the answer to a body of /v1/embeddings; as `_whole`."""
    found = await embed(core, len(body), lambda: parse(body, EmbeddingsRequest), str, time.monotonic())
    return b"".join(await core.slices.run(parts_of(found)))


_READ: Final[dict[str, Callable[[Core, bytes], Awaitable[bytes]]]] = {
    "/v1/decisions": _decide,
    "/v1/embeddings": _embed,
}
