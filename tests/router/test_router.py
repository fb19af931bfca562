"""Answers and failures: a whole router between an HTTP client and scripted workers on the real wire."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import openai
import pytest

from protocol.request import TokenLogprobs
from protocol.wire import Declined, GrammarFailed, Links, Prefill, Reserve
from router.tokenizer import Tokenizer
from tests.router.tiny import byte_id, byte_ids
from tests.router.workers import (
    CHAT,
    HI,
    LENGTH,
    Stage,
    aborted,
    answer,
    events,
    staged,
)

# --- answers ---


async def test_the_openai_client_gets_an_answer_and_a_stream(stage: Stage) -> None:
    prefill, decode = await stage.pair()
    client = openai.AsyncOpenAI(base_url=f"{stage.url}/v1", api_key="x", max_retries=0)
    arguments: dict[str, Any] = {**HI, "max_tokens": 20}
    asked = asyncio.create_task(client.chat.completions.create(**arguments))
    await answer(prefill, decode, "héllo")
    whole = await asked
    assert whole.choices[0].message.content == "héllo" and whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None and whole.usage.completion_tokens == 7
    streaming = asyncio.create_task(client.chat.completions.create(**arguments, stream=True))
    await answer(prefill, decode, "héllo")
    chunks = [chunk async for chunk in await streaming]
    await client.close()
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "héllo"
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == "h"
    assert [c.choices[0].finish_reason for c in chunks] == [None] * 5 + ["stop"]


async def test_nothing_is_sent_before_the_first_token_and_one_token_per_chunk(stage: Stage) -> None:
    prefill, decode = await stage.pair()
    body = {**HI, "stream": True, "max_tokens": 3, "stream_options": {"include_usage": True}}
    asked = asyncio.create_task(stage.http.post(f"{stage.url}{CHAT}", json=body))
    reserve = await decode.hear(Reserve)
    await asyncio.sleep(0.05)
    assert not asked.done(), "no headers, no role chunk before the first token"
    await prefill.first(byte_id("a"), num_cached_tokens=3)
    async with await asked as response:
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        first = json.loads((await response.content.readline())[6:])
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": "a"}
        decode.emit(reserve, byte_ids("bc"), finish=LENGTH)
        rest = await events(response)
    assert [c["choices"][0]["delta"] for c in rest[:2]] == [{"content": "b"}, {"content": "c"}]
    assert [c["choices"][0]["finish_reason"] for c in rest[:2]] == [None, "length"]
    assert rest[0]["usage"] is None and rest[2]["choices"] == [] and rest[3:] == ["[DONE]"]
    usage = rest[2]["usage"]
    assert usage["completion_tokens"] == 3 and usage["prompt_tokens_details"] == {"cached_tokens": 3}
    assert usage["total_tokens"] == usage["prompt_tokens"] + 3
    assert {c["id"] for c in [first, *rest[:3]]} == {first["id"]} and first["object"] == "chat.completion.chunk"


async def test_running_usage_is_in_every_chunk(stage: Stage) -> None:
    prefill, decode = await stage.pair()
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": "m", "prompt": "ab", "stream": True, "max_tokens": 3, "stream_options": options}
    asked = asyncio.create_task(stage.http.post(f"{stage.url}/v1/completions", json=body))
    await answer(prefill, decode, "xyz", LENGTH)
    async with await asked as response:
        chunks = await events(response)
    assert [c["usage"]["completion_tokens"] for c in chunks[:-1]] == [1, 2, 3, 3]
    assert [c["choices"][0]["text"] for c in chunks[:3]] == ["x", "y", "z"]


async def test_a_stop_string_cuts_the_text_and_aborts_decode_at_once(stage: Stage) -> None:
    prefill, decode = await stage.pair()
    asked = asyncio.create_task(stage.post("/v1/completions", {"model": "m", "prompt": "q", "stop": ["cd"]}))
    reserve = await decode.hear(Reserve)
    await prefill.first(byte_id("a"))
    decode.emit(reserve, byte_ids("bcdef"))
    status, body, _ = await asked
    (choice,) = body["choices"]
    assert (status, choice["text"], choice["finish_reason"], choice["stop_reason"]) == (200, "ab", "stop", "cd")
    assert body["usage"]["completion_tokens"] == 4
    await aborted(decode, reserve.transfer_id)


async def test_several_prompts_and_choices_come_back_in_order(stage: Stage) -> None:
    prefill, decode = await stage.pair()
    body = {"model": "m", "prompt": ["x", "y"], "n": 2, "seed": 5, "max_tokens": 1, "return_token_ids": True}
    asked = asyncio.create_task(stage.post("/v1/completions", body))
    seeds = {}
    for char in "ABCD":
        message = await prefill.first(byte_id(char), LENGTH, num_cached_tokens=1)
        assert message.decode_worker_id is None
        seeds[char] = (message.prompt, message.sampling.seed)
    _, answered, _ = await asked
    assert not decode.heard(Reserve)
    assert [c["index"] for c in answered["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in answered["choices"]] == list("ABCD")
    assert [c["token_ids"] for c in answered["choices"]] == [[byte_id(c)] for c in "ABCD"]
    assert list(seeds.values()) == [((byte_id(p),), s) for p in "xy" for s in (5, 6)]
    assert answered["usage"]["prompt_tokens"] == 2 and answered["usage"]["completion_tokens"] == 4
    assert answered["usage"]["prompt_tokens_details"]["cached_tokens"] == 2, "each prompt counts once"


async def test_echo_repeats_the_prompt(stage: Stage) -> None:
    prefill, decode = await stage.pair()
    body = {"model": "m", "prompt": "the", "echo": True, "max_tokens": 2}
    asked = asyncio.create_task(stage.post("/v1/completions", body))
    await answer(prefill, decode, "ab", LENGTH)
    assert (await asked)[1]["choices"][0]["text"] == "theab"
    streaming = asyncio.create_task(stage.http.post(f"{stage.url}/v1/completions", json={**body, "stream": True}))
    await answer(prefill, decode, "ab", LENGTH)
    async with await streaming as response:
        chunks = await events(response)
    assert [c["choices"][0]["text"] for c in chunks[:-1]] == ["thea", "b"]


def _logprobs(char: str) -> TokenLogprobs:
    return TokenLogprobs(-0.25, ((byte_id(char), -0.25), (0xE2 + 4, -1.5), (byte_id("z"), float("-inf"))), 1)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("late", [0.0, 0.05])
async def test_a_stream_of_several_prompts_counts_what_was_cached_of_each(stage: Stage, n: int, late: float) -> None:
    prefill, decode = await stage.pair(max_num_seqs=16)
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": "m", "prompt": ["q", "r", "s"], "n": n, "max_tokens": 2, "stream": True, "stream_options": options}
    asked = asyncio.create_task(stage.http.post(f"{stage.url}/v1/completions", json=body))
    for number in range(3 * n):
        reserve = await decode.hear(Reserve)
        await prefill.first(byte_id("a"), num_cached_tokens=16 * (1 + number // n))
        decode.emit(reserve, [byte_id("b")], finish=LENGTH)
        # Before, or while its handler waits for events: then its tokens go to the socket without the handler.
        await asyncio.sleep(late)
    async with await asked as response:
        usages = [chunk["usage"] for chunk in (await events(response))[:-1]]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert cached[-1] == 16 + 32 + 48 and cached == sorted(cached)
    assert usages[-1]["prompt_tokens"] == 3 and usages[-1]["completion_tokens"] == 6 * n


async def test_logprobs_in_both_shapes(stage: Stage) -> None:
    prefill, decode = await stage.pair()

    async def say_ab() -> None:
        reserve = await decode.hear(Reserve)
        await prefill.first(byte_id("a"), logprobs=_logprobs("a"))
        decode.emit(reserve, [byte_id("b")], finish=LENGTH, logprobs=_logprobs("b"))

    chat = asyncio.create_task(stage.post(CHAT, {**HI, "max_tokens": 2, "logprobs": True, "top_logprobs": 2}))
    await say_ab()
    content = (await chat)[1]["choices"][0]["logprobs"]["content"]
    assert [e["token"] for e in content] == ["a", "b"] and content[0]["logprob"] == -0.25
    assert content[0]["bytes"] == [97]
    assert content[0]["top_logprobs"][1] == {"token": "\ufffd", "logprob": -1.5, "bytes": [0xE2]}
    assert len(content[0]["top_logprobs"]) == 2
    body = {"model": "m", "prompt": "q", "max_tokens": 2, "logprobs": 3}
    completion = asyncio.create_task(stage.post("/v1/completions", body))
    await say_ab()
    found = (await completion)[1]["choices"][0]["logprobs"]
    assert found["tokens"] == ["a", "b"] and found["token_logprobs"] == [-0.25, -0.25]
    assert found["text_offset"] == [0, 1]
    assert found["top_logprobs"][1] == {"b": -0.25, "bytes:\\xe2": -1.5, "z": -9999.0}


async def test_a_character_split_over_tokens_makes_one_chunk(stage: Stage) -> None:
    prefill, decode = await stage.pair()
    body = {**HI, "stream": True, "max_tokens": 9, "return_token_ids": True}
    asked = asyncio.create_task(stage.http.post(f"{stage.url}{CHAT}", json=body))
    await answer(prefill, decode, "🚀é", LENGTH)
    async with await asked as response:
        chunks = (await events(response))[:-1]
    assert [c["choices"][0]["delta"].get("content") for c in chunks] == ["🚀", "é"]
    assert [c["choices"][0]["token_ids"] for c in chunks] == [byte_ids("🚀"), byte_ids("é")]


# --- when something goes wrong ---


async def test_a_client_that_leaves_a_stream_aborts_on_both_workers(stage: Stage) -> None:
    prefill, decode = await stage.pair()
    asked = asyncio.create_task(stage.http.post(f"{stage.url}{CHAT}", json={**HI, "stream": True}))
    reserve = await decode.hear(Reserve)
    message = await prefill.first(byte_id("a"))
    response = await asked
    await response.content.readline()
    response.close()
    await aborted(decode, reserve.transfer_id)
    await aborted(prefill, message.transfer_id)
    await stage.until(lambda: stage.router.switchboard.num_requests == 0)


async def test_a_client_that_leaves_before_the_first_token_aborts_too(stage: Stage) -> None:
    prefill, decode = await stage.pair()
    for stream in (True, False):
        asked = asyncio.create_task(stage.post(CHAT, {**HI, "stream": stream}))
        reserve = await decode.hear(Reserve)
        message = await prefill.hear(Prefill)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        await aborted(decode, reserve.transfer_id)
        await aborted(prefill, message.transfer_id)


async def test_a_lost_decode_worker_is_replaced_and_the_stream_goes_on(stage: Stage) -> None:
    prefill, decode = await stage.pair()
    asked = asyncio.create_task(stage.http.post(f"{stage.url}{CHAT}", json={**HI, "stream": True, "max_tokens": 9}))
    reserve = await decode.hear(Reserve)
    await prefill.first(byte_id("a"))
    decode.emit(reserve, byte_ids("bc"))
    async with await asked as response:
        for _ in range(6):  # three chunks, each followed by an empty line
            await response.content.readline()
        await decode.close()
        replacement = await stage.worker("d0", instance=2)
        replacement.say(Links(peers=(("p0", 1),)))
        again = await replacement.hear(Reserve)
        assert again.emitted == tuple(byte_ids("abc")) and again.epoch == reserve.epoch + 1
        assert again.request_id == reserve.request_id and again.transfer_id != reserve.transfer_id
        await prefill.hear(Prefill, lambda m: m.transfer_id == again.transfer_id)
        replacement.emit(again, byte_ids("de"), start=3, finish=LENGTH)
        rest = await events(response)
    assert [c["choices"][0]["delta"]["content"] for c in rest[:-1]] == ["d", "e"] and rest[-1] == "[DONE]"


async def test_a_declined_request_is_placed_again(stage: Stage) -> None:
    prefill, decode = await stage.pair()
    asked = asyncio.create_task(stage.post(CHAT, {**HI, "max_tokens": 2}))
    reserve = await decode.hear(Reserve)
    message = await prefill.hear(Prefill)
    decode.say(Declined(transfer_id=reserve.transfer_id, reason="no room"))
    await aborted(prefill, message.transfer_id)
    await answer(prefill, decode, "ok", LENGTH)
    assert (await asked)[1]["choices"][0]["message"]["content"] == "ok"


async def test_failing_before_the_first_token_is_an_http_error(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer, placement_wait_s=0.2) as stage:
        prefill, decode = await stage.pair()
        await decode.close()
        await stage.until(lambda: not stage.router.switchboard.registry.is_ready)
        status, body, headers = await stage.post(CHAT, {**HI, "stream": True})
        assert (status, body["error"]["code"], body["error"]["type"]) == (503, 503, "server_error")
        assert "no decode worker" in body["error"]["message"] and headers["Retry-After"] == "1"
        assert not prefill.heard(Prefill)


async def test_failing_in_the_stream_is_an_error_event(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer, placement_wait_s=0.2) as stage:
        prefill, decode = await stage.pair()
        asked = asyncio.create_task(stage.http.post(f"{stage.url}{CHAT}", json={**HI, "stream": True}))
        await decode.hear(Reserve)
        await prefill.first(byte_id("a"))
        async with await asked as response:
            await decode.close()
            found = await events(response)
        assert found[0]["choices"][0]["delta"]["content"] == "a"
        assert found[-1]["error"]["code"] == 503 and set(found[-1]["error"]) == {"message", "type", "param", "code"}
        assert "[DONE]" not in found


async def test_a_grammar_that_fails_is_told_as_the_clients_and_never_tried_again(stage: Stage) -> None:
    prefill, decode = await stage.pair()
    for is_stream in (False, True):
        asked = asyncio.create_task(stage.post(CHAT, {**HI, "stream": is_stream}))
        transfer_id = (await prefill.hear(Prefill)).transfer_id
        prefill.say(GrammarFailed(transfer_id=transfer_id, reason="grammar: too costly"))
        status, body, _ = await asked
        assert (status, body["error"]["type"]) == (400, "invalid_request_error") and "too costly" in str(body)
        await aborted(decode, transfer_id)
        prefill.received.clear()
        decode.received.clear()
    begun = asyncio.create_task(stage.http.post(f"{stage.url}{CHAT}", json={**HI, "stream": True}))
    reserve = await decode.hear(Reserve)
    await prefill.first(byte_id("a"))
    async with await begun as response:
        decode.say(GrammarFailed(transfer_id=reserve.transfer_id, reason="grammar: too costly"))
        found = await events(response)
    assert response.status == 200 and found[-1]["error"]["code"] == 400 and "[DONE]" not in found
    assert sum("error" in event for event in found) == 1 and found[0]["choices"][0]["delta"]["content"] == "a"
    assert not prefill.heard(Prefill) and not decode.heard(Reserve), "it was placed again"
    async with stage.http.get(f"{stage.url}/metrics") as response:
        lines = (await response.text()).splitlines()
    assert "baton_grammar_failures_total 3.0" in lines and 'baton_request_failed_total{reason="grammar"} 3.0' in lines
    assert 'baton_request_failed_total{reason="placements"} 0.0' in lines


async def test_a_newcomer_who_would_wait_too_long_is_shed(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer, max_wait_s=0.5) as stage:
        prefill, decode = await stage.pair()

        def ask(letter: str) -> Any:
            return stage.post("/v1/completions", {"model": "m", "prompt": 40 * letter, "max_tokens": 1})

        slow = asyncio.create_task(ask("x"))
        await asyncio.sleep(0.7)
        await prefill.first(byte_id("a"), LENGTH)
        assert (await slow)[0] == 200
        # The pace is one such request in 0.7 s: who comes alone is not made to wait for anyone.
        waiting = asyncio.create_task(ask("y"))
        await prefill.hear(Prefill)
        status, body, headers = await ask("z")
        assert (status, body["error"]["type"], headers["Retry-After"]) == (429, "rate_limit_error", "1")
        assert "the limit is 0.5 s" in body["error"]["message"]
        waiting.cancel()
        await stage.until(lambda: stage.router.switchboard.num_requests == 0)
        assert stage.router.switchboard.check_capacity() > 0, "nobody waits any more"
        await decode.close()


async def test_too_many_requests_are_shed_with_retry_after(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer, max_num_requests=1) as stage:
        prefill, decode = await stage.pair()
        asked = asyncio.create_task(stage.post(CHAT, {**HI, "max_tokens": 2}))
        await stage.until(lambda: stage.router.switchboard.num_requests == 1)
        status, body, headers = await stage.post(CHAT, HI)
        assert (status, body["error"]["type"], headers["Retry-After"]) == (429, "rate_limit_error", "1")
        await answer(prefill, decode, "ok", LENGTH)
        assert (await asked)[0] == 200
        assert (await stage.post(CHAT, {**HI, "n": 2}))[0] == 429
        async with stage.http.get(f"{stage.url}/metrics") as response:
            assert "baton_requests_shed_total 2.0" in await response.text()


async def test_a_router_that_has_just_started_lets_requests_wait_for_its_first_workers(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer, startup_wait_s=5.0) as stage:
        early = asyncio.create_task(stage.post(CHAT, {**HI, "max_tokens": 2}))
        await asyncio.sleep(0.2)
        assert not early.done(), "they may be on their way back from its predecessor"
        prefill, decode = await stage.pair()
        await answer(prefill, decode, "ok", LENGTH)
        assert (await early)[0] == 200


async def test_a_router_that_gets_no_workers_refuses_after_a_while(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer, startup_wait_s=0.3) as stage:
        begin_s = time.monotonic()
        status, body, _ = await stage.post(CHAT, HI)
        assert status == 503 and "no worker has registered yet" in body["error"]["message"]
        assert time.monotonic() - begin_s >= 0.2
        begin_s = time.monotonic()
        assert (await stage.post(CHAT, HI))[0] == 503
        assert time.monotonic() - begin_s < 0.2, "later ones at once"


async def test_priority_moves_the_deadline_that_prefill_orders_by(stage: Stage) -> None:
    prefill, _ = await stage.pair()
    deadlines = []
    for priority in (0, -1, 1):
        asked = asyncio.create_task(stage.post(CHAT, {**HI, "max_tokens": 1, "priority": priority}))
        deadlines.append((await prefill.first(100, LENGTH)).deadline_s)
        assert (await asked)[0] == 200
    usual, early, late = deadlines
    assert early < -1000 < usual < 1000 < late
