"""Decisions, scores and log probabilities of prompts, as clients ask for them, through real processes with SmolLM2."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from tests.e2e.client import completion, session, stream
from tests.e2e.server import Server, serving, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.ucx]

LETTER = "The customer wrote: I was charged twice for order 4411. I want one of the charges refunded today."
WORDS = "the candidate has led a team that built a search service in Rust and Python for seven years at a bank".split()


def _state(seed: int, num_words: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(num_words))


def _predicates(num_questions: int) -> list[dict[str, Any]]:
    return [
        {"type": "predicate", "name": f"q{i}", "instructions": f"Has the candidate {i + 1} years of experience?"}
        for i in range(num_questions)
    ]


async def _post(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    async with http.post(url, json=body) as response:
        return response.status, await response.json()


def _computed(server: Server) -> int:
    return sum(w["num_computed_tokens"] for w in server.workers() if w["role"] == "prefill")


def _is_quiet(server: Server) -> bool:
    workers = server.workers()
    return all(w["is_balanced"] and not w["blocks"]["leased"] and not w["num_running"] for w in workers)


async def test_the_openai_client_gets_decisions(disaggregated: Server) -> None:
    client = openai.AsyncOpenAI(base_url=f"{disaggregated.url}/v1", api_key="unused")
    arguments: dict[str, Any] = {
        "model": "smollm2",
        "input": LETTER,
        "questions": [
            {"type": "predicate", "name": "refund", "instructions": "Does the customer ask for a refund?"},
            {
                "type": "choice",
                "name": "topic",
                "instructions": "What is it about?",
                "choices": [{"value": "billing", "description": "charges and refunds"}, {"value": "weather"}],
            },
            {"type": "score", "instructions": "How urgent?", "levels": [{"label": "later"}, {"label": "today"}]},
        ],
    }
    decision = await client.decisions.create(**arguments)
    again = await client.decisions.create(**arguments)
    await client.close()
    predicate, choice, score = decision.answers
    assert predicate.type == "predicate" and predicate.name == "refund" and 0 < predicate.probability < 1
    assert choice.type == "choice" and choice.choice == "billing"
    assert sum(p.probability for p in choice.probabilities) == pytest.approx(1)
    assert (
        score.type == "score" and 0 <= score.score <= 1 and [p.label for p in score.probabilities] == ["later", "today"]
    )
    assert again.answers == decision.answers, "read once or read again, it is the same distribution"
    assert decision.usage.output_tokens == 0 and again.usage.input_tokens_details.cached_tokens > 0


async def test_forty_questions_compute_their_state_once(disaggregated: Server) -> None:
    body = {"model": "smollm2", "input": _state(1, 600), "questions": _predicates(40)}
    before = _computed(disaggregated)
    async with session() as http:
        status, answer = await _post(http, f"{disaggregated.url}/v1/decisions", body)
    assert status == 200 and len(answer["answers"]) == 40
    usage = answer["usage"]
    wait_until(lambda: _is_quiet(disaggregated), 5.0, "quiet")
    wait_until(lambda: _computed(disaggregated) > before, 5.0, "counted")
    # What is shared but does not fill a block is computed with each question.
    assert _computed(disaggregated) - before <= usage["input_tokens"] + 40 * 16
    naive = disaggregated.total("baton_prompt_tokens_total")
    assert naive > 40 * 600, "each question is a prompt of its own for whoever counts prompts"


async def test_system_one_score_and_rerank_answer_in_their_shapes(disaggregated: Server) -> None:
    questions = {
        "refund": {
            "type": "noul",
            "instructions": "Is a refund asked for?",
            "criteria": {"true": "yes", "false": None},
        },
        "topic": {"type": "choice", "criteria": {"billing": "charges", "weather": None}},
        "mood": {"type": "score", "instructions": "How angry?", "criteria": ["calm", {"level": "angry"}]},
    }
    documents = ["Cats sleep for most of the day.", {"text": "Paris is the capital of France."}]
    async with session() as http:
        url = disaggregated.url
        status, one = await _post(http, f"{url}/v1/systemone", {"state": {"letter": LETTER}, "questions": questions})
        assert status == 200 and one["model"] == "smollm2"
        assert 0 < one["answers"]["refund"]["noul"] < 1 and set(one["answers"]["topic"]["probabilities"]) == {
            "billing",
            "weather",
        }
        assert one["answers"]["mood"]["legend"] == {"0": "calm", "1": {"level": "angry"}}
        body = {"model": "smollm2", "query": "capital of France", "documents": documents}
        status, ranked = await _post(http, f"{url}/v1/rerank", body)
        assert status == 200 and sorted(r["index"] for r in ranked["results"]) == [0, 1]
        first, second = ranked["results"]
        assert first["relevance_score"] >= second["relevance_score"] and "text" in first["document"]
        texts = ["Cats sleep for most of the day.", "Paris is the capital of France."]
        status, scored = await _post(http, f"{url}/v1/score", {"text_1": "capital of France", "text_2": texts})
        assert status == 200
        by_index = {r["index"]: r["relevance_score"] for r in ranked["results"]}
        assert [d["score"] for d in scored["data"]] == pytest.approx([by_index[0], by_index[1]])


async def test_loglikelihoods_as_lm_eval_asks_for_them(disaggregated: Server) -> None:
    rng = random.Random(3)
    prompts = [[rng.randrange(100, 40_000) for _ in range(length)] for length in (5, 40, 333)]
    body = {"model": "smollm2", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234,
            "echo": True}  # fmt: skip
    async with session() as http:
        url = f"{disaggregated.url}/v1/completions"
        status, answer = await _post(http, url, body)
        assert status == 200 and answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0, answer
        for choice, prompt in zip(sorted(answer["choices"], key=lambda c: c["index"]), prompts, strict=True):
            logged = choice["logprobs"]
            assert (
                len(logged["tokens"]) == len(logged["token_logprobs"]) == len(logged["top_logprobs"]) == len(prompt) + 1
            )
            assert logged["token_logprobs"][0] is None and logged["top_logprobs"][0] is None
            for token, value, top in list(zip(*(logged[k] for k in ("tokens", "token_logprobs", "top_logprobs")),
                                              strict=True))[1:]:  # fmt: skip
                assert value <= 0 and top[token] == value and len(top) <= 2
            assert logged["text_offset"] == sorted(logged["text_offset"])
        status, alone = await _post(http, url, {**body, "max_tokens": 0, "prompt_logprobs": 2})
        assert status == 200 and alone["usage"]["completion_tokens"] == 0
        for choice, whole in zip(alone["choices"], answer["choices"], strict=True):
            assert choice["logprobs"]["token_logprobs"] == whole["logprobs"]["token_logprobs"][:-1]
            ids = [next(iter(entry)) for entry in choice["prompt_logprobs"][1:]]
            assert [int(i) for i in ids] == prompts[choice["index"]][1:]
        status, chat = await _post(http, f"{disaggregated.url}/v1/chat/completions", {
            "model": "smollm2", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "prompt_logprobs": 0,
        })  # fmt: skip
        assert status == 200 and chat["prompt_logprobs"][0] is None and len(chat["prompt_logprobs"]) > 5


async def test_a_stream_echoes_its_prompt_with_log_probabilities_first(disaggregated: Server) -> None:
    prompt = [500, 600, 700]
    async with session() as http:
        body = completion(prompt, max_tokens=4, echo=True, logprobs=0)
        streamed = await stream(http, disaggregated.url, body)
        status, whole = await _post(http, f"{disaggregated.url}/v1/completions", body)
    assert status == 200 and streamed.text == whole["choices"][0]["text"]
    found = [v for c in streamed.chunks if c["choices"] for v in c["choices"][0]["logprobs"]["token_logprobs"]]
    assert found == whole["choices"][0]["logprobs"]["token_logprobs"] and found[0] is None and len(found) == 7


async def test_a_stream_beside_forty_questions_is_unchanged(disaggregated: Server) -> None:
    body = completion([700 + 13 * i for i in range(50)], max_tokens=60, ignore_eos=True)
    decisions = {"model": "smollm2", "input": _state(2, 500), "questions": _predicates(40)}
    async with session() as http:
        alone = await stream(http, disaggregated.url, body)
        asking = asyncio.create_task(_post(http, f"{disaggregated.url}/v1/decisions", decisions))
        beside = await stream(http, disaggregated.url, {**body, "cache_salt": "beside"})
        status, answer = await asking
    assert beside.token_ids == alone.token_ids and len(alone.token_ids) == 60 and beside.is_done
    assert status == 200 and len(answer["answers"]) == 40


async def test_a_client_that_leaves_leaves_nothing_behind(disaggregated: Server) -> None:
    body = {"model": "smollm2", "input": _state(3, 900), "questions": _predicates(400)}
    async with session() as http:
        asking = asyncio.create_task(_post(http, f"{disaggregated.url}/v1/decisions", body))
        await asyncio.to_thread(
            wait_until, lambda: _has_readouts(disaggregated), 20.0, "the questions are with the worker"
        )
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await asyncio.to_thread(wait_until, lambda: _is_quiet(disaggregated), 20.0, "free + cached = total on both workers")
    assert disaggregated.get("/census")["requests"] == {"running": 0, "waiting": 0}


def _has_readouts(server: Server) -> bool:
    return any(w["num_running"] + w["num_waiting"] > 3 for w in server.workers() if w["role"] == "prefill")


async def test_one_process_with_both_roles_reads_the_same(disaggregated: Server, colocated: Server) -> None:
    decisions = {"model": "smollm2", "input": _state(5, 100), "questions": _predicates(5)}
    echo = completion([900, 901, 902, 903], max_tokens=3, echo=True, logprobs=1)
    answers = []
    async with session() as http:
        for server in (disaggregated, colocated):
            status, decided = await _post(http, f"{server.url}/v1/decisions", decisions)
            assert status == 200
            status, echoed = await _post(http, f"{server.url}/v1/completions", echo)
            assert status == 200
            answers.append((decided["answers"], echoed["choices"]))
    assert answers[0] == answers[1]
    await asyncio.to_thread(wait_until, lambda: _is_quiet(colocated), 20.0, "quiet")


@pytest.mark.slow
async def test_a_prefill_worker_killed_among_many_questions_costs_no_answer(
    gguf: Path, cache_dir: Path, tmp_path: Path
) -> None:
    body = {"model": "smollm2", "input": _state(4, 1200), "questions": _predicates(60)}
    with serving("smollm2", tmp_path, cache_dir) as server:
        async with session() as http:
            asking = asyncio.create_task(_post(http, f"{server.url}/v1/decisions", body))
            await asyncio.to_thread(
                wait_until, lambda: _has_readouts(server), 20.0, "the questions are with the worker"
            )
            os.kill(server.children()["prefill"], signal.SIGKILL)
            status, answer = await asking
            assert status == 200 and len(answer["answers"]) == 60, answer
            status, again = await _post(http, f"{server.url}/v1/decisions", body)
        assert status == 200 and again["answers"] == answer["answers"]
        metrics = server.metrics()
        assert metrics['baton_readout_seconds_count{kind="labels"}'] == 120
        await asyncio.to_thread(wait_until, lambda: _is_quiet(server), 20.0, "quiet")
