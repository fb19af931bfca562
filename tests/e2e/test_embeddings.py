"""Embeddings through real processes, with the real client: MiniLM alone, and SmolLM2 beside its chat."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import openai
import pytest

from tests.e2e.client import session
from tests.e2e.server import Server, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.model]

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "minilm.json").read_text(encoding="utf-8"))["texts"]


def _client(server: Server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


async def test_the_openai_client_gets_the_vectors_of_transformers(minilm: Server) -> None:
    client = _client(minilm)
    texts = [entry["text"] for entry in GOLDEN]
    answer = await client.embeddings.create(model="minilm", input=texts)  # base64, as the client asks by itself
    assert [entry.index for entry in answer.data] == list(range(len(texts)))
    for entry, golden in zip(answer.data, GOLDEN, strict=True):
        found, expected = np.array(entry.embedding), np.array(golden["vector"])
        assert found @ expected / np.linalg.norm(expected) > 0.9999 and abs(np.linalg.norm(found) - 1) < 1e-5
    assert answer.usage.prompt_tokens == sum(len(entry["token_ids"]) for entry in GOLDEN)
    by_ids = await client.embeddings.create(model="minilm", input=[entry["token_ids"] for entry in GOLDEN])
    floats = await client.embeddings.create(model="minilm", input=texts[::-1], encoding_format="float")
    for entry, ids, turned in zip(answer.data, by_ids.data, floats.data[::-1], strict=True):
        assert entry.embedding == ids.embedding, "the same bits, by text or by ids"
        assert np.array_equal(np.array(entry.embedding, np.float32), np.array(turned.embedding, np.float32)), (
            "alone or not"
        )
    first, alike, other = (np.array(entry.embedding) for entry in answer.data[:3])
    assert first @ alike > 0.6 > 0.3 > first @ other
    await client.close()


async def test_what_minilm_does_not_take(minilm: Server) -> None:
    client = _client(minilm)
    long = "we look for somebody who builds search services " * 60
    for given, words in ((long, "maximum context length is 256 tokens"), ("", "empty"), ([], "empty")):
        with pytest.raises(openai.BadRequestError, match=words):
            await client.embeddings.create(model="minilm", input=given)
    cut = await client.embeddings.create(model="minilm", input=long, extra_body={"truncate_prompt_tokens": -1})
    assert cut.usage.prompt_tokens == 256
    with pytest.raises(openai.BadRequestError, match="only embeds"):
        await client.chat.completions.create(model="minilm", messages=[{"role": "user", "content": "hi"}])
    await client.close()
    workers = minilm.workers()
    assert [w["role"] for w in workers] == ["prefill"] * 2 and minilm.get("/health")["status"] == "ok"
    assert minilm.get("/v1/models")["data"][0]["max_model_len"] == 256


async def test_a_worker_killed_under_a_stream_of_requests_costs_no_answer(minilm: Server) -> None:
    texts = [f"candidate {i} has {i % 17} years of experience in {'rust python go'.split()[i % 3]}" for i in range(40)]
    victim = next(w["pid"] for w in minilm.workers())
    answers: list[tuple[int, bytes]] = []

    async def ask(http: aiohttp.ClientSession, number: int) -> None:
        chosen = [texts[(number + i) % len(texts)] for i in range(4)]
        body = {"model": "minilm", "input": chosen, "encoding_format": "base64"}
        async with turn, http.post(f"{minilm.url}/v1/embeddings", json=body) as response:
            answers.append((response.status, await response.read()))

    # A stream of requests, not a flood of them: what would wait too long is shed, which is no fault.
    turn = asyncio.Semaphore(6)
    async with session() as http:
        alone: dict[str, Any] = {}
        async with http.post(
            f"{minilm.url}/v1/embeddings", json={"model": "minilm", "input": texts, "encoding_format": "base64"}
        ) as response:
            alone = await response.json()
        running = [asyncio.create_task(ask(http, number)) for number in range(60)]
        await asyncio.to_thread(wait_until, lambda: len(answers) > 10, 120.0, "requests are answered")
        os.kill(victim, signal.SIGKILL)
        await asyncio.gather(*running)
    assert [status for status, _ in answers] == [200] * 60
    known = {entry["embedding"] for entry in alone["data"]}
    assert {entry["embedding"] for _, body in answers for entry in json.loads(body)["data"]} == known, "bit by bit"
    await asyncio.to_thread(
        wait_until, lambda: {w["pid"] for w in minilm.workers()} - {victim}, 60.0, "a worker is there"
    )


@pytest.mark.ucx
async def test_a_decoder_embeds_beside_its_chat(disaggregated: Server) -> None:
    client = _client(disaggregated)
    texts = ["Paris is the capital of France.", "a " * 700]
    answer = await client.embeddings.create(model="smollm2", input=texts)
    again = await client.embeddings.create(model="smollm2", input=texts[::-1])
    chat = await client.chat.completions.create(
        model="smollm2", messages=[{"role": "user", "content": "hi"}], max_tokens=4
    )
    assert [e.embedding for e in answer.data] == [e.embedding for e in again.data[::-1]]
    for entry in answer.data:
        assert len(entry.embedding) == 576 and abs(np.linalg.norm(entry.embedding) - 1) < 1e-5
    assert chat.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        await client.embeddings.create(model="smollm2", input="word " * 9000)
    await client.close()
