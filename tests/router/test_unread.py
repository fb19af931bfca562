"""Answers that nobody reads: every one is cut, holds its place until then, and no more is held than is allowed."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
import pytest_asyncio

from router.outlet import Unread
from router.tokenizer import Tokenizer
from tests.router.test_event_stream import LONG_ID, LONG_TEXT, long_tokenizer
from tests.router.workers import Stage, staged

__all__ = ["long_tokenizer"]

STALL_S = 0.4
NUM_LONG = 60  # twice what the kernel's buffers of both sides can take
COMPLETIONS = "/v1/completions"
ECHO: dict[str, Any] = {"model": "m", "prompt": [[LONG_ID] * NUM_LONG], "max_tokens": 0, "echo": True}
UNREAD: dict[str, tuple[str, dict[str, Any]]] = {
    "echo": (COMPLETIONS, ECHO),
    "echo stream": (COMPLETIONS, {**ECHO, "stream": True}),
    "echo stream of several": (COMPLETIONS, {**ECHO, "stream": True, "prompt": [[LONG_ID] * 20] * 3}),
    "detokenize": ("/detokenize", {"tokens": [LONG_ID] * NUM_LONG}),
    "short": ("/detokenize", {"tokens": [LONG_ID] * 3}),
    "tokenize": ("/tokenize", {"prompt": "ab " * 200_000, "return_token_strs": True}),
}


@pytest_asyncio.fixture
async def stage(long_tokenizer: Tokenizer) -> AsyncIterator[Stage]:
    async with staged(long_tokenizer, client_stall_s=STALL_S, max_num_requests=3) as stage:
        await stage.pair(max_model_len=1_000_000, num_blocks=100)
        yield stage


def _head(path: str, num_bytes: int, method: str = "POST") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {num_bytes}\r\n\r\n".encode()


async def _send(stage: Stage, data: bytes) -> socket.socket:
    """Send bytes on a socket with a small buffer, and read nothing."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", stage.router.http_port))
    await loop.sock_sendall(client, data)
    return client


async def _ask(stage: Stage, path: str, body: dict[str, Any]) -> socket.socket:
    data = json.dumps(body).encode()
    return await _send(stage, _head(path, len(data)) + data)


