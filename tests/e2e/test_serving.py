"""What a user of `baton serve` sees: an OpenAI client, separate processes, exact transfer metrics, prefix reuse."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import openai
import pytest

from tests.e2e.client import complete, completion, gather_limited, session, stream
from tests.e2e.server import Server, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.ucx]

BLOCK_SIZE = 16
# 30 layers, keys and values, 3 heads of 64 float16 numbers, 16 tokens.
BLOCK_BYTES = 30 * 2 * 3 * 64 * 2 * BLOCK_SIZE
QUESTION = "The capital of France is which city? Answer in one word."
BYTES_METRIC = 'baton_kv_transfer_bytes_total{transport="ucx"}'


def _random_prompt(seed: int, num_tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(100, 40000) for _ in range(num_tokens)]


async def test_the_openai_client_streams_a_chat_token_by_token(disaggregated: Server) -> None:
    client = openai.AsyncOpenAI(base_url=f"{disaggregated.url}/v1", api_key="unused")
    events = await client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    pieces, roles, reasons, usage = [], [], [], None
    async for event in events:
        usage = event.usage or usage
        for choice in event.choices:
            roles.append(choice.delta.role)
            reasons.append(choice.finish_reason)
            if choice.delta.content:
                pieces.append(choice.delta.content)
    await client.close()
    assert "Paris" in "".join(pieces)
    assert len(pieces) >= 5, "one chunk per token"
    assert roles[0] == "assistant" and pieces[0], "the role comes with the first token"
    assert reasons[-1] == "stop" and reasons[:-1].count(None) == len(reasons) - 1
    assert usage is not None and usage.completion_tokens >= len(pieces) and usage.prompt_tokens > 5


async def test_the_openai_client_gets_the_same_answer_without_streaming(disaggregated: Server) -> None:
    client = openai.AsyncOpenAI(base_url=f"{disaggregated.url}/v1", api_key="unused")
    arguments: dict[str, Any] = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "Name three colours."}],
        "temperature": 0,
        "max_tokens": 24,
    }
    whole = await client.chat.completions.create(**arguments)
    streamed = await client.chat.completions.create(**arguments, stream=True)
    text = "".join([e.choices[0].delta.content or "" async for e in streamed if e.choices])
    models = await client.models.list()
    await client.close()
    assert whole.choices[0].message.content == text != ""
    assert [m.id for m in models.data] == ["smollm2"]


def test_router_prefill_and_decode_are_separate_processes(disaggregated: Server) -> None:
    children = disaggregated.children()
    assert set(children) == {"router", "prefill", "decode"}
    assert len(set(children.values())) == 3
    by_role = {w["role"]: w for w in disaggregated.workers()}
    assert by_role["prefill"]["pid"] == children["prefill"]
    assert by_role["decode"]["pid"] == children["decode"]


async def test_the_bytes_metric_grows_by_exactly_the_blocks_sent(disaggregated: Server) -> None:
    # Workers report twice a second: let what earlier tests have sent be counted first.
    await asyncio.sleep(1.2)
    before = disaggregated.metrics().get(BYTES_METRIC, 0.0)
    lengths = [5, 16, 17, 100]
    async with session() as http:
        for i, length in enumerate(lengths):
            await complete(http, disaggregated.url, completion(_random_prompt(i, length), max_tokens=2))
    expected = sum(-(-length // BLOCK_SIZE) for length in lengths) * BLOCK_BYTES
    wait_until(
        lambda: disaggregated.metrics().get(BYTES_METRIC, 0.0) - before == expected, 3.0, f"{expected} bytes sent"
    )


async def test_a_shared_prefix_is_neither_computed_nor_sent_again(disaggregated: Server) -> None:
    shared = _random_prompt(50, 160)
    async with session() as http:
        await complete(http, disaggregated.url, completion(shared + _random_prompt(51, 20), max_tokens=2))
        names = ("baton_kv_transfer_blocks_total", "baton_prefill_computed_tokens_total",
                 "baton_prefill_cached_tokens_total", "baton_kv_transfer_blocks_skipped_total")  # fmt: skip
        await asyncio.sleep(1.2)  # two heartbeats: the counters of the first request are in
        before = [disaggregated.total(name) for name in names]
        answer = await complete(http, disaggregated.url, completion(shared + _random_prompt(52, 20), max_tokens=2))
    num_shared_blocks, num_blocks = 160 // BLOCK_SIZE, -(-180 // BLOCK_SIZE)
    expected = [num_blocks - num_shared_blocks, 20, 160, num_shared_blocks]

    def grown() -> list[float]:
        return [disaggregated.total(name) - b for name, b in zip(names, before, strict=True)]

    wait_until(lambda: grown() == expected, 3.0, f"growth {expected}")
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 160


async def test_another_tenants_salt_shares_nothing(disaggregated: Server) -> None:
    prompt = _random_prompt(60, 80)
    async with session() as http:
        for salt, expected in (("a", 0), ("a", 64), ("b", 0)):
            body = completion(prompt, max_tokens=1, cache_salt=salt)
            answer = await complete(http, disaggregated.url, body)
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == expected


async def test_stop_strings_end_the_text_before_them_and_tokens_by_length(disaggregated: Server) -> None:
    body = completion("1, 2, 3, 4, 5, 6,", max_tokens=40, ignore_eos=True)
    async with session() as http:
        free = await complete(http, disaggregated.url, body)
        assert free["finish_reason"] == "length" and len(free["token_ids"]) == 40
        stop = free["text"][10:14]
        cut = await complete(http, disaggregated.url, {**body, "stop": [stop]})
        streamed = await stream(http, disaggregated.url, {**body, "stop": [stop]})
    assert cut["text"] == free["text"][: free["text"].index(stop)] == streamed.text
    assert cut["finish_reason"] == streamed.finish_reason == "stop"
    assert streamed.is_done


async def test_n_choices_and_several_prompts_come_back_in_order(disaggregated: Server) -> None:
    async with session() as http:
        async with http.post(
            f"{disaggregated.url}/v1/completions",
            json=completion(["One two", "Red green"], n=2, max_tokens=6, temperature=1.0, seed=3),
        ) as response:
            answer = await response.json()
        single = await complete(http, disaggregated.url, completion("Red green", max_tokens=6, temperature=1.0, seed=3))
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    texts = [c["text"] for c in answer["choices"]]
    assert texts[0] != texts[1], "the choices of one prompt differ"
    assert texts[2] == single["text"], "the first choice is that of n=1"


async def test_emoji_never_arrive_broken(disaggregated: Server) -> None:
    body = completion("Repeat: 🚀🎉🌍🚀🎉🌍🚀🎉🌍🚀🎉", max_tokens=40, ignore_eos=True)
    async with session() as http:
        streamed = await stream(http, disaggregated.url, body)
        whole = await complete(http, disaggregated.url, body)
    assert streamed.text == whole["text"]
    assert "\ufffd" not in streamed.text[:-1]


async def test_echo_and_logprobs(disaggregated: Server) -> None:
    async with session() as http:
        echoed = await complete(http, disaggregated.url, completion("The sky is", max_tokens=4, echo=True))
        scored = await complete(http, disaggregated.url, completion("The sky is", max_tokens=4, logprobs=2))
    assert echoed["text"] == "The sky is" + scored["text"]
    logprobs = scored["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == 4
    assert all(value <= 0 for value in logprobs["token_logprobs"])
    assert all(len(top) >= 2 for top in logprobs["top_logprobs"])


async def test_min_tokens_holds_back_the_end(disaggregated: Server) -> None:
    chat = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "Say yes."}],
        "temperature": 0,
        "min_tokens": 30,
        "max_tokens": 40,
    }
    async with session() as http:
        async with http.post(f"{disaggregated.url}/v1/chat/completions", json=chat) as response:
            answer = await response.json()
    assert answer["usage"]["completion_tokens"] >= 30


async def test_tokenize_and_detokenize_are_inverse(disaggregated: Server) -> None:
    async with session() as http:
        async with http.post(f"{disaggregated.url}/tokenize", json={"model": "smollm2", "prompt": "Grüße, 世界!"}) as r:
            tokens = (await r.json())["tokens"]
        async with http.post(f"{disaggregated.url}/detokenize", json={"model": "smollm2", "tokens": tokens}) as r:
            assert (await r.json())["prompt"] == "Grüße, 世界!"


async def test_seeded_sampling_is_the_same_alone_in_a_batch_and_in_the_other_mode(
    disaggregated: Server, colocated: Server
) -> None:
    samplings: list[dict[str, float]] = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 50},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 0.9, "repetition_penalty": 1.2},
        {"temperature": 1.0, "frequency_penalty": 0.5, "presence_penalty": 0.2},
    ]
    bodies = [
        completion(f"Candidate {i} wrote:", max_tokens=12, seed=100 + i, ignore_eos=True, **sampling)
        for i, sampling in enumerate(samplings)
    ]
    async with session() as http:

        async def run(server: Server, limit: int) -> list[list[int]]:
            answers = await gather_limited(limit, [complete(http, server.url, b) for b in bodies])
            return [a["token_ids"] for a in answers]

        alone = await run(disaggregated, 1)
        assert alone == await run(disaggregated, 6)
        assert alone == await run(colocated, 6)
        assert alone == await run(colocated, 1)
        other = await complete(http, disaggregated.url, {**bodies[0], "seed": 7})
    assert other["token_ids"] != alone[0]


async def test_decode_reserves_nothing_for_prompts_that_are_still_queued(disaggregated: Server) -> None:
    # So few tokens that a machine which is slow while it starts does not refuse them.
    num_prompts, num_blocks = 10, 32
    most, placed = 0, 0
    async with session() as http:
        bodies = [
            completion(_random_prompt(700 + i, num_blocks * BLOCK_SIZE), max_tokens=2) for i in range(num_prompts)
        ]
        answers = asyncio.gather(*(complete(http, disaggregated.url, body) for body in bodies))
        while not answers.done():
            workers = {w["role"]: w for w in await asyncio.to_thread(disaggregated.workers)}
            most = max(most, workers["decode"]["blocks"]["leased"])
            placed = max(placed, workers["prefill"]["num_running"] + workers["prefill"]["num_waiting"])
            await asyncio.sleep(0.1)
        await answers
    assert placed == num_prompts, "all of them were on the prefill worker at once"
    # Those that share a step, the next ones, and whichever are landing or answered: on a busy machine four were seen.
    assert 0 < most <= num_prompts // 2 * (num_blocks + 1), "blocks of prompts that were still queued"
