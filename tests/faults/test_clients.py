"""Clients that stop reading, lose their connection, come back, or come twice; and a router that dies under a stream."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest

from tests.e2e.client import completion, session, stream
from tests.e2e.server import Server, wait_until
from tests.faults.conftest import CLIENT_STALL_S

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.ucx, pytest.mark.slow]

QUIET_BUDGET_S = 5.0
READ_BUDGET_S = 60.0
RESTART_BUDGET_S = 30.0
# Each event has some 2 KB: hundreds of them are more than a router holds for one client.
LARGE = completion("A stream of many words:", max_tokens=400, temperature=1.0, seed=5, ignore_eos=True, logprobs=20)
# No seed: it follows from the request's id.
SAMPLED: dict[str, Any] = {
    "prompt": "The candidate",
    "max_tokens": 200,
    "temperature": 1.0,
    "ignore_eos": True,
    "stream": True,
}


@pytest.fixture
def server(one_pair: Server) -> Server:
    """The shared pair of workers, whole and quiet."""
    wait_until(lambda: len(one_pair.workers()) == 2 and is_quiet(one_pair), RESTART_BUDGET_S, "whole")
    return one_pair


@dataclass(slots=True)
class Reading:
    """What one connection brought: the id and the tokens of each event."""

    ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    is_done: bool = False
    next_id: int = 0

    @property
    def headers(self) -> dict[str, str]:
        """What a client says that goes on from here."""
        return {"Last-Event-ID": str(self.ids[-1])}

    def take(self, line: bytes) -> None:
        """Take one line of a stream of events."""
        if line.startswith(b"id: "):
            self.next_id = int(line[4:])
        elif line.strip() == b"data: [DONE]":
            self.is_done = True
        elif line.startswith(b"data: "):
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            # Of an event that broke off there is nothing but its id, which does not count.
            self.ids.append(self.next_id)
            self.token_ids += [t for choice in chunk["choices"] for t in choice["token_ids"]]


def named(name: str, keep_s: int = 30) -> dict[str, str]:
    """Return the headers of a stream that can be resumed."""
    return {"X-Request-ID": name, "X-Resume-For": str(keep_s)}


async def read(
    http: aiohttp.ClientSession,
    server: Server,
    headers: dict[str, str],
    num_tokens: int | None = None,
    into: Reading | None = None,
    **fields: Any,
) -> Reading:
    """Read a stream to its end, or up to so many tokens, and break the connection there."""
    reading, body = into or Reading(), completion(**{**SAMPLED, **fields})
    async with http.post(f"{server.url}/v1/completions", json=body, headers=headers) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            reading.take(line)
            if num_tokens is not None and len(reading.token_ids) >= num_tokens:
                response.close()
                break
    return reading


async def oracle(http: aiohttp.ClientSession, server: Server, name: str) -> list[int]:
    """Return the tokens of a request with this id, and wait until it is forgotten."""
    whole = await read(http, server, named(name, 1))
    assert whole.is_done and len(whole.token_ids) == whole.ids[-1] == SAMPLED["max_tokens"]
    await asyncio.sleep(1.2)
    return whole.token_ids


def raw(server: Server, body: dict[str, Any]) -> socket.socket:
    """Send a request on a socket with a small buffer, and read nothing."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(READ_BUDGET_S)
    client.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    data = json.dumps({**body, "stream": True}).encode()
    # Of HTTP/1.0, because its body comes without chunks.
    head = f"POST /v1/completions HTTP/1.0\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    client.sendall(head.encode() + data)
    return client


def unfinished(server: Server) -> bool:
    """Whether a request has workers or waits for some."""
    requests = server.get("/census")["requests"]
    return bool(requests["running"] or requests["waiting"])


def is_quiet(server: Server) -> bool:
    """Whether no worker holds anything for anybody, and all blocks are accounted for."""
    census = server.get("/census")
    return bool(census["is_balanced"]) and all(w["blocks"]["leased"] == 0 for w in census["workers"])


async def test_a_client_that_stops_reading_holds_nothing_harms_nobody_and_may_read_on(server: Server) -> None:
    other = completion("The other stream", max_tokens=40, seed=1, temperature=1.0)
    async with session() as http:
        expected = await stream(http, server.url, LARGE)
        expected_other = await stream(http, server.url, other)
        num_accepted = server.total("baton_request_success_total")
        with raw(server, LARGE) as slow:
            wait_until(lambda: unfinished(server), QUIET_BUDGET_S, "begun")
            wait_until(lambda: not unfinished(server) and is_quiet(server), READ_BUDGET_S, "paused")
            assert (await stream(http, server.url, other)).token_ids == expected_other.token_ids
            assert server.total("baton_request_success_total") == num_accepted + 1, "only the other one has finished"
            data = await asyncio.to_thread(_rest, slow)
    reading = Reading()
    for line in data.partition(b"\r\n\r\n")[2].split(b"\n"):
        reading.take(line)
    assert reading.is_done and reading.token_ids == expected.token_ids
    wait_until(lambda: is_quiet(server), QUIET_BUDGET_S, "quiet")


