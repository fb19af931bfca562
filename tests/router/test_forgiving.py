"""What is forgiven: a model that is not named, a slash at a path's end, a byte order mark; and names nearly right."""

from __future__ import annotations

import asyncio
import codecs
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from protocol.errors import ConfigError, UnknownModel
from router.api import ChatRequest, CompletionRequest, parse
from router.decisions import DecisionsRequest
from router.embeddings import EmbeddingsRequest
from router.intake import Intake
from router.response_request import ResponsesRequest
from router.tokenizer import Tokenizer
from tests.router.workers import CHAT, HI, Stage, answer, config, staged

QUESTION = {"type": "predicate", "instructions": "yes?"}
UNNAMED: list[tuple[type[msgspec.Struct], dict[str, Any]]] = [
    (ChatRequest, {"messages": HI["messages"]}),
    (CompletionRequest, {"prompt": "abc"}),
    (ResponsesRequest, {"input": "abc"}),
    (EmbeddingsRequest, {"input": "abc"}),
    (DecisionsRequest, {"input": "abc", "questions": [QUESTION]}),
]


@pytest.mark.parametrize(("kind", "fields"), UNNAMED, ids=lambda value: getattr(value, "__name__", ""))
def test_a_body_need_not_name_the_model(tokenizer: Tokenizer, kind: type[msgspec.Struct], fields: Any) -> None:
    intake = Intake(tokenizer, ("Org/First", "second"))
    for given, named in (({}, "Org/First"), ({"model": None}, "Org/First"), ({"model": ""}, "Org/First")):
        assert getattr(intake.named(parse(json.dumps({**fields, **given}).encode(), kind)), "model") == named  # noqa: B009
    second = parse(json.dumps({**fields, "model": "second"}).encode(), kind)
    assert intake.named(second) is second
    for wrong, meant in (("org/frist", "'Org/First'"), ("Second", "'second'"), ("secnod", "'second'")):
        with pytest.raises(UnknownModel, match=f"served: Org/First, second; did you mean {meant}") as caught:
            intake.named(parse(json.dumps({**fields, "model": wrong}).encode(), kind))
        assert caught.value.param == "model"
    with pytest.raises(UnknownModel) as caught:
        intake.named(parse(json.dumps({**fields, "model": "gpt-4o"}).encode(), kind))
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("path", [CHAT, f"{CHAT}/"])
async def test_a_whole_answer_names_the_model_that_was_not_named(stage: Stage, path: str) -> None:
    prefill, decode = await stage.pair()
    body = codecs.BOM_UTF8 + json.dumps({"messages": HI["messages"], "max_tokens": 4}).encode()
    headers = {"Content-Type": "application/json"}
    asked = asyncio.create_task(stage.http.post(f"{stage.url}{path}", data=body, headers=headers))
    await answer(prefill, decode, "hi")
    async with await asked as response:
        found = await response.json()
    assert found["model"] == "m" and found["choices"][0]["message"]["content"] == "hi"


async def test_every_path_may_end_in_a_slash_and_needs_the_same_key(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer, api_keys=("k",)) as stage:
        await stage.pair()
        app = stage.router._http.app()
        paths = {route.resource.canonical: route.method for route in app.router.routes() if route.resource is not None}
        for path in [path for path in paths if not path.endswith("/") and "{" not in path]:
            async with stage.http.request(paths[path], f"{stage.url}{path}") as plain:
                async with stage.http.request(paths[path], f"{stage.url}{path}/") as slashed:
                    assert (slashed.status, slashed.method) == (plain.status, plain.method), path
        for path, status in (("/v1/models/m/", 200), ("/v1/models/", 200), (f"{CHAT}//", 404), ("/nothing/", 404)):
            async with stage.http.get(f"{stage.url}{path}", headers={"Authorization": "Bearer k"}) as response:
                assert response.status == status, path


def test_a_mark_is_passed_over_once() -> None:
    body = b'{"model": "m", "prompt": "x"}'
    assert parse(codecs.BOM_UTF8 + body, CompletionRequest) == parse(body, CompletionRequest)


async def test_keys_origins_and_limits_change_while_a_router_runs(tokenizer: Tokenizer, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_bytes(codecs.BOM_UTF8 + b"ka alice\n")
    async with staged(tokenizer) as stage:
        await stage.pair()

        async def status_of(key: str) -> int:
            async with stage.http.get(f"{stage.url}/v1/models", headers={"Authorization": f"Bearer {key}"}) as response:
                return response.status

        assert await status_of("") == 200
        stage.router.reload(config(api_keys=("kb",), api_key_files=(str(keys),), max_num_requests=1, max_body_bytes=1))
        assert [await status_of(key) for key in ("", "ka", "kb")] == [401, 200, 200]
        assert stage.router.core.max_num_requests == 1
        running = asyncio.create_task(stage.post(CHAT, HI, headers={"Authorization": "Bearer ka"}))
        await stage.until(lambda: stage.router.switchboard.num_requests == 1)
        status, body, _ = await stage.post(CHAT, HI, headers={"Authorization": "Bearer ka"})
        assert status == 429 and "the limit is 1" in body["error"]["message"], "a body of more than a byte was read"
        with pytest.raises(ConfigError, match="cannot read"):
            stage.router.reload(config(api_key_files=(str(tmp_path / "none"),), max_num_requests=9))
        assert await status_of("kb") == 200 and stage.router.core.max_num_requests == 1, "refused as a whole"
        assert not running.done()
        running.cancel()
