"""Nothing is lost, nothing leaks, and bad input harms nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.e2e.client import Streamed, complete, completion, session, stream
from tests.e2e.server import Server, serving, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.ucx, pytest.mark.slow]

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


async def test_only_what_broke_counts_as_failed(disaggregated: Server) -> None:
    """What ends with its first token, however, and clients that leave: nothing failed, and no line says so."""
    server = disaggregated
    failures = ("baton_kv_transfers_failed_total", "baton_request_failed_total")
    names = (*failures, "baton_kv_transfers_cancelled_total", "baton_request_cancelled_total")
    before, length = [server.total(name) for name in names], len(server.log.read_text())
    ended: list[dict[str, Any]] = [
        {"logit_bias": {"2": 100}},
        {"logit_bias": {"28": 100}, "stop_token_ids": [28]},
        {"logit_bias": {"28": 100}, "stop": [","]},
        {"structured_outputs": {"choice": ["a"]}},
        {"max_tokens": 1},
    ]
    async with session() as http:
        for number, fields in enumerate(ended * 4):
            body = completion(f"Tell me about number {number}", **{"max_tokens": 9, **fields})
            answer = await complete(http, server.url, body)
            assert len(answer["token_ids"]) == 1, (fields, answer)
        rng = random.Random(17)
        for _ in range(12):
            body = completion([rng.randrange(100, 40000) for _ in range(240)], max_tokens=200)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rng.uniform(0.0, 0.25)):
                    await complete(http, server.url, body)
    await asyncio.to_thread(wait_until, lambda: _is_quiet(server), 30.0, "every worker holds nothing")
    for name, known in zip(names[2:], before[2:], strict=True):
        await asyncio.to_thread(
            wait_until, lambda n=name, k=known: server.total(n) > k, 5.0, "what was called off counts"
        )
    assert [server.total(name) for name in failures] == before[:2]
    assert "failed" not in server.log.read_text()[length:]


def _is_quiet(server: Server) -> bool:
    """Whether every worker holds nothing, and its books balance."""
    for worker in server.workers():
        blocks = worker["blocks"]
        assert blocks["free"] + blocks["cached"] + blocks["leased"] == blocks["total"], worker
        if blocks["leased"] or worker["num_running"] or worker["num_waiting"]:
            return False
    return True


async def _stream_some(http: aiohttp.ClientSession, url: str, body: dict[str, Any], num_lines: int) -> None:
    """Read a few lines of a stream and hang up."""
    async with http.post(f"{url}/v1/completions", json={**body, "stream": True}) as response:
        assert response.status == 200
        for _ in range(num_lines):
            if not await response.content.readline():
                return
        response.close()


async def test_500_requests_with_disconnects_leave_nothing_behind(disaggregated: Server) -> None:
    rng = random.Random(5)
    gate = asyncio.Semaphore(24)
    finished, left = [], []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:

        async def one(i: int) -> None:
            length = rng.choice([1, 5, 15, 16, 17, 33])
            body = completion([rng.randrange(100, 40000) for _ in range(length)], max_tokens=rng.randint(1, 7))
            async with gate:
                if rng.random() >= 0.3:
                    answer = await stream(http, disaggregated.url, {**body, "ignore_eos": True})
                    assert answer.is_done and len(answer.token_ids) == body["max_tokens"]
                    finished.append(i)
                elif rng.random() < 0.5:
                    await _stream_some(http, disaggregated.url, body, rng.randint(1, 4))
                    left.append(i)
                else:
                    request = asyncio.ensure_future(stream(http, disaggregated.url, body))
                    await asyncio.sleep(rng.random() * 0.3)
                    request.cancel()
                    await asyncio.gather(request, return_exceptions=True)
                    left.append(i)

        await asyncio.gather(*(one(i) for i in range(500)))
    assert len(finished) + len(left) == 500 and len(left) > 100
    wait_until(lambda: _is_quiet(disaggregated), 2.0, "free + cached = total on both workers")


BAD_REQUESTS: list[tuple[str, Any, int, str | None]] = [
    (CHAT, b"{not json", 400, None),
    (CHAT, b"", 400, None),
    (CHAT, b"[]", 400, None),
    (CHAT, b"\xff\xfe", 400, None),
    (CHAT, b'{"model": "smollm2", "messages": [' + b"[" * 100_000 + b"]}", 400, None),
    (CHAT, {"messages": HI, "model": "nonsense"}, 404, "model"),
    (CHAT, {"messages": HI, "model": 5}, 400, "model"),
    (CHAT, {"model": "smollm2"}, 400, "messages"),
    (CHAT, {"model": "smollm2", "messages": []}, 400, "messages"),
    (CHAT, {"model": "smollm2", "messages": [{"role": "robot", "content": "hi"}]}, 400, None),
    (CHAT, {"model": "smollm2", "messages": HI, "temperature": -1}, 400, "temperature"),
    (CHAT, {"model": "smollm2", "messages": HI, "temperature": "hot"}, 400, "temperature"),
    (CHAT, {"model": "smollm2", "messages": HI, "max_tokens": 0}, 400, "max_tokens"),
    (CHAT, {"model": "smollm2", "messages": HI, "max_tokens": 2**63}, 400, None),
    (CHAT, {"model": "smollm2", "messages": HI, "max_tokens": True}, 400, "max_tokens"),
    (CHAT, {"model": "smollm2", "messages": HI, "n": 10**9}, 400, "n"),
    (CHAT, {"model": "smollm2", "messages": HI, "top_p": 1.5}, 400, "top_p"),
    (CHAT, b'{"model": "smollm2", "messages": [{"role":"user","content":"hi"}], "temperature": NaN}', 400, None),
    (CHAT, b'{"model": "smollm2", "messages": [{"role":"user","content":"hi"}], "temperature": 1e400}', 400, None),
    (CHAT, {"model": "smollm2", "messages": HI, "logit_bias": {"foo": 0}}, 400, "logit_bias"),
    (CHAT, {"model": "smollm2", "messages": HI, "logit_bias": {"49999": 1}}, 400, "logit_bias"),
    (CHAT, {"model": "smollm2", "messages": HI, "stop": ["x"] * 1000}, 400, "stop"),
    (CHAT, {"model": "smollm2", "messages": HI, "tools": [{"type": "retrieval"}]}, 400, "tools"),
    (CHAT, {"model": "smollm2", "messages": HI, "tool_choice": "required"}, 400, "tool_choice"),
    (CHAT, {"model": "smollm2", "messages": HI, "response_format": {"type": "xml"}}, 400, "response_format"),
    ("/v1/completions", {"model": "smollm2", "prompt": ""}, 400, "prompt"),
    ("/v1/completions", {"model": "smollm2", "prompt": []}, 400, "prompt"),
    ("/v1/completions", {"model": "smollm2", "prompt": [10**6]}, 400, "prompt"),
    ("/v1/completions", {"model": "smollm2", "prompt": [-1]}, 400, "prompt"),
    ("/v1/completions", {"model": "smollm2", "prompt": [1] * 9000}, 400, None),
    ("/v1/completions", {"model": "smollm2", "prompt": "word " * 9000}, 400, None),
    ("/v1/completions", {"model": "smollm2", "prompt": "x", "max_tokens": 9000}, 400, "max_tokens"),
    ("/v1/nonsense", {}, 404, None),
]  # fmt: skip


async def test_bad_requests_get_clear_errors_and_disturb_no_stream(disaggregated: Server) -> None:
    body = completion("Once upon a time", max_tokens=56, ignore_eos=True)
    async with session() as http:
        expected = await complete(http, disaggregated.url, body)
        beside = asyncio.create_task(stream(http, disaggregated.url, body))
        for path, bad, status, param in BAD_REQUESTS:
            data = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
            headers = {"Content-Type": "application/json"}
            async with http.post(f"{disaggregated.url}{path}", data=data, headers=headers) as response:
                text = await response.text()
                assert response.status == status, (bad, response.status, text)
                error = json.loads(text)["error"]
                assert set(error) == {"message", "type", "param", "code"} and error["message"], text
                assert error["code"] == status
                assert param is None or error["param"] == param, text
        result: Streamed = await beside
    assert result.is_done and result.token_ids == expected["token_ids"]


async def test_a_dry_pool_preempts_and_loses_nothing(cache_dir: Path, gguf: Path, tmp_path: Path) -> None:
    bodies = [completion(f"Story number {i} begins", max_tokens=48, ignore_eos=True) for i in range(3)]
    options = ("--num-kv-blocks", "7", "--max-model-len", "112", "--watermark-blocks", "0")
    with serving("smollm2", tmp_path, cache_dir, *options) as server:
        async with session() as http:
            alone = [(await complete(http, server.url, b))["token_ids"] for b in bodies]
            together = await asyncio.gather(*(stream(http, server.url, b) for b in bodies))
        assert [t.token_ids for t in together] == alone
        wait_until(lambda: server.total("baton_preemptions_total") > 0, 2.0, "a preemption")
        wait_until(lambda: _is_quiet(server), 2.0, "quiet")


async def test_a_stream_survives_the_death_of_its_decode_worker_token_for_token(
    cache_dir: Path, gguf: Path, tmp_path: Path
) -> None:
    body = completion("The longest road in the country", max_tokens=320, ignore_eos=True, temperature=1.0, seed=11)
    with serving("smollm2", tmp_path, cache_dir, "--decode", "2") as server:
        async with session() as http:
            expected = (await complete(http, server.url, body))["token_ids"]
            wait_until(lambda: _is_quiet(server), 5.0, "quiet")
            running = asyncio.create_task(stream(http, server.url, body))
            busy = await asyncio.to_thread(wait_until, lambda: _busy_decode_pid(server), 5.0, "a running stream")
            os.kill(busy, signal.SIGKILL)
            result = await running
        assert result.is_done and result.token_ids == expected
        wait_until(lambda: len(server.workers()) == 3, 30.0, "the supervisor's replacement")
        assert busy not in [worker["pid"] for worker in server.workers()]


def _busy_decode_pid(server: Server) -> int | None:
    pids = [w["pid"] for w in server.workers() if w["role"] == "decode" and w["num_running"]]
    return pids[0] if pids else None


def _worker(role: str, model: str, url: str, secret: Path, cache_dir: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "baton", role, model, "--router-url", url, "--secret-file", str(secret),
               "--cache-dir", str(cache_dir)]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


async def test_a_wrong_secret_and_another_model_are_refused_clearly(
    cache_dir: Path, gguf: Path, tmp_path: Path
) -> None:
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.write_text("a" * 32)
    wrong.write_text("b" * 32)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY_LLAMA))
    options = ("--secret-file", str(right), "--control-port", "18431")
    with serving("smollm2", tmp_path, cache_dir, *options) as server:
        async with session() as http:
            body = completion("Beside all this", max_tokens=40, ignore_eos=True)
            expected = await complete(http, server.url, body)
            beside = asyncio.create_task(stream(http, server.url, body))
            url = "http://127.0.0.1:18431"
            refused, foreign = await asyncio.gather(
                asyncio.to_thread(_worker, "decode", str(gguf), url, wrong, cache_dir),
                asyncio.to_thread(_worker, "prefill", f"dummy:{config}", url, right, cache_dir),
            )
            assert (await beside).token_ids == expected["token_ids"]
    assert refused.returncode == 2 and "wrong cluster secret" in refused.stderr, refused.stderr
    assert foreign.returncode == 2 and "different model or KV layout" in foreign.stderr, foreign.stderr


TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
