"""The benchmark of decisions, on a server that only counts."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from bench import decisions
from bench.decisions import Plan, Round, measure, questions, report


class CountingServer:
    """Answers as Baton does; tells of computed tokens only some looks later, as heartbeats do."""

    def __init__(self) -> None:
        self.num_prompt_tokens = self.num_computed = self.num_told = 0
        self.bodies: list[dict[str, Any]] = []

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/v1/decisions", self._decide)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/v1/chat/completions", self._chat)
        return app

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m"}]})

    async def _tokenize(self, _: web.Request) -> web.Response:
        return web.json_response({"count": 30})

    async def _metrics(self, _: web.Request) -> web.Response:
        text = (
            f'baton_prompt_tokens_total{{model_name="m"}} {float(self.num_prompt_tokens)}\n'
            f'baton_prefill_computed_tokens_total{{model_name="m"}} {float(self.num_told)}\n'
        )
        self.num_told = self.num_computed
        return web.Response(text=text)

    async def _decide(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        num_questions = len(body["questions"])
        self.num_prompt_tokens += 100 * num_questions
        self.num_computed += 90 + 10 * num_questions
        return web.json_response({"answers": [{}] * num_questions})

    async def _chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response({"usage": {"completion_tokens": body["max_tokens"]}})


async def test_tokens_are_those_of_the_round_and_every_state_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "COUNT_PAUSE_S", 0.0)
    counting = CountingServer()
    async with TestServer(counting.app()) as server:
        rounds = await measure(Plan(20, 50, 2), f"http://127.0.0.1:{server.port}", "")
    assert [(one.num_naive_tokens, one.num_json_tokens) for one in rounds] == [(2000, 30), (2000, 30)]
    assert [one.num_computed_tokens for one in rounds] == [290, 290], "what a further question cost is not counted"
    states = [body["input"] for body in counting.bodies if len(body["questions"]) == 20]
    assert len(set(states)) == 2


def test_the_report_compares_with_the_naive_way_and_with_json() -> None:
    found = report(
        Plan(40, 2000, 2), [Round(2.0, 5.0, 0.1, 80_000, 2800, 390), Round(1.0, 3.0, 0.2, 80_000, 2800, 390)]
    )
    assert "0.035 of the naive way" in found and "1.500 s (1.000 to 2.000)" in found and "2.75" in found


def test_questions_differ() -> None:
    asked = questions(400)
    assert len({one["instructions"] for one in asked}) == len({one["name"] for one in asked}) == 400
