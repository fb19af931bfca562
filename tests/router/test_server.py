"""What a router says about itself: health, models, errors, draining, metrics, census."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path
from typing import Any

from protocol.wire import Links, Reserve, Welcome
from router.app import run
from router.tokenizer import Tokenizer
from tests.router.tiny import byte_level_gguf
from tests.router.workers import (
    CHAT,
    HI,
    LENGTH,
    ScriptedWorker,
    Stage,
    aborted,
    answer,
    config,
    prefill_address,
    staged,
)

# --- about the server ---


async def test_health_says_what_is_missing(stage: Stage) -> None:
    async with stage.http.get(f"{stage.url}/health") as response:
        assert response.status == 503
        assert (await response.json())["missing"] == ["no prefill worker", "no decode worker"]
    status, body, _ = await stage.post(CHAT, HI)
    assert status == 503 and "no worker has registered yet" in body["error"]["message"]
    await stage.pair()
    async with stage.http.head(f"{stage.url}/health") as response:
        assert response.status == 200


async def test_models_tokens_and_version(stage: Stage) -> None:
    await stage.pair()
    async with stage.http.get(f"{stage.url}/v1/models") as response:
        cards = (await response.json())["data"]
    assert [(c["id"], c["max_model_len"], c["object"]) for c in cards] == [("m", 256, "model"), ("alias", 256, "model")]
    async with stage.http.get(f"{stage.url}/v1/models/alias") as response:
        assert (await response.json())["id"] == "alias"
    async with stage.http.get(f"{stage.url}/v1/models/x/y") as response:
        assert response.status == 404
    _, body, _ = await stage.post("/tokenize", {"model": "m", "prompt": "the a", "return_token_strs": True})
    assert body["count"] == 3 and body["token_strs"] == ["the", " ", "a"] and body["max_model_len"] == 256
    _, chat, _ = await stage.post("/tokenize", {"messages": HI["messages"]})
    assert (await stage.post("/detokenize", {"tokens": body["tokens"]}))[1] == {"prompt": "the a"}
    _, text, _ = await stage.post("/detokenize", {"tokens": chat["tokens"]})
    assert text["prompt"] == "<|start|>user: hi<|stop|><|start|>assistant: "
    assert (await stage.post("/detokenize", {"tokens": [99999]}))[0] == 400
    async with stage.http.get(f"{stage.url}/version") as response:
        assert (await response.json())["version"][0].isdigit()


async def test_a_long_prompt_is_tokenised_in_a_thread_and_too_long_ones_are_refused(stage: Stage) -> None:
    prefill, decode = await stage.pair(max_model_len=60_000, num_blocks=20_000)
    asked = asyncio.create_task(stage.post("/v1/completions", {"model": "m", "prompt": "x" * 50_000, "max_tokens": 2}))
    await answer(prefill, decode, "ok", LENGTH)
    assert (await asked)[1]["usage"]["prompt_tokens"] == 50_000
    status, body, _ = await stage.post("/v1/completions", {"model": "m", "prompt": "x" * 70_000})
    assert status == 400 and "maximum context length is 60000" in body["error"]["message"]


async def test_errors_have_openais_shape_and_the_right_code(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer, max_body_bytes=1000) as stage:
        await stage.pair()
        await _check_errors(stage)


async def _check_errors(stage: Stage) -> None:
    url, json_type = stage.url, {"Content-Type": "application/json"}
    cases: list[tuple[str, str, dict[str, Any], int]] = [
        ("POST", "/v1/nonsense", {"data": b"{}"}, 404),
        ("GET", "/v1/completions", {}, 405),
        ("POST", CHAT, {"data": b"{}", "headers": {"Content-Type": "text/plain"}}, 415),
        ("POST", CHAT, {"data": b"{", "headers": json_type}, 400),
        ("POST", CHAT, {"data": b" " * 1001, "headers": json_type}, 413),
        ("POST", CHAT, {"json": {**HI, "model": "x"}}, 404),
        ("POST", CHAT, {"json": {**HI, "n": 0}}, 400),
    ]
    for method, path, options, code in cases:
        async with stage.http.request(method, f"{url}{path}", **options) as response:
            error = (await response.json())["error"]
            assert response.status == error["code"] == code, (path, options.get("json"))
            assert set(error) == {"message", "type", "param", "code"} and error["message"]
    async with stage.http.get(f"{url}/v1/completions") as response:
        assert response.headers["Allow"] == "POST"


async def test_the_request_id_comes_back(stage: Stage) -> None:
    prefill, decode = await stage.pair()
    for headers, fields, expected in (
        ({"X-Request-ID": "abc-1"}, {"request_id": "other"}, "abc-1"),
        ({}, {"request_id": "mine"}, "mine"),
    ):
        asked = asyncio.create_task(stage.post(CHAT, {**HI, "max_tokens": 2, **fields}, headers=headers))
        await answer(prefill, decode, "ok", LENGTH)
        _, body, answered = await asked
        assert answered["X-Request-ID"] == expected and body["id"] == f"chatcmpl-{expected}"
    _, _, answered = await stage.post(CHAT, {}, headers={"X-Request-ID": "bad-1"})
    assert answered["X-Request-ID"] == "bad-1", "on errors as well"


async def test_draining_refuses_new_requests_and_finishes_running_ones(stage: Stage) -> None:
    prefill, decode = await stage.pair()
    asked = asyncio.create_task(stage.post(CHAT, {**HI, "max_tokens": 2}))
    await stage.until(lambda: stage.router.switchboard.num_requests == 1)
    draining = asyncio.create_task(stage.router.drain())
    await stage.until(lambda: stage.router.switchboard.is_draining)
    status, body, _ = await stage.post(CHAT, HI)
    assert status == 503 and "shutting down" in body["error"]["message"]
    async with stage.http.get(f"{stage.url}/health") as response:
        assert response.status == 503
    assert not draining.done()
    await answer(prefill, decode, "ok", LENGTH)
    assert (await asked)[0] == 200
    await asyncio.wait_for(draining, 1)


async def test_drain_gives_up_after_its_budget(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer, drain_s=0.2) as stage:
        prefill, decode = await stage.pair()
        asked = asyncio.create_task(stage.post(CHAT, HI))
        reserve = await decode.hear(Reserve)
        await asyncio.wait_for(stage.router.drain(), 1)
        closing = asyncio.create_task(stage.router.close())
        await aborted(decode, reserve.transfer_id)
        status, body, _ = await asked
        assert status == 503 and "shutting down" in body["error"]["message"]
        await asyncio.wait_for(closing, 3)
        await stage.until(lambda: prefill.channel.is_lost)


# --- numbers ---


async def test_metrics_and_census_tell_what_workers_report(stage: Stage) -> None:
    prefill, decode = await stage.pair()
    asked = asyncio.create_task(stage.post(CHAT, {**HI, "max_tokens": 3}))
    await answer(prefill, decode, "abc", LENGTH)
    await asked
    prefill.beat(num_computed_tokens=30, num_cached_tokens=12, num_bytes_transferred=4096)
    decode.beat(num_bytes_transferred=4096, num_blocks_transferred=4, num_blocks_skipped=2, num_transfers=1,
                blocks_free=90, blocks_cached=6, blocks_leased=4, blocks_total=100, num_preemptions=3)  # fmt: skip
    registry = stage.router.switchboard.registry
    await stage.until(lambda: all(w.stats.num_bytes_transferred for w in registry))
    found = await _metrics(stage)
    assert found['baton_kv_transfer_bytes_total{transport="ucx"}'] == 4096, "counted once, where it arrives"
    assert found['baton_kv_transfer_blocks_skipped_total{transport="ucx"}'] == 2
    assert found['baton_kv_transfers_failed_total{transport="ucx"}'] == 0
    assert found['baton_kv_blocks{role="decode",state="cached",worker="d0"}'] == 6
    assert found['baton_worker_up{role="prefill",worker="p0"}'] == 1
    for name, value in (
        ("baton_prefill_computed_tokens_total", 30), ("baton_prefill_cached_tokens_total", 12),
        ("baton_generation_tokens_total", 3), ("baton_time_to_first_token_seconds_count", 1),
        ("baton_inter_token_latency_seconds_count", 2), ("baton_time_per_output_token_seconds_count", 1),
        ("baton_e2e_request_latency_seconds_count", 1), ("baton_request_queue_time_seconds_count", 1),
        ("baton_num_requests_running", 0), ("baton_num_requests_waiting", 0), ("baton_preemptions_total", 3),
    ):  # fmt: skip
        assert found[f'{name}{{model_name="m"}}'] == value, name
    assert found['baton_request_success_total{finished_reason="length",model_name="m"}'] == 1
    labels = '{engine="0",model_name="m"}'
    for name, number in (
        ("vllm:generation_tokens_total", 3), ("vllm:prefix_cache_hits_total", 12),
        ("vllm:prefix_cache_queries_total", 42), ("vllm:time_to_first_token_seconds_count", 1),
        ("vllm:kv_cache_usage_perc", 0.04), ("vllm:num_requests_running", 0), ("vllm:num_preemptions_total", 3),
    ):  # fmt: skip
        assert found[name + labels] == number, name
    async with stage.http.get(f"{stage.url}/census") as response:
        census = await response.json()
    workers = {w["worker_id"]: w for w in census["workers"]}
    assert workers["d0"]["blocks"] == {"free": 90, "cached": 6, "leased": 4, "total": 100}
    assert workers["d0"]["links"] == ["p0"] and workers["p0"]["num_running"] == 0


async def test_census_says_where_blocks_do_not_add_up(stage: Stage) -> None:
    prefill, decode = await stage.pair()

    async def balanced() -> tuple[bool, dict[str, bool]]:
        async with stage.http.get(f"{stage.url}/census") as response:
            census = await response.json()
        return census["is_balanced"], {w["worker_id"]: w["is_balanced"] for w in census["workers"]}

    prefill.beat(blocks_free=7, blocks_cached=2, blocks_leased=1, blocks_total=10)
    decode.beat(blocks_free=90, blocks_cached=6, blocks_leased=4, blocks_total=100)
    await asyncio.sleep(0.05)
    assert await balanced() == (True, {"p0": True, "d0": True})
    decode.beat(blocks_free=90, blocks_cached=6, blocks_leased=3, blocks_total=100)
    await asyncio.sleep(0.05)
    assert await balanced() == (False, {"p0": True, "d0": False})


async def test_transfer_counters_keep_growing_when_a_worker_restarts_or_reconnects(stage: Stage) -> None:
    prefill, decode = await stage.pair()
    name = 'baton_kv_transfer_bytes_total{transport="ucx"}'
    assert (await _metrics(stage))[name] == 0

    async def report(worker: ScriptedWorker, num_bytes: int) -> None:
        worker.beat(num_bytes_transferred=num_bytes)
        present = stage.router.switchboard.registry.get
        await stage.until(lambda: (w := present("d0")) is not None and w.stats.num_bytes_transferred == num_bytes)

    await report(decode, 100)
    again = await stage.worker("d0")
    await again.hear(Welcome)
    await report(again, 150)
    assert (await _metrics(stage))[name] == 150, "the same instance goes on counting"
    await again.close()
    restarted = await stage.worker("d0", instance=2)
    await restarted.hear(Welcome)
    restarted.say(Links(peers=(("p0", 1),)))
    await report(restarted, 20)
    assert (await _metrics(stage))[name] == 170
    assert prefill.register.address is not None


async def test_the_transport_label_is_that_of_the_linked_prefill_worker(stage: Stage) -> None:
    await stage.worker("p0", address=prefill_address("p0", "inproc"))
    decode = await stage.worker("d0")
    decode.say(Links(peers=(("p0", 1),)))
    await stage.ready()
    decode.beat(num_bytes_transferred=7)
    await stage.until(lambda: all(w.stats.num_bytes_transferred for w in stage.router.switchboard.registry.decodes))
    assert (await _metrics(stage))['baton_kv_transfer_bytes_total{transport="inproc"}'] == 7


async def _metrics(stage: Stage) -> dict[str, float]:
    async with stage.http.get(f"{stage.url}/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        lines = (await response.text()).splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


async def test_sigterm_ends_a_router_with_code_0(tmp_path: Path) -> None:
    path = byte_level_gguf(tmp_path / "tiny.gguf")
    running = asyncio.create_task(run(config(model_path=str(path))))
    await asyncio.sleep(0.3)
    assert not running.done()
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(running, 5) == 0


async def test_an_inherited_socket_is_served(tokenizer: Tokenizer) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        async with staged(tokenizer, http_fd=os.dup(listening.fileno())) as stage:
            assert stage.router.http_port == listening.getsockname()[1]
            async with stage.http.get(f"{stage.url}/version") as response:
                assert response.status == 200
