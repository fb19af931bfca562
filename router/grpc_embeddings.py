"""Embed over gRPC: a message becomes the body that it is over HTTP, the vectors become a message."""

from __future__ import annotations

from typing import Any, Final

from protocol.errors import InvalidRequest
from protocol.readout import floats_of
from router.embeddings import Embedded
from router.rpc import baton_v1_pb2 as pb

_OPTIONAL: Final = (
    "dimensions",
    "truncate_prompt_tokens",
    "normalize",
    "add_special_tokens",
    "cache_salt",
    "user",
)


def embeddings_body(request: pb.EmbedRequest, default_model: str) -> dict[str, Any]:
    """Return the body of /v1/embeddings that says the same. Raises InvalidRequest where an input has no content."""
    body: dict[str, Any] = {"model": request.model or default_model}
    body["input"] = [_input(one, i) for i, one in enumerate(request.input)]
    return body | {name: getattr(request, name) for name in _OPTIONAL if request.HasField(name)}


def embed_response(found: Embedded) -> pb.EmbedResponse:
    """Return the message of the vectors."""
    usage = pb.EmbedUsage(prompt_tokens=found.num_tokens, total_tokens=found.num_tokens)
    data = [pb.Embedding(index=i, embedding=floats_of(vector)) for i, vector in enumerate(found.vectors)]
    return pb.EmbedResponse(model=found.request.model, data=data, usage=usage)


def _input(one: pb.Prompt, i: int) -> str | list[int]:
    kind = one.WhichOneof("content")
    if kind is None:
        raise InvalidRequest(f"input[{i}]: must be text or token ids", "input")
    return one.text if kind == "text" else list(one.token_ids.ids)
