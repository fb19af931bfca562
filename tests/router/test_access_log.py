"""One line for each request: what it says, when there is one, and that nobody can forge one."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from pathlib import Path
from typing import Any

import grpc
import pytest

from protocol.wire import Links, Prefill, Reserve
from router.access_log import AccessLog
from router.rpc import baton_v1_pb2 as pb
from router.rpc import baton_v1_pb2_grpc as rpc
from router.tokenizer import Tokenizer
from tests.router.test_readouts import body_of, read_next
from tests.router.test_resumption import NAMED, after, post, rest
from tests.router.tiny import byte_id, byte_ids
from tests.router.workers import CHAT, HI, LENGTH, Stage, answer, staged


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    """Return a function that gives the lines so far, read as JSON."""
    caplog.set_level(logging.INFO, "router.access_log")

    def read() -> list[dict[str, Any]]:
        found = [record.getMessage() for record in caplog.records if record.name == "router.access_log"]
        assert not any(re.search(r"[\x00-\x1f\x7f-\x9f]", line) for line in found)
        return [json.loads(line) for line in found]

    return read


async def told(stage: Stage, lines: Any, count: int) -> list[dict[str, Any]]:
    """Wait for so many lines, and for a moment in which there might be more."""
    await stage.until(lambda: len(lines()) >= count)
    await asyncio.sleep(0.05)
    found: list[dict[str, Any]] = lines()
    assert len(found) == count, found
    return found


async def test_a_finished_request_has_one_line_with_all_that_is_known(tokenizer: Tokenizer, lines: Any) -> None:
    async with staged(tokenizer, access_log="json", api_keys=("k",)) as stage:
        prefill, decode = await stage.pair()
        headers = {"X-Request-ID": "mine", "Authorization": "Bearer k"}
        asked = asyncio.create_task(stage.post(CHAT, {**HI, "stream": False}, headers=headers))
        reserve = await answer(prefill, decode, "abc")
        assert (await asked)[0] == 200
        [line] = await told(stage, lines, 1)
    assert line.pop("time")
    for name in ("e2e_ms", "ttft_ms", "tpot_ms", "queue_ms"):
        assert line.pop(name) >= 0.0  # rounded to a tenth
    assert line.pop("prompt_tokens") > 1
    assert line == {
        "request_id": "mine",
        "endpoint": f"POST {CHAT}",
        "model": "m",
        "status": 200,
        "finish": "stop",
        "n": 1,
        "cached_tokens": 0,
        "output_tokens": 4,
        "prefill": "p0",
        "decode": "d0",
        "placements": 1,
        "failovers": 0,
        "transfers": str(reserve.transfer_id),
    }


async def test_choices_and_fail_overs_are_added_up_and_tenants_named(
    tokenizer: Tokenizer, lines: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    file.write_text("ka alice\n")
    async with staged(tokenizer, access_log="json", api_key_files=(str(file),)) as stage:
        caplog.set_level(logging.DEBUG, "router.switchboard")
        prefill, decode = await stage.pair()
        headers = {"Authorization": "Bearer ka", "X-Request-ID": "two"}
        asked = asyncio.create_task(stage.post(CHAT, {**HI, "n": 2, "max_tokens": 2}, headers=headers))
        await decode.hear(Reserve)
        other = await decode.hear(Reserve)
        successor = await stage.worker("d1")
        await decode.close()
        successor.say(Links(peers=(("p0", 1),)))
        for _ in range(2):
            reserve = await successor.hear(Reserve)
            placed = await prefill.hear(Prefill, lambda m: m.transfer_id == reserve.transfer_id)  # noqa: B023
            prefill.received.insert(0, placed)
            await prefill.first(byte_id("a"))
            successor.emit(reserve, [byte_id("b")], finish=LENGTH)
        assert (await asked)[0] == 200
        [line] = await told(stage, lines, 1)
    assert (line["tenant"], line["n"], line["output_tokens"], line["finish"]) == ("alice", 2, 4, "length")
    assert (line["placements"], line["failovers"], line["decode"]) == (4, 2, "d0,d1")
    assert str(other.transfer_id) in line["transfers"].split(",")
    placements = [r.getMessage() for r in caplog.records if f"placement {other.transfer_id}" in r.getMessage()]
    assert placements and all("request two" in line for line in placements), "lines of workers lead to the request"


async def test_what_is_refused_has_a_line_and_what_only_looks_has_none(tokenizer: Tokenizer, lines: Any) -> None:
    async with staged(tokenizer, access_log="json", max_num_requests=1) as stage:
        prefill, decode = await stage.pair()
        for path in ("/health", "/metrics", "/v1/models", "/load", "/census"):
            async with stage.http.get(f"{stage.url}{path}") as response:
                assert response.status == 200
        await stage.post(CHAT, {**HI, "model": "none"})
        await stage.post(CHAT, {**HI, "n": "x"})
        await stage.post("/nothing\x1b[31m\nhere", HI)
        running = asyncio.create_task(stage.post(CHAT, HI))
        await decode.hear(Reserve)
        await stage.post(CHAT, HI)
        running.cancel()
        await told(stage, lines, 5)
        await decode.close()
        await prefill.close()
        await stage.until(lambda: stage.router.switchboard.max_model_len is not None)
        stage.router.switchboard.is_draining = True
        await stage.post(CHAT, HI)
        await stage.post(CHAT, HI, headers={"Expect": "foo"})
        async with stage.http.put(f"{stage.url}{CHAT}") as response:
            assert response.status == 405
        found = await told(stage, lines, 8)
    assert [line["status"] for line in found] == [404, 400, 404, 429, 499, 503, 417, 405]
    assert [line.get("finish") for line in found] == [None] * 4 + ["cancelled", None, None, None]
    assert "Overloaded: 1 requests are unfinished" in found[3]["error"]
    assert all(line.get("error") or line["status"] == 499 for line in found)
    assert all(line["client"] == "127.0.0.1" and line["request_id"] for line in found)


async def test_who_has_no_key_is_told_of_by_address(tokenizer: Tokenizer, lines: Any) -> None:
    async with staged(tokenizer, access_log="json", api_keys=("k",)) as stage:
        await stage.pair()
        assert (await stage.post(CHAT, HI, headers={"Authorization": "Bearer stolen"}))[0] == 401
        [line] = await told(stage, lines, 1)
    assert (line["status"], line["client"]) == (401, "127.0.0.1") and "stolen" not in str(line)


async def test_a_stream_that_fails_says_why(tokenizer: Tokenizer, lines: Any) -> None:
    async with staged(tokenizer, access_log="json", placement_wait_s=0.3) as stage:
        prefill, decode = await stage.pair()
        body = {**HI, "stream": True, "max_tokens": 9}
        asked = asyncio.create_task(stage.http.post(f"{stage.url}{CHAT}", json=body))
        await prefill.first(byte_id("a"))
        async with await asked as response:
            await decode.close()
            await response.read()
        [line] = await told(stage, lines, 1)
    assert (line["status"], line["finish"], line["output_tokens"]) == (200, "failed", 1)
    assert line["error"].startswith("NotReady: ")


async def test_who_leaves_a_stream_that_has_begun_was_answered(tokenizer: Tokenizer, lines: Any) -> None:
    async with staged(tokenizer, access_log="json") as stage:
        prefill, _ = await stage.pair()
        asked = asyncio.create_task(stage.http.post(f"{stage.url}{CHAT}", json={**HI, "stream": True, "max_tokens": 9}))
        await prefill.first(byte_id("a"))
        response = await asked
        await response.content.readline()
        response.close()
        [line] = await told(stage, lines, 1)
    assert (line["status"], line["finish"], line["output_tokens"]) == (200, "cancelled", 1)


async def test_a_kept_stream_has_its_line_at_its_end_however_many_connections_read_it(
    tokenizer: Tokenizer, lines: Any
) -> None:
    async with staged(tokenizer, access_log="json") as stage:
        prefill, decode = await stage.pair()
        asked = post(stage, NAMED)
        reserve = await decode.hear(Reserve)
        await prefill.first(byte_id("a"))
        (await asked).close()
        again = post(stage, after(0))
        await asyncio.sleep(0.1)
        assert lines() == []
        decode.emit(reserve, byte_ids("bcdefghij"), finish=LENGTH)
        await rest(await again)
        [line] = await told(stage, lines, 1)
    assert (line["request_id"], line["status"], line["finish"], line["output_tokens"]) == ("mine", 200, "length", 10)


async def test_text_cannot_be_forged(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "router.access_log")
    clock = iter(range(100))
    with AccessLog("text", lambda: float(next(clock))).record("POST /x\n[router] ERROR \x1b[2K\x7f\u2028") as record:
        record.request_id = 'a" status=200\r\nforged'
        record.status = 400
        record.failed(ValueError("\x00\n" + "x" * 500))
    [line] = [record.getMessage() for record in caplog.records]
    assert line.isascii() and line.isprintable() and len(line) < 500
    assert "status=400 " in line and '"a\\" status=200\\r\\nforged"' in line


async def test_off_writes_nothing(tokenizer: Tokenizer, lines: Any) -> None:
    async with staged(tokenizer, access_log="off") as stage:
        await stage.pair()
        assert (await stage.post(CHAT, {**HI, "model": "none"}))[0] == 404
        await asyncio.sleep(0.02)
    assert lines() == []


async def test_calls_of_grpc_have_lines_with_its_own_status(tokenizer: Tokenizer, lines: Any) -> None:
    async with staged(tokenizer, access_log="json", grpc_port=0) as stage:
        prefill, decode = await stage.pair()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{stage.router.grpc_port}") as channel:
            stub = rpc.BatonStub(channel)
            call = stub.Generate(pb.GenerateRequest(request_id="g", prompt="hi", max_tokens=3))
            asked = asyncio.create_task(_all(call))
            await answer(prefill, decode, "abc", LENGTH)
            await asked
            with pytest.raises(grpc.aio.AioRpcError):
                await _all(stub.Generate(pb.GenerateRequest(model="none", prompt="hi", max_tokens=3)))
        found = await told(stage, lines, 2)
    assert [(line["endpoint"], line["status"]) for line in found] == [("Generate", "OK"), ("Generate", "NOT_FOUND")]
    assert (found[0]["request_id"], found[0]["output_tokens"], found[0]["client"]) == ("g", 3, "127.0.0.1")


async def _all(call: Any) -> list[Any]:
    return [message async for message in call]


async def test_readouts_have_one_line_for_all_of_them(tokenizer: Tokenizer, lines: Any) -> None:
    async with staged(tokenizer, access_log="json") as stage:
        prefill, _ = await stage.pair(max_model_len=4000, num_blocks=1000)
        asked = asyncio.create_task(stage.post("/v1/decisions", body_of(3)))
        for _ in range(3):
            await read_next(prefill, -1.0, -1.0)
        assert (await asked)[0] == 200
        [line] = await told(stage, lines, 1)
    assert (line["n"], line["finish"], line["placements"], line["status"]) == (3, "read", 3, 200)
    assert line["output_tokens"] == 0 and "ttft_ms" not in line
