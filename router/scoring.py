"""`/v1/score` and `/v1/rerank` in the shapes of vLLM, Jina and Cohere: how well documents fit a query.

A language model is asked whether a document is a good answer to a query; the score is the probability of Yes against
No. It orders documents by what the model thinks of them; it is no trained reranker's score.

1. score: one query and some documents, or as many queries as documents, pair by pair. 2. rerank: one query; the results
are sorted, best first, and cut to `top_n`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from protocol.errors import InvalidRequest
from router.api import Short
from router.deciding import AskedState, Inquiry, Verdict
from router.question_prompts import Asked
from router.questions import relevance
from router.responses import encode_json

MAX_DOCUMENTS: Final = 1000
Texts = str | Annotated[list[str], Meta(min_length=1, max_length=MAX_DOCUMENTS)]


class ScoreRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of /v1/score: `queries` and `documents`, or `text_1` and `text_2`, as older clients call them."""

    model: Annotated[str, Meta(max_length=1024)] | None = None
    queries: Texts | None = None
    documents: Texts | None = None
    text_1: Texts | None = None
    text_2: Texts | None = None
    cache_salt: Short | None = None


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """A document with its text in a field."""

    text: str


class RerankRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of /v1/rerank. `top_n` 0 is all."""

    model: Annotated[str, Meta(max_length=1024)] | None = None
    query: str
    documents: Annotated[list[str | Document], Meta(min_length=1, max_length=MAX_DOCUMENTS)]
    top_n: Annotated[int, Meta(ge=0)] | None = None
    return_documents: bool | None = None
    cache_salt: Short | None = None


def inquiry_of(request: ScoreRequest | RerankRequest) -> Inquiry:
    """Return what is asked.

    Raises:
        InvalidRequest: queries and documents are missing or do not fit each other.
    """
    if isinstance(request, RerankRequest):
        documents = [d if isinstance(d, str) else d.text for d in request.documents]
        states = [_state(request.query, documents, 0, "query", "documents")]
        return Inquiry(request.model, tuple(states), request.cache_salt or "")
    queries, query_param = _either(request.queries, request.text_1, "queries", "text_1")
    texts, text_param = _either(request.documents, request.text_2, "documents", "text_2")
    if len(queries) == 1:
        states = [_state(queries[0], texts, 0, query_param, text_param)]
    elif len(queries) == len(texts):
        pairs = enumerate(zip(queries, texts, strict=True))
        states = [_state(query, [text], i, f"{query_param}[{i}]", text_param) for i, (query, text) in pairs]
    else:
        raise InvalidRequest(
            f"{query_param}: give one, or as many as there are {text_param} ({len(texts)}), not {len(queries)}",
            query_param,
        )
    return Inquiry(request.model, tuple(states), request.cache_salt or "")


def scores(request: ScoreRequest, verdict: Verdict, model: str) -> bytes:
    """Return the body of the response of /v1/score; `model` is the name that is served."""
    data = [{"index": i, "object": "score", "score": found.probabilities[0]} for i, found in enumerate(verdict.answers)]
    return encode_json(
        {
            "id": f"score-{secrets.token_hex(12)}",
            "object": "list",
            "created": int(time.time()),
            "model": request.model or model,
            "data": data,
            "usage": _usage(verdict),
        }
    )


def ranking(request: RerankRequest, verdict: Verdict, model: str) -> bytes:
    """Return the body of the response of /v1/rerank; documents of equal score stay in their order."""
    found = [answer.probabilities[0] for answer in verdict.answers]
    order = sorted(range(len(found)), key=lambda i: -found[i])[: request.top_n or None]
    results: list[dict[str, Any]] = []
    for i in order:
        document = request.documents[i]
        text = document if isinstance(document, str) else document.text
        shown = {} if request.return_documents is False else {"document": {"text": text}}
        results.append({"index": i, "relevance_score": found[i], **shown})
    return encode_json(
        {
            "id": f"rerank-{secrets.token_hex(12)}",
            "model": request.model or model,
            "results": results,
            "usage": _usage(verdict),
        }
    )


def _usage(verdict: Verdict) -> dict[str, Any]:
    usage = verdict.usage
    return {
        "prompt_tokens": usage.num_input_tokens,
        "total_tokens": usage.num_input_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
    }


def _state(query: str, documents: Sequence[str], first: int, query_param: str, param: str) -> AskedState:
    asked = tuple(Asked(relevance(text), f"{param}[{first + i}]") for i, text in enumerate(documents))
    return AskedState(f"Query: {query}" if query.strip() else "", asked, query_param)


def _either(new: Texts | None, old: Texts | None, new_name: str, old_name: str) -> tuple[list[str], str]:
    if (new is None) == (old is None):
        raise InvalidRequest(f"{new_name}: give either {new_name} or {old_name}", new_name)
    texts, name = (new, new_name) if new is not None else (old, old_name)
    assert texts is not None
    return ([texts] if isinstance(texts, str) else texts), name
