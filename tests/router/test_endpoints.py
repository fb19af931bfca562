"""The OpenAPI document says what is served: every route, and bodies as they are decoded."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest

from router.endpoints import ENDPOINTS
from router.tokenizer import Tokenizer
from tests.router.workers import CHAT, HI, Stage, staged


async def document(stage: Stage) -> dict[str, Any]:
    """Fetch the document."""
    async with stage.http.get(f"{stage.url}/openapi.json") as response:
        assert response.status == 200 and response.content_type == "application/json"
        found: dict[str, Any] = await response.json()
        return found


async def test_every_route_is_in_the_document_and_nothing_else(stage: Stage) -> None:
    routes = {
        (route.method, re.sub(r":[^}]*}", "}", route.resource.canonical))
        for route in stage.router._http.app().router.routes()
        # Each has a twin with a slash at its end, which is forgiven and not told.
        if route.resource is not None and route.method != "HEAD" and not route.resource.canonical.endswith("/")
    }
    found = await document(stage)
    told = {(method.upper(), path) for path, methods in found["paths"].items() for method in methods}
    assert told == routes == {(row.method, row.path) for row in ENDPOINTS}
    ids = [operation["operationId"] for methods in found["paths"].values() for operation in methods.values()]
    assert len(set(ids)) == len(ids)


async def test_every_schema_is_one_and_refers_to_what_is_there(stage: Stage) -> None:
    found = await document(stage)
    assert found["openapi"] == "3.1.0"
    schemas = found["components"]["schemas"]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    named = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(found)))
    assert named <= set(schemas) and {"ChatRequest", "ResponsesRequest", "Answer", "ErrorBody"} <= named


@pytest.mark.parametrize(
    ("fields", "is_valid"),
    [
        ({}, True),
        ({"temperature": 0.5, "stop": ["x"], "tools": None, "tool_choice": "auto"}, True),
        ({"temperature": "hot"}, False),
        ({"messages": []}, False),
        ({"max_tokens": 0}, False),
        ({"n": 129}, False),
        ({"tool_choice": "any"}, False),
    ],
)
async def test_the_document_and_the_decoder_agree(stage: Stage, fields: dict[str, Any], is_valid: bool) -> None:
    await stage.pair()
    found = await document(stage)
    schema = {"$ref": "#/components/schemas/ChatRequest", "components": found["components"]}
    body = {**HI, **fields, "model": "m"}
    assert jsonschema.Draft202012Validator(schema).is_valid(body) is is_valid
    if not is_valid:
        assert (await stage.post(CHAT, body))[0] == 400


async def test_keys_are_told(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer, api_keys=("k",)) as stage:
        found = await document(stage)
    assert found["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    assert (
        found["paths"][CHAT]["post"]["security"] == [{"key": []}] and "security" not in found["paths"]["/health"]["get"]
    )


async def test_what_balancers_ask(stage: Stage) -> None:
    for method in ("GET", "POST"):
        async with stage.http.request(method, f"{stage.url}/ping") as response:
            assert response.status == 503
    await stage.pair()
    for method in ("GET", "POST", "HEAD"):
        async with stage.http.request(method, f"{stage.url}/ping") as response:
            assert response.status == 200
    async with stage.http.get(f"{stage.url}/load") as response:
        assert await response.json() == {"server_load": 0, "running": 0, "waiting": 0}
