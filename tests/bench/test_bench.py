"""The load generator against a server with known timing, and its figures against hand-computed ones."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from bench.client import Sample, run_completion
from bench.measures import summarise
from bench.workloads import Target, closed, new_session

GAP_S = 0.03


async def _complete(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    if len(body["prompt"]) == 7:
        return web.json_response({"error": {"message": "no sevens"}}, status=400)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for i in range(body["max_tokens"]):
        await asyncio.sleep(GAP_S)
        if len(body["prompt"]) == 9 and i == 2:
            await response.write(b'data: {"error": {"message": "gone"}}\n\n')
            return response
        await response.write(b'data: {"choices": [{"text": " word"}]}\n\n')
    usage = {"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}
    await response.write(b"data: " + json.dumps(usage).encode() + b"\n\n")
    if len(body["prompt"]) != 11:
        await response.write(b"data: [DONE]\n\n")
    return response


@pytest.fixture
async def url() -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/v1/completions", _complete)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def test_a_stream_is_timed_chunk_by_chunk(url: str) -> None:
    async with new_session() as http:
        sample = await run_completion(http, url, Target(url, "m", 1).body(5, 6))
    assert sample.error is None and sample.num_output_tokens == 6 and len(sample.gaps_s) == 5
    assert sample.ttft_s is not None and sample.tpot_s is not None
    assert GAP_S * 0.8 < sample.ttft_s < GAP_S * 8
    assert GAP_S * 0.8 < sample.tpot_s < GAP_S * 4


@pytest.mark.parametrize(("length", "words"), [(7, "no sevens"), (9, "gone"), (11, "without")])
async def test_every_failure_is_a_sample_with_its_reason(url: str, length: int, words: str) -> None:
    async with new_session() as http:
        sample = await run_completion(http, url, Target(url, "m", 1).body(length, 4))
    assert sample.error is not None and words in sample.error


async def test_an_unreachable_server_is_an_error_too() -> None:
    async with new_session() as http:
        sample = await run_completion(http, "http://127.0.0.1:9", {"prompt": [1]})
    assert sample.error is not None


async def test_the_closed_loop_runs_every_request_once(url: str) -> None:
    lines: list[str] = []
    samples, duration_s = await closed(
        Target(url, "m", 1), num_streams=3, num_requests=7, prompt_tokens=4, output_tokens=3, say=lines.append
    )
    assert len(samples) == 7 == len(lines) and all(s.error is None for s in samples)
    assert duration_s >= 3 * 3 * GAP_S * 0.8


def test_figures_match_hand_computed_ones() -> None:
    first = Sample(0.0, [1.0, 1.1, 1.3], 1.3, 3)
    second = Sample(0.0, [2.0, 2.4], 2.4, 2)
    failed = Sample(0.0, error="x")
    s = summarise([first, second, failed], duration_s=5.0)
    assert (s.num_requests, s.num_errors, s.tokens_per_s) == (3, 1, 1.0)
    assert s.ttft_p50_ms == pytest.approx(1500) and s.itl_max_ms == pytest.approx(400)
    assert s.itl_p50_ms == pytest.approx(200) and s.tpot_p50_ms == pytest.approx((150 + 400) / 2)
    assert s.worst_gap_p50_ms == pytest.approx(300)


def test_a_seed_makes_the_same_prompts() -> None:
    assert Target("u", "m", 3).body(9, 1) == Target("u", "m", 3).body(9, 1)
    assert Target("u", "m", 3).body(9, 1) != Target("u", "m", 4).body(9, 1)
