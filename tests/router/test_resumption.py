"""Streams that a client takes up again: ids, the rest after them, who may have it, and for how long it is kept."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from protocol.wire import Abort, Prefill, Reserve
from router.event_stream import LIMIT_BYTES
from router.resumption import Entry, EventLog, numbered
from router.tokenizer import Tokenizer
from tests.router.tiny import byte_id, byte_ids
from tests.router.workers import CHAT, HI, LENGTH, ScriptedWorker, Stage, staged

TEXT = "abcdefghij"
BODY = {**HI, "stream": True, "max_tokens": len(TEXT), "stream_options": {"include_usage": True}}
NAMED = {"X-Request-ID": "mine", "X-Resume-For": "5"}


def after(num_tokens: int, **more: str) -> dict[str, str]:
    """Return the headers of a client that comes back."""
    return {**NAMED, "Last-Event-ID": str(num_tokens), **more}


def post(stage: Stage, headers: dict[str, str], **fields: Any) -> asyncio.Task[aiohttp.ClientResponse]:
    """Ask, without waiting for the answer."""
    return asyncio.create_task(_post(stage, headers, fields))


async def _post(stage: Stage, headers: dict[str, str], fields: dict[str, Any]) -> aiohttp.ClientResponse:
    return await stage.http.post(f"{stage.url}{CHAT}", json={**BODY, **fields}, headers=headers)


async def one(response: aiohttp.ClientResponse) -> tuple[int | None, Any]:
    """Read one event: its id and its data; both None at the end."""
    event_id = None
    async for line in response.content:
        if line.startswith(b"id: "):
            event_id = int(line[4:])
        elif line.startswith(b"data: "):
            return event_id, line[6:].strip().decode()
    return None, None


async def rest(response: aiohttp.ClientResponse) -> tuple[list[int | None], str]:
    """Read to the end: ids of all events, and the text."""
    assert response.status == 200, await response.text()
    ids, text, data = [], "", None
    async with response:
        while data != "[DONE]":
            event_id, data = await one(response)
            assert data is not None, "no [DONE]"
            ids.append(event_id)
            if data != "[DONE]":
                chunk = json.loads(data)
                text += "".join(choice["delta"].get("content", "") for choice in chunk["choices"])
    return ids, text


async def begin(stage: Stage, num_tokens: int, headers: dict[str, str] = NAMED) -> tuple[Any, Reserve]:
    """Open a stream and generate some of it."""
    prefill, decode = stage.workers
    asked = post(stage, headers)
    reserve = await decode.hear(Reserve)
    await prefill.first(byte_id(TEXT[0]))
    response = await asked
    assert await one(response) is not None
    decode.emit(reserve, byte_ids(TEXT[1:num_tokens]))
    for index in range(1, num_tokens):
        assert (await one(response))[0] == index + 1
    return response, reserve


def finish(decode: ScriptedWorker, reserve: Reserve, num_tokens: int) -> None:
    """Generate what follows that many tokens."""
    decode.emit(reserve, byte_ids(TEXT[num_tokens:]), start=num_tokens, finish=LENGTH)


async def test_events_have_ids_only_where_the_client_asked_for_them(stage: Stage) -> None:
    await stage.pair()
    response, reserve = await begin(stage, 4)
    finish(stage.workers[1], reserve, 4)
    assert await rest(response) == ([5, 6, 7, 8, 9, 10, 10, 10], "efghij")
    asked = post(stage, {"X-Request-ID": "other"})
    reserve = await stage.workers[1].hear(Reserve)
    await stage.workers[0].first(byte_id("a"))
    finish(stage.workers[1], reserve, 1)
    async with await asked as answer:
        assert b"id: " not in await answer.content.read()


async def test_who_comes_back_gets_the_rest_and_generation_did_not_stop(stage: Stage) -> None:
    _, decode = await stage.pair()
    response, reserve = await begin(stage, 4)
    response.close()
    decode.emit(reserve, byte_ids(TEXT[4:6]), start=4)
    again = await post(stage, after(3))
    finish(decode, reserve, 6)
    assert await rest(again) == ([4, 5, 6, 7, 8, 9, 10, 10, 10], "defghij")
    assert not decode.heard(Abort) and not decode.heard(Reserve)


async def test_a_finished_stream_is_kept_for_who_missed_its_end(stage: Stage) -> None:
    _, decode = await stage.pair()
    response, reserve = await begin(stage, 4)
    response.close()
    finish(decode, reserve, 4)
    await stage.until(lambda: stage.router.switchboard.num_requests == 0)
    assert await rest(await post(stage, after(9))) == ([10, 10, 10], "j")
    assert (await rest(await post(stage, after(10))))[0] == [10, 10], "usage and [DONE] belong to no token"
    assert (await rest(await post(stage, NAMED)))[1] == TEXT


async def test_nobody_comes_back_and_the_request_is_cancelled(stage: Stage) -> None:
    _, decode = await stage.pair()
    response, reserve = await begin(stage, 4, {**NAMED, "X-Resume-For": "1"})
    response.close()
    await asyncio.sleep(0.5)
    assert not decode.heard(Abort) and stage.router.switchboard.num_requests == 1
    assert (await decode.hear(Abort)).transfer_id == reserve.transfer_id
    assert stage.router.switchboard.num_requests == 0


async def test_a_newcomer_takes_over_and_the_old_connection_is_cut(stage: Stage) -> None:
    _, decode = await stage.pair()
    old, reserve = await begin(stage, 4)
    new = await post(stage, after(2))
    with pytest.raises(aiohttp.ClientError):
        await rest(old)
    finish(decode, reserve, 4)
    assert (await rest(new))[1] == TEXT[2:]


async def test_another_body_is_refused_and_disturbs_nothing(stage: Stage) -> None:
    _, decode = await stage.pair()
    response, reserve = await begin(stage, 4)
    async with await post(stage, after(0), temperature=0.5) as refused:
        assert refused.status == 409 and "another body" in (await refused.json())["error"]["message"]
    finish(decode, reserve, 4)
    assert (await rest(response))[1] == TEXT[4:]


async def test_an_unknown_id_is_generated_again_with_the_same_seed_and_sent_from_there(tokenizer: Tokenizer) -> None:
    seeds = []
    for headers in (NAMED, after(7)):
        async with staged(tokenizer) as stage:
            prefill, decode = await stage.pair()
            asked = post(stage, headers)
            reserve = await decode.hear(Reserve)
            seeds.append((reserve.sampling.seed, (await prefill.first(byte_id(TEXT[0]))).sampling.seed))
            finish(decode, reserve, 1)
            ids, text = await rest(await asked)
    assert (ids, text) == ([8, 9, 10, 10, 10], "hij")
    assert len({seed for pair in seeds for seed in pair}) == 1


async def test_the_clients_own_seed_stands(stage: Stage) -> None:
    _, decode = await stage.pair()
    asked = post(stage, NAMED, seed=7)
    assert (await decode.hear(Reserve)).sampling.seed == 7
    asked.cancel()


async def test_a_stream_that_failed_is_generated_again(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer, max_placements=1) as stage:
        prefill, decode = await stage.pair()
        response, reserve = await begin(stage, 4, {**NAMED, "Connection": "close"})
        decode.emit(reserve, [byte_id("x")], start=8)
        event_id, data = await one(response)
        assert event_id == 4 and "error" in json.loads(data)
        asked = post(stage, after(4))
        again = await decode.hear(Reserve)
        await prefill.first(byte_id(TEXT[0]))
        finish(decode, again, 1)
        assert (await rest(await asked))[1] == TEXT[4:]


async def test_a_stream_that_failed_while_nobody_read_is_generated_again(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer, max_placements=1) as stage:
        prefill, decode = await stage.pair()
        response, reserve = await begin(stage, 4)
        response.close()
        await asyncio.sleep(0.05)
        decode.emit(reserve, [byte_id("x")], start=8)
        await decode.hear(Abort)
        asked = post(stage, after(4))
        again = await decode.hear(Reserve)
        await prefill.first(byte_id(TEXT[0]))
        finish(decode, again, 1)
        assert (await rest(await asked))[1] == TEXT[4:]


async def test_what_fails_before_its_first_event_is_an_ordinary_error(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer, placement_wait_s=0.3) as stage:
        prefill, decode = await stage.pair()
        prefill.beat(is_draining=True)
        await asyncio.sleep(0.05)
        async with await post(stage, NAMED) as response:
            assert response.status == 503 and "error" in await response.json()
        assert not decode.heard(Reserve) and not prefill.heard(Prefill)


@pytest.mark.parametrize(
    ("headers", "fields", "words"),
    [
        ({"X-Resume-For": "5"}, {}, "X-Request-ID"),
        ({"Last-Event-ID": "5"}, {}, "X-Request-ID"),
        ({"Last-Event-ID": "5", "X-Request-ID": "a"}, {}, "X-Resume-For"),
        ({**NAMED, "X-Resume-For": "0"}, {}, "from 1 to 60"),
        ({**NAMED, "X-Resume-For": "61"}, {}, "from 1 to 60"),
        ({**NAMED, "X-Resume-For": "1e1"}, {}, "from 1 to 60"),
        (after(0, **{"Last-Event-ID": "-1"}), {}, "Last-Event-ID"),
        (after(0, **{"Last-Event-ID": "²"}), {}, "Last-Event-ID"),
        (NAMED, {"n": 2}, "one choice"),
        (NAMED, {"stream": False, "stream_options": None}, "only streams"),
    ],
)
async def test_headers_that_cannot_be_meant_get_400(
    stage: Stage, headers: dict[str, str], fields: dict[str, Any], words: str
) -> None:
    await stage.pair()
    async with await post(stage, headers, **fields) as response:
        assert response.status == 400
        assert words in (await response.json())["error"]["message"]
    assert stage.router.switchboard.num_requests == 0


# --- what is kept ---


def test_a_log_drops_what_was_read_and_nothing_else() -> None:
    events, log = [b"%d" % n * 50_000 for n in range(9)], EventLog()
    for number, data in enumerate(events):
        log.append(Entry(number + 1, True, data))
    assert log.num_bytes == log.unread_bytes == 450_000, "unread: nothing may go"
    assert log.read(2, 120_000) == events[2] + events[3]
    assert log.num_dropped_tokens == 4 and log.num_bytes == log.unread_bytes == 250_000 <= LIMIT_BYTES
    assert log.read(0, 10) == events[4], "one event is never divided"
    log.append(Entry(10, True, b"y" * 50_000))
    assert log.num_dropped_tokens == 5
    log.rewind()
    log.append(Entry(10, False, b"end"))
    assert log.read(10, 1 << 20) == b"end", "it belongs to no token"


async def test_unread_events_pause_a_stream_and_a_reader_ends_the_pause(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.resumption.PAUSE_BYTES", 1000)
    monkeypatch.setattr("router.resumption.GO_ON_BYTES", 500)
    prefill, decode = await stage.pair()
    response, reserve = await begin(stage, 2)
    response.close()
    await asyncio.sleep(0.05)
    for index in range(2, 10):
        decode.emit(reserve, byte_ids(TEXT[index]), start=index)
        await asyncio.sleep(0.01)
    assert (await decode.hear(Abort)).transfer_id == reserve.transfer_id
    dispatch = stage.router.switchboard.dispatch
    assert (dispatch.num_running, dispatch.num_waiting, stage.router.switchboard.num_requests) == (0, 0, 1)
    asked = post(stage, after(2))
    again = await decode.hear(Reserve)
    num_emitted = len(again.emitted)
    assert 2 < num_emitted < 10 and list(again.emitted) == byte_ids(TEXT[:num_emitted])
    await prefill.first(byte_id(TEXT[0]))
    finish(decode, again, num_emitted)
    assert (await rest(await asked))[1] == TEXT[2:]


async def test_what_was_dropped_is_generated_again(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.resumption.LIMIT_BYTES", 700)
    prefill, decode = await stage.pair()
    response, first = await begin(stage, 8)
    asked = post(stage, after(1))
    assert (await decode.hear(Abort)).transfer_id == first.transfer_id
    again = await decode.hear(Reserve)
    await prefill.first(byte_id(TEXT[0]))
    finish(decode, again, 1)
    assert (await rest(await asked))[1] == TEXT[1:]
    response.close()


async def test_finished_streams_are_forgotten_oldest_first(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer, max_num_requests=2) as stage:
        prefill, decode = await stage.pair()
        for name in ("a", "b", "c"):
            response, reserve = await begin(stage, 2, {**NAMED, "X-Request-ID": name})
            finish(decode, reserve, 2)
            await rest(response)
        for name, is_kept in (("b", True), ("c", True), ("a", False)):
            asked = post(stage, after(5, **{"X-Request-ID": name}))
            if not is_kept:
                reserve = await decode.hear(Reserve)
                await prefill.first(byte_id(TEXT[0]))
                finish(decode, reserve, 1)
            assert (await rest(await asked))[1] == TEXT[5:]


@pytest.fixture
def keys(tmp_path: Path) -> str:
    """Give a file with the keys of two tenants."""
    file = tmp_path / "keys"
    file.write_text("ka alice\nkb bob\n")
    return str(file)


def owned(key: str, name: str) -> dict[str, str]:
    """Return the headers of a tenant's client."""
    return {**NAMED, "X-Request-ID": name, "Authorization": f"Bearer {key}"}