async def _is_cut(client: socket.socket) -> bool:
    """Read what the kernel has; whether the rest was dropped."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(5):
            while await loop.sock_recv(client, 1 << 20):
                pass
    except ConnectionResetError:
        return True
    return False


def _unread(stage: Stage) -> Unread:
    return stage.router._http._unread


@pytest.mark.parametrize("kind", UNREAD)
async def test_whoever_does_not_read_an_answer_is_cut(stage: Stage, kind: str) -> None:
    with await _ask(stage, *UNREAD[kind]) as client:
        await stage.until(lambda: _unread(stage).num_bytes > 0)
        await stage.until(lambda: _unread(stage).num_bytes == 0)
        assert await _is_cut(client)
    assert stage.router.switchboard.num_requests == 0


async def test_whoever_asks_on_and_on_without_reading_is_cut(stage: Stage) -> None:
    with await _send(stage, _head("/metrics", 0, "GET") * 200) as client:
        await stage.until(lambda: _unread(stage).num_bytes > 0)
        await stage.until(lambda: _unread(stage).num_bytes == 0)
        assert await _is_cut(client)


async def test_an_error_that_cannot_be_sent_keeps_no_connection(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.doorway.UNREAD_ERROR_S", 0.2)
    with await _send(stage, b"NONSENSE\r\n\r\n") as client:
        async with asyncio.timeout(5):
            assert b"400" in await asyncio.get_running_loop().sock_recv(client, 100)
    await asyncio.sleep(0.3)
    assert not stage.router.switchboard.num_requests


async def test_a_byte_now_and_then_is_no_reading(stage: Stage) -> None:
    loop = asyncio.get_running_loop()
    with await _ask(stage, *UNREAD["echo"]) as client:
        await stage.until(lambda: _unread(stage).num_bytes > 0)
        begin_s = loop.time()
        while _unread(stage).num_bytes and loop.time() - begin_s < 5:
            await loop.sock_recv(client, 1)
            await asyncio.sleep(0.02)
    assert _unread(stage).num_bytes == 0


async def test_who_closes_its_half_and_reads_nothing_is_cut(stage: Stage) -> None:
    with await _ask(stage, *UNREAD["echo"]) as client:
        await stage.until(lambda: _unread(stage).num_bytes > 0)
        client.shutdown(socket.SHUT_WR)
        await stage.until(lambda: _unread(stage).num_bytes == 0)
        assert await _is_cut(client)


@pytest.mark.parametrize("kind", ["echo", "detokenize"])
async def test_who_reads_slowly_gets_all_of_it_and_may_ask_again(stage: Stage, kind: str) -> None:
    path, body = UNREAD[kind]
    loop = asyncio.get_running_loop()
    with await _ask(stage, path, body) as client:
        for _ in range(2):
            found, length = b"", None
            while length is None or len(found) < length:
                found += await loop.sock_recv(client, 32768)
                await asyncio.sleep(STALL_S / 200)
                if length is None and b"\r\n\r\n" in found:
                    head = found.partition(b"\r\n\r\n")[0]
                    length = len(head) + 4 + int(head.lower().partition(b"content-length: ")[2].split()[0])
            answer = json.loads(found.partition(b"\r\n\r\n")[2])
            text = answer["choices"][0]["text"] if kind == "echo" else answer["prompt"]
            assert text == LONG_TEXT * NUM_LONG
            data = json.dumps(body).encode()
            await loop.sock_sendall(client, _head(path, len(data)) + data)


async def test_an_unread_answer_holds_as_many_places_as_it_has_choices(stage: Stage) -> None:
    several = {**ECHO, "prompt": [[LONG_ID] * 30] * 3}
    with await _ask(stage, COMPLETIONS, several):
        await stage.until(lambda: stage.router.switchboard.num_requests == 3)
        status, body, headers = await stage.post(COMPLETIONS, {**ECHO, "prompt": "a"})
        assert status == 429 and "3 requests are unfinished" in body["error"]["message"] and headers["Retry-After"]
        await stage.until(lambda: stage.router.switchboard.num_requests == 0)
    assert (await stage.post(COMPLETIONS, {**ECHO, "prompt": "a"}))[0] == 200
    status, body, _ = await stage.post(COMPLETIONS, {**ECHO, "prompt": ["a"] * 4})
    assert status == 429, "more than there are places"


async def test_what_is_held_for_all_is_bounded_and_the_longest_silent_goes_first(long_tokenizer: Tokenizer) -> None:
    limit = NUM_LONG * len(LONG_TEXT) * 2
    async with staged(long_tokenizer, max_unread_bytes=limit) as stage:
        await stage.pair(max_model_len=1_000_000, num_blocks=100)
        clients = []
        for number in range(1, 4):
            clients.append(await _ask(stage, *UNREAD["echo"]))
            await stage.until(lambda: len(_unread(stage)) == min(number, 2) or _unread(stage).num_cut > 0)  # noqa: B023
        await stage.until(lambda: _unread(stage).num_cut == 1)
        assert 0 < _unread(stage).num_bytes <= limit
        assert await _is_cut(clients[0])
        for client in clients[1:]:
            client.close()
        await stage.until(lambda: _unread(stage).num_bytes == 0)
        with suppress(OSError):
            clients[0].close()


async def test_a_client_that_leaves_before_the_head_leaves_nothing(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    for path, body in UNREAD.values():
        (await _ask(stage, path, body)).close()
    await stage.until(lambda: stage.router.switchboard.num_requests == 0)
    await asyncio.sleep(0.1)
    assert _unread(stage).num_bytes == 0 and "Traceback" not in caplog.text