def _rest(client: socket.socket) -> bytes:
    found = []
    while data := client.recv(1 << 16):
        found.append(data)
    return b"".join(found)


def test_a_client_that_never_reads_again_is_cut(server: Server) -> None:
    words = f"its client has read nothing for {CLIENT_STALL_S:g} s"
    assert words not in server.log.read_text()
    with raw(server, LARGE) as slow:
        wait_until(lambda: unfinished(server), QUIET_BUDGET_S, "begun")
        wait_until(lambda: not unfinished(server), READ_BUDGET_S, "paused")
        begin_s = time.monotonic()
        wait_until(lambda: words in server.log.read_text(), 2 * CLIENT_STALL_S, "cut")
        assert time.monotonic() - begin_s > CLIENT_STALL_S / 2, "not before its time"
        with pytest.raises(ConnectionResetError):
            _rest(slow)
    wait_until(lambda: is_quiet(server), QUIET_BUDGET_S, "quiet")


async def test_a_connection_that_breaks_is_taken_up_again(server: Server) -> None:
    async with session() as http:
        expected = await oracle(http, server, "broken")
        begun = await read(http, server, named("broken"), num_tokens=20)
        ended = await read(http, server, named("broken") | begun.headers)
        twice = await read(http, server, named("broken") | begun.headers)
    assert ended.is_done and begun.token_ids + ended.token_ids == expected
    assert begun.token_ids + twice.token_ids == expected, "what is finished is kept as well"
    assert ended.ids[0] == begun.ids[-1] + 1


async def test_a_newcomer_takes_over_and_a_stranger_does_not(server: Server) -> None:
    async with session() as http:
        expected = await oracle(http, server, "wanted")
        first = asyncio.create_task(read(http, server, named("wanted")))
        await asyncio.sleep(0.3)
        body = completion(**{**SAMPLED, "prompt": "What did it say?"})
        async with http.post(f"{server.url}/v1/completions", json=body, headers=named("wanted")) as refused:
            assert refused.status == 409
        second = await read(http, server, named("wanted") | {"Last-Event-ID": "5"})
        assert second.token_ids == expected[5:]
        with pytest.raises(aiohttp.ClientError):
            await first


async def test_nobody_comes_back_and_everything_is_freed(server: Server) -> None:
    async with session() as http:
        await read(http, server, named("left", 1), num_tokens=5, max_tokens=2000)
    assert unfinished(server), "it goes on for a while"
    wait_until(lambda: not unfinished(server) and is_quiet(server), QUIET_BUDGET_S, "freed")


async def test_a_router_that_is_killed_costs_time_and_no_token(server: Server) -> None:
    begun = Reading()
    async with session() as http:
        expected = await oracle(http, server, "outlived")
        first = asyncio.create_task(read(http, server, named("outlived"), into=begun))
        async with asyncio.timeout(QUIET_BUDGET_S):
            while len(begun.token_ids) < 60:
                await asyncio.sleep(0.005)
        os.kill(server.children()["router"], signal.SIGKILL)
        with pytest.raises(aiohttp.ClientError):
            await first
        assert begun.token_ids == expected[: begun.ids[-1]] and not begun.is_done
        ended = await _read_when_ready(http, server, named("outlived") | begun.headers)
    assert ended.is_done and begun.token_ids + ended.token_ids == expected
    wait_until(lambda: len(server.workers()) == 2 and is_quiet(server), RESTART_BUDGET_S, "whole again")


async def _read_when_ready(http: aiohttp.ClientSession, server: Server, headers: dict[str, str]) -> Reading:
    """Come back as a client would: again after a while, as long as the answer is 503."""
    body, deadline_s = completion(**SAMPLED), time.monotonic() + RESTART_BUDGET_S
    while True:
        async with http.post(f"{server.url}/v1/completions", json=body, headers=headers) as response:
            if response.status != 503:
                break
        assert time.monotonic() < deadline_s, "no router took it up again"
        await asyncio.sleep(0.2)
    return await read(http, server, headers)
