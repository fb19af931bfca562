"""One streamed completion: how its bytes are cut into events, and what each kind of server makes of a reply."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator

import pytest

from bench.client import Budgets, Events, Reply, stream
from bench.servers import Api, Server
from tests.bench.openai_server import GAP_S, OpenAiServer, openai_server

NUM_TOKENS = 8


@pytest.fixture
async def server() -> AsyncIterator[OpenAiServer]:
    async with openai_server() as server:
        yield server


async def ask(
    server: OpenAiServer,
    model: str,
    api: Api = "completions",
    budgets: Budgets | None = None,
    reply: Reply | None = None,
) -> Reply:
    """Send one request to the server in the manner of `model`."""
    target = Server(server.url, model, "x", api, budgets=budgets or Budgets())
    reply = reply or Reply()
    async with target.new_session() as http:
        await stream(http, target.endpoint, target.body(" one two three", NUM_TOKENS), reply)
    return reply


# --- events ---

STREAM = (
    b": hello\n\ndata: one\n\nevent: x\ndata:two\r\n\r\nid: 7\rdata: three\rdata: more\r\r\n\ndata: \n\ndata: lost\n"
)
EXPECTED = [b"one", b"two", b"three\nmore", b""]


@pytest.mark.parametrize("seed", range(20))
def test_events_are_the_same_however_the_stream_is_cut(seed: int) -> None:
    rng, events, found, rest = random.Random(seed), Events(), [], STREAM
    while rest:
        size = rng.choice((1, 1, 2, 3, 7, 100)) if seed else 1
        found += events.feed(rest[:size])
        rest = rest[size:]
    assert found == EXPECTED


# --- replies ---


@pytest.mark.parametrize("model", ["plain", "counting", "closing-count", "torn", "no-done", "control"])
async def test_a_stream_gives_one_chunk_a_token(server: OpenAiServer, model: str) -> None:
    reply = await ask(server, model)
    assert reply.error is None
    assert reply.chunk_tokens == [1] * NUM_TOKENS
    assert reply.num_output_tokens == NUM_TOKENS and reply.num_prompt_tokens == 3


@pytest.mark.parametrize("model", ["plain", "greeting", "counting"])
async def test_chat_is_read_as_well_and_a_greeting_is_no_token(server: OpenAiServer, model: str) -> None:
    reply = await ask(server, model, "chat")
    assert reply.error is None
    assert reply.chunk_tokens == [1] * NUM_TOKENS and reply.num_prompt_tokens == 3 + 12
    assert server.bodies[0]["messages"] == [{"role": "user", "content": " one two three"}]
    assert reply.chunk_s[0] - reply.started_s >= GAP_S


async def test_tokens_are_spread_over_chunks_where_only_the_end_counts_them(server: OpenAiServer) -> None:
    reply = await ask(server, "pairs")
    assert reply.chunk_tokens == [2] * (NUM_TOKENS // 2)


async def test_without_any_count_a_chunk_is_a_token(server: OpenAiServer) -> None:
    reply = await ask(server, "no-usage")
    assert reply.num_prompt_tokens is None
    assert reply.num_output_tokens == NUM_TOKENS == sum(reply.chunk_tokens)


async def test_times_are_those_of_the_server(server: OpenAiServer) -> None:
    reply = await ask(server, "jittery")
    gaps_s = [b - a for a, b in zip(reply.chunk_s, reply.chunk_s[1:], strict=False)]
    assert gaps_s.index(max(gaps_s)) == 1 and 0.59 < max(gaps_s) < 1.5
    assert reply.started_s < reply.chunk_s[0] and reply.chunk_s[-1] <= reply.finished_s


@pytest.mark.parametrize(
    ("model", "words", "num_chunks"),
    [
        ("refuses", 'HTTP 422: {"error": {"message": "unknown field ignore_eos"}}', 0),
        ("error-event", "the worker is gone", 2),
        ("garbage", "no completion chunk", 2),
        ("cut-short", "ended before the answer did", 2),
        ("hangs-up", "Client", 2),
        ("stalls", "gave up waiting", 2),
    ],
)
async def test_every_failure_is_told_and_keeps_what_came_before(
    server: OpenAiServer, model: str, words: str, num_chunks: int
) -> None:
    reply = await ask(server, model, budgets=Budgets(silence_s=0.2))
    assert reply.error is not None and words in reply.error
    assert reply.chunk_tokens == [1] * num_chunks and reply.finished_s >= reply.started_s > 0


async def test_the_budget_of_the_whole_request_is_kept(server: OpenAiServer) -> None:
    begin_s = time.monotonic()
    reply = await ask(server, "stalls", budgets=Budgets(request_s=0.2))
    assert reply.error == "gave up waiting: the request's budget is spent"
    assert time.monotonic() - begin_s < 5


async def test_nobody_there_is_an_error_of_the_reply() -> None:
    reply = await ask(OpenAiServer("http://127.0.0.1:9"), "plain")
    assert reply.error is not None and "127.0.0.1" in reply.error and not reply.chunk_s


async def test_a_stream_that_is_asked_to_stop_hangs_up_at_its_next_token(server: OpenAiServer) -> None:
    reply = Reply()
    task = asyncio.create_task(ask(server, "jittery", reply=reply))
    while len(reply.chunk_s) < 2:
        await asyncio.sleep(0.001)
    reply.is_asked_to_stop = True
    await task
    assert reply.is_cut and reply.error is None
    assert len(reply.chunk_s) == 3 and reply.chunk_s[2] - reply.chunk_s[1] > 0.59, "the long gap is seen to its end"


async def test_a_cancelled_stream_is_settled_and_the_server_is_left(server: OpenAiServer) -> None:
    reply = Reply()
    task = asyncio.create_task(ask(server, "stalls", reply=reply))
    while len(reply.chunk_s) < 2:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert reply.chunk_tokens == [1, 1] and reply.finished_s > 0
    while not server.num_left:
        await asyncio.sleep(0.01)


# --- counting, event by event ---


def settled(*events: dict[str, object]) -> Reply:
    """Feed events to a reply, one a second, and settle it."""
    reply = Reply()
    for second, event in enumerate(events):
        reply.take(json.dumps(event).encode(), float(second))
    reply.settle()
    return reply


def text(piece: str, **more: object) -> dict[str, object]:
    """Return a chunk of text."""
    return {"choices": [{"text": piece, **more}]}


def usage(num_tokens: int) -> dict[str, object]:
    """Return a last chunk that counts."""
    return {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": num_tokens}}


def test_token_ids_count_a_chunk() -> None:
    reply = settled(text("a", token_ids=[1]), text("bcd", token_ids=[2, 3, 4]), usage(4))
    assert reply.chunk_tokens == [1, 3]


def test_an_end_token_that_shows_no_text_goes_with_the_last_chunk() -> None:
    assert settled(text("a"), text("b"), text("", finish_reason="stop"), usage(3)).chunk_tokens == [1, 2]


def test_empty_pieces_that_were_no_tokens_are_dropped() -> None:
    reply = settled(text(""), text("a"), text(""), text("b"), text(""), usage(3))
    assert reply.chunk_s == [1.0, 2.0, 3.0] and reply.chunk_tokens == [1, 1, 1]


def test_usage_that_stays_zero_until_the_end_is_no_count() -> None:
    zero = {"usage": {"prompt_tokens": 0, "completion_tokens": 0}}
    reply = settled({**text("a"), **zero}, {**text("b"), **zero}, usage(2))
    assert reply.chunk_tokens == [1, 1] and reply.num_prompt_tokens == 1


def test_more_chunks_than_tokens_still_add_up() -> None:
    reply = settled(text("a"), text("b"), text("c"), usage(2))
    assert sum(reply.chunk_tokens) == 2 and len(reply.chunk_s) == 3
