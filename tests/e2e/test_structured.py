"""Structured output on a real server: it obeys, it is the same in any company, and it survives its worker."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema
import pytest

from bench.schemas import Plan, run
from tests.e2e.client import Streamed, complete, completion, session, stream
from tests.e2e.server import Server, serving, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.ucx, pytest.mark.slow]

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "minItems": 1, "maxItems": 4},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
LONG = r"([a-z]{2,9}, ){100}end\."


def _format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}


def _person(seed: int, **fields: Any) -> dict[str, Any]:
    body = completion(f"Describe person {seed % 5} as JSON:", max_tokens=120, response_format=_format(PERSON))
    return {**body, "temperature": (0.0, 1.0)[seed % 2], "seed": seed, **fields}


def _require_person(text: str) -> None:
    jsonschema.validate(json.loads(text), PERSON)


async def test_streamed_and_whole_alone_and_in_a_batch_it_is_the_same(disaggregated: Server) -> None:
    bodies = [_person(seed) for seed in range(8)]
    free = completion("Once upon a time", max_tokens=40, ignore_eos=True)
    async with session() as http:
        alone = [await complete(http, disaggregated.url, body) for body in bodies]
        free_alone = await complete(http, disaggregated.url, free)
        streams = [stream(http, disaggregated.url, body) for body in (*bodies, free)]
        together: list[Streamed] = await asyncio.gather(*streams)
    for answer, streamed in zip(alone, together, strict=False):
        _require_person(answer["text"])
        assert answer["finish_reason"] == "stop" and streamed.is_done and streamed.finish_reason == "stop"
        assert streamed.text == answer["text"] and streamed.token_ids == answer["token_ids"]
    assert together[-1].token_ids == free_alone["token_ids"]
    assert len({answer["text"] for answer in alone}) > 4


async def test_colocated_workers_and_separate_ones_agree(disaggregated: Server, colocated: Server) -> None:
    async with session() as http:
        for seed in (0, 1):
            separate = await complete(http, disaggregated.url, _person(seed))
            one = await complete(http, colocated.url, _person(seed))
            assert one["token_ids"] == separate["token_ids"]


WAYS: list[tuple[dict[str, Any], str]] = [
    ({"structured_outputs": {"choice": ["strong yes", "yes", "no"]}}, "strong yes|yes|no"),
    ({"structured_outputs": {"regex": r"\d{4}-\d{2}-\d{2}"}}, r"\d{4}-\d{2}-\d{2}"),
    ({"guided_regex": "[A-Z][a-z]{3,8}"}, "[A-Z][a-z]{3,8}"),
    ({"guided_grammar": 'root ::= ("ab" | "c")'}, "ab|c"),
    ({"structured_outputs": {"grammar": 'start: "x"+ "!" NUMBER\nNUMBER: /[0-9]{1,3}/'}}, "x+![0-9]{1,3}"),
    ({"response_format": {"type": "json_object"}, "max_tokens": 100}, r"\{.*"),
    ({"guided_regex": "(ha){9}", "ignore_eos": True, "min_tokens": 50, "repetition_penalty": 1.5}, "(ha){9}"),
]


@pytest.mark.parametrize(("fields", "pattern"), WAYS)
async def test_every_way_obeys(disaggregated: Server, fields: dict[str, Any], pattern: str) -> None:
    async with session() as http:
        for temperature in (0.0, 1.0):
            body = completion("The answer is", max_tokens=60, seed=5) | {"temperature": temperature} | fields
            answer = await complete(http, disaggregated.url, body)
            assert re.fullmatch(pattern, answer["text"], re.DOTALL), answer["text"]
            if "json_object" not in str(fields):
                assert answer["finish_reason"] == "stop"


async def test_cut_and_stopped_outputs_say_so(disaggregated: Server) -> None:
    async with session() as http:
        cut = await complete(http, disaggregated.url, _person(0, max_tokens=5))
        stopped = await complete(http, disaggregated.url, _person(0, stop='"age"'))
    assert cut["finish_reason"] == "length" and cut["usage"]["completion_tokens"] == 5
    assert stopped["finish_reason"] == "stop" and stopped["text"].rstrip().endswith(",")


async def test_hostile_schemas_are_refused_and_disturb_no_stream(disaggregated: Server) -> None:
    body = completion("Once upon a time", max_tokens=120, ignore_eos=True)
    hostile = ["((a{100}){100}){100}b", "(a{1000}){1000}", "(((", "x{99999999999}"]
    pids = {worker["pid"] for worker in disaggregated.workers()}
    async with session() as http:
        expected = await complete(http, disaggregated.url, body)
        beside = asyncio.create_task(stream(http, disaggregated.url, body))
        for pattern in hostile:
            asked = completion("x", guided_regex=pattern)
            async with http.post(f"{disaggregated.url}/v1/completions", json=asked) as response:
                error = (await response.json())["error"]
                assert response.status == 400 and error["param"] == "guided_regex", (pattern, error)
        deep: dict[str, Any] = {}
        for _ in range(150):
            deep = {"type": "object", "properties": {"a": deep}}
        asked = completion("x", response_format=_format(deep))
        async with http.post(f"{disaggregated.url}/v1/completions", json=asked) as response:
            assert response.status == 400, await response.text()
        assert (await beside).token_ids == expected["token_ids"]
    assert {worker["pid"] for worker in disaggregated.workers()} == pids


NAMES = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<file_sep>"]
CONST = {"type": "object", "properties": {"<|im_start|>": {"enum": NAMES}}, "required": ["<|im_start|>"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {**CONST, "additionalProperties": False}}}
SPELLED: list[tuple[dict[str, Any], str]] = [
    ({"structured_outputs": {"choice": [f"a{name}b" for name in NAMES]}}, r"a<[a-z_|]+>b"),
    ({"structured_outputs": {"regex": r"x<\|im_end\|>y"}}, r"x<\|im_end\|>y"),
    ({"structured_outputs": {"grammar": 'start: "<|im_start|>" /[ab]<file_sep>/'}}, r"<\|im_start\|>[ab]<file_sep>"),
    (
        {"response_format": _format({**CONST, "additionalProperties": False})},
        r'\{ ?"<\|im_start\|>": ?"<[a-z_|]+>" ?\}',
    ),
]


@pytest.mark.parametrize(("fields", "pattern"), SPELLED)
async def test_the_names_of_special_tokens_are_text_like_any_other(
    disaggregated: Server, fields: dict[str, Any], pattern: str
) -> None:
    body = completion("Give JSON:", max_tokens=60, seed=3) | fields
    async with session() as http:
        answer = await complete(http, disaggregated.url, body)
        streamed = await stream(http, disaggregated.url, body)
        cut = await complete(http, disaggregated.url, {**body, "stop": ["|>", "_sep>"]})
    assert re.fullmatch(pattern, answer["text"]) and answer["finish_reason"] == "stop", answer["text"]
    assert streamed.text == answer["text"] and not set(answer["token_ids"]) & set(range(17)), "ordinary tokens spell it"
    assert cut["finish_reason"] == "stop" and answer["text"].startswith(cut["text"]) and ">" not in cut["text"]


async def test_a_call_s_arguments_may_hold_the_name_of_a_special_token(disaggregated: Server) -> None:
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "Call f."}],
        "temperature": 0,
        "max_tokens": 90,
    }
    asked = {**body, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    async with session() as http, http.post(f"{disaggregated.url}/v1/chat/completions", json=asked) as response:
        found = await response.json()
    assert response.status == 200, found
    (call,) = found["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["<|im_start|>"] in NAMES


AMBIGUOUS = 'start: /[a-z]{150}/ s\ns: s s | "a" | "b" | s "a" s | "a" s "b"'


@pytest.mark.parametrize("mode", ["disaggregated", "colocated"])
async def test_a_grammar_that_becomes_too_dear_ends_its_own_request_once(
    mode: str, request: pytest.FixtureRequest
) -> None:
    server: Server = request.getfixturevalue(mode)
    hostile = completion("x", max_tokens=1500, temperature=2.0, seed=3, ignore_eos=True, guided_grammar=AMBIGUOUS)
    before, pids = server.metrics(), {worker["pid"] for worker in server.workers()}
    async with session() as http:
        expected = await complete(http, server.url, _person(1))
        url = f"{server.url}/v1/completions"
        asked = [http.post(url, json=body) for body in (hostile, {**hostile, "stream": True})]
        whole, streamed = await asyncio.gather(*(_read(one) for one in asked))
        beside = await complete(http, server.url, _person(1))
    error = json.loads(whole[1])["error"]
    assert (whole[0], error["type"], error["param"]) == (400, "invalid_request_error", "guided_grammar"), whole
    events = [line for line in streamed[1].splitlines() if line.startswith("data: ")]
    assert streamed[0] == 200 and "[DONE]" not in streamed[1]
    assert json.loads(events[-1][6:])["error"] == error and len(events) > 20, "what obeyed was streamed"
    assert beside["token_ids"] == expected["token_ids"]
    grown = {
        name: server.metrics()[name] - before[name] for name in before if "failed" in name or "grammar_fail" in name
    }
    assert {name: number for name, number in grown.items() if number} == {
        "baton_grammar_failures_total": 2,
        'baton_request_failed_total{reason="grammar"}': 2,
    }
    assert {worker["pid"] for worker in server.workers()} == pids


async def _read(asking: Any) -> tuple[int, str]:
    async with asking as response:
        return response.status, await response.text()


async def test_random_schemas_are_obeyed(disaggregated: Server) -> None:
    verdicts = await run(Plan(disaggregated.url, "smollm2", number=10, concurrency=5, max_tokens=250))
    assert not verdicts.faults, str(verdicts)
    assert verdicts.num_valid >= 7, str(verdicts)


async def test_a_constrained_stream_survives_its_decode_worker_token_for_token(
    cache_dir: Path, gguf: Path, tmp_path: Path
) -> None:
    body = completion("All the words:", max_tokens=600, temperature=1.0, seed=11, guided_regex=LONG)
    with serving("smollm2", tmp_path, cache_dir, "--decode", "2") as server:
        async with session() as http:
            expected = await complete(http, server.url, body)
            assert expected["finish_reason"] == "stop" and re.fullmatch(LONG, expected["text"])
            wait_until(lambda: all(not w["num_running"] for w in server.workers()), 10.0, "quiet")
            result = await _stream_with_a_kill(http, server, body)
        assert result.is_done and result.token_ids == expected["token_ids"] and result.text == expected["text"]
        assert result.finish_reason == "stop"


async def _stream_with_a_kill(http: aiohttp.ClientSession, server: Server, body: dict[str, Any]) -> Streamed:
    """Read a stream whose decode worker is killed once some tokens of it are there."""
    result, was_struck = Streamed(), False
    async with http.post(f"{server.url}/v1/completions", json={**body, "stream": True}) as response:
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            if (data := line[6:].strip()) == b"[DONE]":
                result.is_done = True
                continue
            result.chunks.append(json.loads(data))
            if len(result.token_ids) >= 30 and not was_struck:
                was_struck = True
                await asyncio.to_thread(_kill_busy_decode, server)
    assert was_struck
    return result


def _kill_busy_decode(server: Server) -> None:
    def busy() -> int | None:
        pids = [w["pid"] for w in server.workers() if w["role"] == "decode" and w["num_running"]]
        return pids[0] if pids else None

    os.kill(wait_until(busy, 5.0, "a busy decode worker"), signal.SIGKILL)
