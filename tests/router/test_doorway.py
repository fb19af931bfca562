"""The clients' door: what a head may say, how an answer ends, who leaves when, and what a probe is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import socket
import struct
from typing import Any

import pytest

from router.tokenizer import Tokenizer
from tests.router.workers import CHAT, HI, LENGTH, Stage, answer, staged

BODY = b'{"model": "m", "prompt": "a", "max_tokens": 2}'
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
COMPLETIONS = "/v1/completions"


def head(*lines: str, path: str = COMPLETIONS, version: str = "1.1", method: str = "POST") -> bytes:
    kind = ["Host: x", "Content-Type: application/json"]
    return "\r\n".join([f"{method} {path} HTTP/{version}", *kind, *lines, "", ""]).encode()


async def answered(stage: Stage, data: bytes, within_s: float = 5.0) -> tuple[int, dict[str, str], bytes, bool]:
    """Send bytes; return status, headers and body of the answer, and whether the connection then ended."""
    reader, writer = await asyncio.open_connection("127.0.0.1", stage.router.http_port)
    try:
        writer.write(data)
        async with asyncio.timeout(within_s):
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            if " 100 " in first:
                first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}
            body = await reader.readexactly(int(headers["content-length"])) if "content-length" in headers else b""
        try:
            async with asyncio.timeout(0.5 if body else within_s):
                rest = await reader.read()
                return int(first.split()[1]), headers, body + rest, True
        except TimeoutError:
            return int(first.split()[1]), headers, body, False
    finally:
        writer.close()


CL = f"Content-Length: {len(BODY)}"
REFUSED: list[tuple[str, bytes, int]] = [
    ("gzip, chunked", head("Transfer-Encoding: gzip, chunked") + CHUNKS, 400),
    ("deflate , chunked", head("Transfer-Encoding: deflate , chunked") + CHUNKS, 400),
    ("chunked, chunked", head("Transfer-Encoding: chunked, chunked") + CHUNKS, 400),
    ("chunked, identity", head("Transfer-Encoding: chunked, identity") + CHUNKS, 400),
    ("identity, chunked", head("Transfer-Encoding: identity, chunked") + CHUNKS, 400),
    ("identity", head("Transfer-Encoding: identity", CL) + BODY, 400),
    ("identity alone", head("Transfer-Encoding: identity"), 400),
    ("no coding", head("Transfer-Encoding:"), 400),
    ("no coding with length", head("Transfer-Encoding:", CL) + BODY, 400),
    ("comma", head("Transfer-Encoding: ,chunked") + CHUNKS, 400),
    ("comma after", head("Transfer-Encoding: chunked,") + CHUNKS, 400),
    ("parameter", head("Transfer-Encoding: chunked;q=1") + CHUNKS, 400),
    ("quoted", head('Transfer-Encoding: "chunked"') + CHUNKS, 400),
    ("vertical tab", head("Transfer-Encoding: \x0bchunked") + CHUNKS, 400),
    ("Kelvin", head("Transfer-Encoding: chun\u212aed") + CHUNKS, 400),
    ("twice", head("Transfer-Encoding: chunked", "Transfer-Encoding: chunked") + CHUNKS, 400),
    ("gzip and chunked", head("Transfer-Encoding: gzip", "Transfer-Encoding: chunked") + CHUNKS, 400),
    ("with length", head("Transfer-Encoding: chunked", CL) + CHUNKS, 400),
    ("after length", head(CL, "Transfer-Encoding: chunked") + CHUNKS, 400),
    ("of HTTP/1.0", head("Transfer-Encoding: chunked", version="1.0") + CHUNKS, 400),
    ("blank before colon", head("Transfer-Encoding : chunked") + CHUNKS, 400),
    ("blank before colon of length", head(f"Content-Length : {len(BODY)}") + BODY, 400),
    ("folded", head("Transfer-Encoding:\r\n chunked") + CHUNKS, 400),
    ("folded before", head("X: a\r\n b", CL) + BODY, 400),
    ("bare line feeds", head(CL).replace(b"\r\n", b"\n") + BODY, 400),
    ("one bare line feed", head("X: a\nY: b", CL) + BODY, 400),
    ("bare carriage return", head("X: a\rY: b", CL) + BODY, 400),
    ("line feeds in chunks", head("Transfer-Encoding: chunked") + CHUNKS.replace(b"\r\n", b"\n"), 400),
    ("blank after size", head("Transfer-Encoding: chunked") + CHUNKS.replace(b"\r\n", b" \r\n", 1), 400),
    ("hex prefix", head("Transfer-Encoding: chunked") + b"0x" + CHUNKS, 400),
    ("same length twice", head(CL, CL) + BODY, 400),
    ("lengths in a list", head(f"{CL}, {len(BODY)}") + BODY, 400),
    ("plus", head(f"Content-Length: +{len(BODY)}") + BODY, 400),
    ("two hosts", head("Host: y", CL) + BODY, 400),
    ("gzip", head("Content-Encoding: gzip", CL) + BODY, 415),
    ("br", head("Content-Encoding: br", CL) + BODY, 415),
    ("identity then gzip", head("Content-Encoding: identity", "Content-Encoding: gzip", CL) + BODY, 415),
    ("identity and gzip", head("Content-Encoding: identity, gzip", CL) + BODY, 415),
    ("gzip of a GET", head("Content-Encoding: gzip", path="/version", method="GET"), 415),
    ("Expect", head("Expect: 200-ok", CL) + BODY, 417),
    ("Expect of nothing there", head("Expect: foo", CL, path="/nowhere") + BODY, 417),
    ("Expect of a GET", head("Expect: foo", path="/health", method="GET"), 417),
    ("two Expects", head("Expect: 100-continue", "Expect: foo", CL) + BODY, 417),
    ("Expect in a list", head("Expect: 100-continue, foo", CL) + BODY, 417),
    ("nothing there", head(CL, path="/nowhere") + BODY, 404),
    ("another method", head(CL, path="/version") + BODY, 405),
    ("PUT", head(CL, method="PUT") + BODY, 405),
    ("CONNECT", b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    ("too large", head("Content-Length: 999999999"), 413),
    ("too large to count", head("Content-Length: 18446744073709551615"), 413),
    ("another type", head(CL).replace(b"/json", b"/xml") + BODY, 415),
    ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    ("much of a head", head(*(f"X-{i}: {'x' * 4000}" for i in range(30)))[:-4], 431),
]


@pytest.mark.parametrize(("data", "expected"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
async def test_what_others_may_read_otherwise_is_refused_in_openais_shape(
    stage: Stage, data: bytes, expected: int
) -> None:
    await stage.pair()
    status, headers, body, has_ended = await answered(stage, data)
    error = json.loads(body)["error"]
    assert status == error["code"] == expected and set(error) == {"message", "type", "param", "code"}
    assert headers["content-type"].startswith("application/json") and headers["x-request-id"]
    if expected not in (404, 405):
        assert has_ended or expected in (413, 415), "what follows would be read as a request"
    await stage.ready()


@pytest.mark.parametrize(
    "data",
    [
        head("Transfer-Encoding: chunked") + CHUNKS,
        head("transfer-encoding: CHUNKED") + CHUNKS,
        head("Content-Encoding: identity", CL) + BODY,
        head("Expect: 100-continue", CL) + BODY,
        head("Expect: 100-Continue", CL) + BODY,
        head("Expect: foo", CL, version="1.0") + BODY,
    ],
)
async def test_what_is_plain_is_taken(stage: Stage, data: bytes) -> None:
    prefill, decode = await stage.pair()
    asked = asyncio.create_task(answered(stage, data))
    await answer(prefill, decode, "ok", LENGTH)
    status, _, body, _ = await asked
    assert status == 200 and b'"text":"ok"' in body


async def test_a_refused_request_names_its_client(stage: Stage) -> None:
    _, headers, _, _ = await answered(stage, head("Expect: foo", "X-Request-ID: mine", CL) + BODY)
    assert headers["x-request-id"] == "mine"
    _, headers, _, _ = await answered(stage, head("Expect: foo", "X-Request-ID: m\xe9", CL) + BODY)
    assert headers["x-request-id"].isalnum()


# --- the end of an answer ---


@pytest.mark.parametrize("connection", ["keep-alive", "close", "Keep-Alive, x"])
async def test_a_stream_of_http_1_0_ends_with_its_connection(stage: Stage, connection: str) -> None:
    prefill, decode = await stage.pair()
    body = json.dumps({"model": "m", "prompt": "Hi", "max_tokens": 3, "stream": True}).encode()
    lines = (f"Connection: {connection}", f"Content-Length: {len(body)}")
    asked = asyncio.create_task(answered(stage, head(*lines, version="1.0") + body))
    await answer(prefill, decode, "abc", LENGTH)
    status, headers, told, has_ended = await asked
    assert status == 200 and has_ended and told.endswith(b"data: [DONE]\n\n")
    assert "transfer-encoding" not in headers and headers.get("connection", "close") != "keep-alive"


async def test_echoes_and_kept_streams_of_http_1_0_end_as_well(stage: Stage) -> None:
    prefill, decode = await stage.pair()
    echo = json.dumps({"model": "m", "prompt": "Hi", "max_tokens": 0, "echo": True, "stream": True}).encode()
    lines = ("Connection: keep-alive", f"Content-Length: {len(echo)}")
    _, headers, told, has_ended = await answered(stage, head(*lines, version="1.0") + echo)
    assert has_ended and told.endswith(b"data: [DONE]\n\n")
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    kept = json.dumps({"model": "m", "prompt": "Hi", "max_tokens": 3, "stream": True}).encode()
    lines = ("Connection: keep-alive", f"Content-Length: {len(kept)}")
    named = ("X-Request-ID: kept", "X-Resume-For: 5")
    asked = asyncio.create_task(answered(stage, head(*lines, *named, version="1.0") + kept))
    await answer(prefill, decode, "abc", LENGTH)
    _, headers, told, has_ended = await asked
    assert has_ended and b"data: [DONE]" in told
    assert headers["content-type"] == "text/event-stream; charset=utf-8"


async def test_a_whole_answer_of_http_1_0_keeps_the_connection_that_is_wished_kept(stage: Stage) -> None:
    status, headers, body, has_ended = await answered(
        stage, head("Connection: keep-alive", path="/version", version="1.0", method="GET")
    )
    assert status == 200 and not has_ended and int(headers["content-length"]) == len(body)
    assert headers["connection"] == "keep-alive"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/v1/responses"])
async def test_every_stream_of_events_says_its_charset(stage: Stage, path: str) -> None:
    prefill, decode = await stage.pair()
    bodies: dict[str, dict[str, Any]] = {
        CHAT: HI,
        COMPLETIONS: {"model": "m", "prompt": "a"},
        "/v1/responses": {"model": "m", "input": "a"},
    }
    body = bodies[path]
    playing = asyncio.create_task(answer(prefill, decode, "\xe9!", LENGTH))
    async with stage.http.post(f"{stage.url}{path}", json={**body, "stream": True}) as response:
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert '"\xe9"' in await response.text()
    await playing


# --- clients that leave ---


@pytest.mark.parametrize("kind", ["stream", "whole", "refused", "echo", "kept", "tokens"])
async def test_a_client_that_leaves_at_any_time_is_no_error(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    caplog.set_level(logging.INFO)
    bodies: dict[str, dict[str, Any]] = {
        "stream": {"prompt": "Hi", "max_tokens": 3, "stream": True},
        "kept": {"prompt": "Hi", "max_tokens": 3, "stream": True},
        "whole": {"prompt": "Hi", "max_tokens": 3},
        "refused": {"prompt": "Hi", "max_tokens": -1},
        "echo": {"prompt": "Hi" * 100, "max_tokens": 0, "echo": True, "stream": True},
        "tokens": {"prompt": "Hi" * 100},
    }
    path = "/tokenize" if kind == "tokens" else COMPLETIONS
    body = json.dumps({"model": "m", **bodies[kind]}).encode()
    dice = random.Random(kind)
    async with staged(tokenizer) as stage:
        prefill, decode = await stage.pair()

        async def play() -> None:
            while True:
                with contextlib.suppress(AssertionError, TimeoutError):
                    await answer(prefill, decode, "abc", LENGTH)

        playing = asyncio.create_task(play())
        for number in range(60):
            lines = [f"Content-Length: {len(body)}"]
            lines += [f"X-Request-ID: {number}", "X-Resume-For: 1"] if kind == "kept" else []
            await _leave(stage, head(*lines, path=path) + body, dice.uniform(0.0, 0.006), bool(number % 2))
        await asyncio.sleep(0.1)
        playing.cancel()
        await asyncio.gather(playing, return_exceptions=True)
    wrong = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR or record.exc_info]
    assert wrong == []


async def _leave(stage: Stage, data: bytes, after_s: float, by_reset: bool) -> None:
    client = socket.create_connection(("127.0.0.1", stage.router.http_port))
    client.sendall(data)
    await asyncio.sleep(after_s)
    if by_reset:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


async def test_a_client_that_leaves_just_before_the_head_is_told_in_one_line(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    prefill, decode = await stage.pair()
    begin = pytest.importorskip("router.event_stream").EventStream.begin

    async def begin_late(stream: Any) -> None:
        # The connection ends between the first event and the head, and nobody is cancelled for it yet.
        stream._request.transport.close()
        await begin(stream)

    monkeypatch.setattr("router.event_stream.EventStream.begin", begin_late)
    body = json.dumps({"model": "m", "prompt": "Hi", "max_tokens": 3, "stream": True}).encode()
    playing = asyncio.create_task(answer(prefill, decode, "abc", LENGTH))
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        await answered(stage, head(f"Content-Length: {len(body)}") + body)
    await playing
    await stage.until(lambda: any("connection ended" in record.getMessage() for record in caplog.records))
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR or record.exc_info]


# --- names ---


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2K", "\u202eabc", "caf\xe9", "", "x" * 129, "a\x85b", "a\u2028b"])
async def test_a_name_that_is_not_fit_is_refused_in_a_body(stage: Stage, name: str) -> None:
    await stage.pair()
    for path, body in ((CHAT, HI), (COMPLETIONS, {"model": "m", "prompt": "a"})):
        status, told, headers = await stage.post(path, {**body, "request_id": name, "max_tokens": 1})
        assert status == 400 and told["error"]["param"] == "request_id"
        assert headers["X-Request-ID"].isalnum()


async def test_a_fit_name_in_a_body_comes_back(stage: Stage) -> None:
    prefill, decode = await stage.pair()
    asked = asyncio.create_task(stage.post(CHAT, {**HI, "request_id": "my name: 7"}))
    await answer(prefill, decode, "ok", LENGTH)
    status, body, headers = await asked
    assert status == 200 and body["id"] == "chatcmpl-my name: 7" and headers["X-Request-ID"] == "my name: 7"


# --- probes ---


async def test_liveness_is_not_readiness(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer, api_keys=("k",)) as stage:

        async def probe(path: str) -> tuple[int, dict[str, Any]]:
            async with stage.http.get(f"{stage.url}{path}") as response:
                return response.status, await response.json()

        assert await probe("/livez") == (200, {"status": "ok"})
        status, body = await probe("/readyz")
        assert status == 503 and body["missing"] == ["no prefill worker", "no decode worker"]
        await stage.pair()
        assert await probe("/readyz") == (200, {"status": "ok", "missing": []})
        stage.router.switchboard.is_draining = True
        assert (await probe("/readyz"))[0] == 503 and "shutting down" in (await probe("/readyz"))[1]["missing"][0]
        assert (await probe("/livez"))[0] == 200
