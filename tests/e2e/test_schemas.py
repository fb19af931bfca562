"""Schemas that other servers got wrong, on a real one: by every way to ask, each answer is held against its schema."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from typing import Any

import aiohttp
import jsonschema
import pytest

from tests.e2e.client import complete, completion, session
from tests.e2e.server import Server

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.ucx, pytest.mark.slow]

R = {"enum": ["r"]}
CHAT = "/v1/chat/completions"


def _object(prop: Any, name: str = "x", more: dict[str, Any] | None = None) -> dict[str, Any]:
    kept = {"type": "object", "properties": {name: prop}, "required": [name], "additionalProperties": False}
    return {**kept, **(more or {})}


SCHEMAS: list[dict[str, Any]] = [
    *(_object({"$ref": f"#/$defs/{name}"}, name, {"$defs": {name: R}}) for name in ("default", "enum", "const")),
    _object({"$ref": "#/$defs/c"}, more={"$id": "https://example.com/s.json", "$defs": {"c": R}}),
    _object({"$ref": "#c"}, more={"$defs": {"k": {"$anchor": "c", **R}}}),
    _object({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}),
    _object({"type": "number", "exclusiveMaximum": 0, "minimum": -0.5}),
    _object({"const": {"properties": {"x": 1}}}),
    _object({"enum": [1152921504606846976]}),
    _object({"type": "string", "format": "int64", "pattern": r"^\d{2}$"}),
    _object({"type": "array", "uniqueItems": False, "maxItems": 2, "items": {"type": "boolean"}}),
    _object({"type": "number", "multipleOf": 0.5, "minimum": 0.25, "maximum": 0.75}),
]  # fmt: skip


def _ways(schema: dict[str, Any]) -> list[dict[str, Any]]:
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    return [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        {"response_format": {"type": "json_object", "schema": schema}},
        {"structured_outputs": {"json": schema, "disable_additional_properties": True}},
        {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False},
        {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "f"}}},
    ]


async def _answered(http: aiohttp.ClientSession, server: Server, fields: dict[str, Any]) -> dict[str, Any]:
    body = {"model": "smollm2", "messages": [{"role": "user", "content": "Give JSON."}], "max_tokens": 120, **fields}
    async with http.post(server.url + CHAT, json=body) as response:
        assert response.status == 200, (fields, await response.text())
        choice: dict[str, Any] = (await response.json())["choices"][0]
        return choice


async def test_every_way_obeys_the_same_schemas(disaggregated: Server) -> None:
    async with session() as http:
        asked = [(schema, way, temperature) for schema in SCHEMAS for way in _ways(schema) for temperature in (0, 1)]
        choices = await asyncio.gather(
            *(_answered(http, disaggregated, {**way, "temperature": t, "seed": 3}) for _, way, t in asked)
        )
    num_whole = 0
    for (schema, way, _), choice in zip(asked, choices, strict=True):
        if choice["finish_reason"] == "length":
            continue
        num_whole += 1
        message = choice["message"]
        text = message["tool_calls"][0]["function"]["arguments"] if "tools" in way else message["content"]
        jsonschema.validate(json.loads(text), schema)
    assert num_whole > 0.9 * len(asked)


async def test_a_cut_call_and_an_odd_multiple(disaggregated: Server) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": _object({"type": "string", "maxLength": 10})}}
    third = _object({"type": "number", "multipleOf": 0.1, "minimum": 0.25, "maximum": 0.35})
    async with session() as http:
        cut = await _answered(http, disaggregated, {"tools": [tool], "tool_choice": "required", "stop": ['"x']})
        assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", '"x')
        found = await _answered(http, disaggregated, _ways(third)[0])
        assert json.loads(found["message"]["content"]) == {"x": 0.3}


async def test_an_echo_fills_the_context(disaggregated: Server) -> None:
    async with session() as http:
        models = await (await http.get(f"{disaggregated.url}/v1/models")).json()
        num_tokens = models["data"][0]["max_model_len"]
        asked = completion([5 + i % 100 for i in range(num_tokens)], max_tokens=0, echo=True, logprobs=0)
        answer = await complete(http, disaggregated.url, asked)
        assert len(answer["logprobs"]["token_logprobs"]) == num_tokens
        async with http.post(f"{disaggregated.url}/v1/completions", json={**asked, "max_tokens": 1}) as response:
            assert response.status == 400


async def test_a_good_schema_survives_children_that_are_killed(disaggregated: Server) -> None:
    properties = {f"p{i}_{time.time_ns()}": {"type": "string", "maxLength": 3} for i in range(700)}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    body = completion("x", max_tokens=4, guided_json=schema)
    async with session() as http:
        await complete(http, disaggregated.url, completion("x", max_tokens=1, guided_regex="a"))
        asked = asyncio.create_task(http.post(f"{disaggregated.url}/v1/completions", json=body))
        until_s = time.monotonic() + 3.0
        while not asked.done() and time.monotonic() < until_s:
            for pid in _grammar_children(disaggregated):
                os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.02)
        async with await asked as response:
            assert response.status in (200, 503), await response.text()
            wait_s = float(response.headers.get("Retry-After", 0))
        await asyncio.sleep(wait_s)
        assert (await complete(http, disaggregated.url, body))["finish_reason"]


def _grammar_children(server: Server) -> list[int]:
    found = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                line = file.read()
            with open(f"/proc/{pid}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if b"router.grammar_child" in line and parent in _family(server):
            found.append(pid)
    return found


def _family(server: Server) -> set[int]:
    return {server.process.pid, *server.children().values()}