async def test_the_ids_of_one_tenant_say_nothing_to_another(tokenizer: Tokenizer, keys: str) -> None:
    async with staged(tokenizer, api_key_files=(keys,)) as stage:
        prefill, decode = await stage.pair()
        response, first = await begin(stage, 2, owned("ka", "job"))
        asked = post(stage, {**owned("kb", "job"), "Last-Event-ID": "0"}, messages=[{"role": "user", "content": "b"}])
        other = await decode.hear(Reserve)
        assert other.transfer_id != first.transfer_id
        await prefill.first(byte_id(TEXT[0]))
        finish(decode, other, 1)
        assert (await rest(await asked))[1] == TEXT, "neither refused, nor another's"
        same = post(stage, {**owned("kb", "job"), "Last-Event-ID": "5"}, messages=[{"role": "user", "content": "b"}])
        assert (await rest(await same))[1] == TEXT[5:]
        clash = post(stage, owned("kb", "job"), messages=[{"role": "user", "content": "c"}])
        async with await clash as refused:
            assert refused.status == 409
        response.close()
        asked = post(stage, {**owned("ka", "job"), "Last-Event-ID": "2"})
        finish(decode, first, 2)
        assert (await rest(await asked))[1] == TEXT[2:]


async def test_a_tenant_with_many_kept_streams_forgets_its_own_and_nobody_elses(
    tokenizer: Tokenizer, keys: str
) -> None:
    async with staged(tokenizer, api_key_files=(keys,), max_num_requests=4) as stage:
        prefill, decode = await stage.pair()
        for key, name in (("ka", "1"), *(("kb", str(number)) for number in range(6))):
            response, reserve = await begin(stage, 2, owned(key, name))
            finish(decode, reserve, 2)
            await rest(response)
        for key, name in (("ka", "1"), ("kb", "5"), ("kb", "4"), ("kb", "3")):
            asked = post(stage, {**owned(key, name), "Last-Event-ID": "5"})
            assert (await rest(await asked))[1] == TEXT[5:], (key, name)
        assert len(stage.router._http._kept) == 4


async def test_a_router_that_ends_leaves_no_task_behind(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer) as stage:
        await stage.pair()
        response, _ = await begin(stage, 2)
        response.close()
    await asyncio.sleep(0)
    assert [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("keep")] == []


def test_events_are_numbered_one_by_one() -> None:
    assert numbered(b"data: {}\n\ndata: [DONE]\n\n", 3) == b"id: 3\ndata: {}\n\nid: 3\ndata: [DONE]\n\n"
