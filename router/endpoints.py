"""The table of everything that the HTTP server answers, and the OpenAPI document that is made of it.

1. `ENDPOINTS` has a row for each route; a test holds it against the routes that exist.
2. The types of a row are those that decode bodies and write answers, so that the document cannot say anything else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from router.access import OPEN_PATHS
from router.api import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from router.decisions import DecisionsRequest
from router.embeddings import EmbeddingsRequest
from router.readout_routes import RERANK_PATHS, SCORE_PATHS
from router.response_objects import ResponseObject
from router.response_request import ResponsesRequest
from router.responses import (
    Answer,
    ChatLogprobs,
    CompletionLogprobs,
    DetokenizeAnswer,
    ErrorBody,
    Health,
    Life,
    Load,
    ModelCard,
    ModelList,
    TokenizeAnswer,
    Version,
)
from router.scoring import RerankRequest, ScoreRequest
from router.systemone import SystemOneRequest

OPENAPI: Final = "3.1.0"
# Described by reference only.
_REFERRED: Final[tuple[type[msgspec.Struct], ...]] = (ChatLogprobs, CompletionLogprobs)
_REF: Final = "#/components/schemas/{name}"
_ERRORS: Final = {
    400: "the request is malformed, or asks for something that is not supported; `param` names the field",
    401: "an API key is needed, and none that is known was shown",
    404: "no such model or path",
    408: "the body was not sent in time",
    413: "the body is too large",
    415: "the body is not plain application/json",
    429: "too much is unfinished: come back after `Retry-After` seconds",
    500: "accepted, and could not be completed",
    503: "no workers are ready, or the server is shutting down",
}
_BODY_ERRORS: Final = (400, 401, 404, 408, 413, 415, 429, 500, 503)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One route.

    Attributes:
        path: with parameters in braces.
        body: type that a POST is decoded into; None for a GET.
        answer: type of a success; None where it is no JSON object of a fixed type.
        streams: whether `stream` asks for server-sent events.
        media_type: of a success.
    """

    method: str
    path: str
    tag: str
    summary: str
    body: type[msgspec.Struct] | None = None
    answer: type[msgspec.Struct] | None = None
    streams: bool = False
    media_type: str = "application/json"


ENDPOINTS: Final[tuple[Endpoint, ...]] = (
    Endpoint("POST", "/v1/chat/completions", "generate", "Answer a conversation", ChatRequest, Answer, True),
    Endpoint("POST", "/v1/completions", "generate", "Go on with a text", CompletionRequest, Answer, True),
    Endpoint("POST", "/v1/responses", "generate", "Answer items, statelessly", ResponsesRequest, ResponseObject, True),
    Endpoint("POST", "/v1/embeddings", "read", "Vectors of texts", EmbeddingsRequest),
    Endpoint("POST", "/v1/decisions", "read", "Answer typed questions about a text", DecisionsRequest),
    Endpoint("POST", "/v1/systemone", "read", "Answer typed questions about a state", SystemOneRequest),
    *(Endpoint("POST", path, "read", "How well documents fit a query", ScoreRequest) for path in SCORE_PATHS),
    *(Endpoint("POST", path, "read", "Documents by how well they fit", RerankRequest) for path in RERANK_PATHS),
    Endpoint("POST", "/tokenize", "text", "Token ids of a text or conversation", TokenizeRequest, TokenizeAnswer),
    Endpoint("POST", "/detokenize", "text", "Text of token ids", DetokenizeRequest, DetokenizeAnswer),
    Endpoint("GET", "/v1/models", "server", "Names that are served", answer=ModelList),
    Endpoint("GET", "/v1/models/{model}", "server", "One of them", answer=ModelCard),
    Endpoint("GET", "/health", "server", "Whether requests are taken; 503 if not", answer=Health),
    Endpoint("GET", "/readyz", "server", "The same, under the name that Kubernetes' probes use", answer=Health),
    Endpoint("GET", "/livez", "server", "Whether the process lives: 200 also while it takes no requests", answer=Life),
    Endpoint("GET", "/ping", "server", "The same, for load balancers that ask here", answer=Health),
    Endpoint("POST", "/ping", "server", "The same, for those that post", answer=Health),
    Endpoint("GET", "/load", "server", "How much is unfinished", answer=Load),
    Endpoint("GET", "/version", "server", "Version of the server", answer=Version),
    Endpoint("GET", "/metrics", "server", "Metrics for Prometheus", media_type="text/plain"),
    Endpoint("GET", "/census", "server", "What every worker last reported"),
    Endpoint("GET", "/openapi.json", "server", "This document"),
)


def document(endpoints: Iterable[Endpoint], version: str, needs_key: bool) -> dict[str, Any]:
    """Return the OpenAPI document of these endpoints.

    Args:
        endpoints: rows of the table.
        version: of the server.
        needs_key: whether clients must show a key.
    """
    rows = list(endpoints)
    types: set[type[msgspec.Struct]] = {kind for row in rows for kind in (row.body, row.answer) if kind is not None} | {
        ErrorBody,
        *_REFERRED,
    }
    ordered = sorted(types, key=lambda kind: kind.__name__)
    schemas, components = msgspec.json.schema_components(ordered, ref_template=_REF)
    by_type = dict(zip(ordered, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for row in rows:
        paths.setdefault(row.path, {})[row.method.lower()] = _operation(row, by_type, needs_key)
    found: dict[str, Any] = {
        "openapi": OPENAPI,
        "info": {"title": "Baton", "version": version, "description": "OpenAI's API, served by Baton; see docs/api.md"},
        "paths": paths,
        "components": {"schemas": components},
    }
    if needs_key:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return found


def _operation(row: Endpoint, schemas: dict[type[msgspec.Struct], Any], needs_key: bool) -> dict[str, Any]:
    is_open = row.path in OPEN_PATHS
    codes = _BODY_ERRORS if row.body is not None else (404,) if "{" in row.path else ()
    shown = [code for code in (*codes, *(() if row.body else (401,))) if code != 401 or (needs_key and not is_open)]
    operation: dict[str, Any] = {
        "operationId": f"{row.method.lower()}_{row.path.strip('/').translate(str.maketrans('/.{}', '____'))}",
        "tags": [row.tag],
        "summary": row.summary,
        "responses": {"200": _success(row, schemas)}
        | {str(code): _response(_ERRORS[code], "application/json", schemas[ErrorBody]) for code in sorted(set(shown))},
    }
    if row.answer is Health:
        operation["responses"]["503"] = _response("what is missing", "application/json", schemas[Health])
    if row.body is not None:
        content = {"application/json": {"schema": schemas[row.body]}}
        operation["requestBody"] = {"required": True, "content": content}
    names = [part.strip("{}") for part in row.path.split("/") if part.startswith("{")]
    operation["parameters"] = [
        *({"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names),
        {"name": "X-Request-ID", "in": "header", "required": False, "schema": {"type": "string", "maxLength": 128}},
    ]
    if needs_key and not is_open:
        operation["security"] = [{"key": []}]
    return operation


def _success(row: Endpoint, schemas: dict[type[msgspec.Struct], Any]) -> dict[str, Any]:
    response = _response("success", row.media_type, {} if row.answer is None else schemas[row.answer])
    if row.streams:
        response["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return response


def _response(description: str, media_type: str, schema: Any) -> dict[str, Any]:
    headers = {"X-Request-ID": {"schema": {"type": "string"}}}
    return {"description": description, "headers": headers, "content": {media_type: {"schema": schema}}}
