"""Keys and tenants, pages of other origins, and connections that send something else than a request."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import ConfigError, Unauthorized
from protocol.wire import Prefill
from router.access import Access, Client
from router.tokenizer import Tokenizer
from tests.router.workers import CHAT, HI, LENGTH, Stage, answer, config, staged

BODY = json.dumps(HI).encode()


class Clock:
    """Seconds that a test sets."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def bearer(key: str) -> dict[str, str]:
    """Give the header that shows a key."""
    return {"Authorization": f"Bearer {key}"}


# --- keys ---


def test_without_keys_everybody_may_ask() -> None:
    access = Access((), (), Clock())
    assert access.is_open and access.client_of(None, None).tenant == "" and access.salt("", "x") == "x"


def test_a_key_is_needed_and_names_its_tenant(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nk1 alice\n\n  k2\tbob  \nk3\n")
    access = Access(("k0",), (str(file),), Clock())
    assert [access.client_of(f"bearer {key}", None).tenant for key in ("k0", "k1", "k2", "k3")] == [
        "",
        "alice",
        "bob",
        "",
    ]
    for given in (None, "", "k1", "Bearer", "Bearer ", "Bearer k", "Bearer k1 k2", "Basic k1", "Bearer \udcff"):
        with pytest.raises(Unauthorized):
            access.client_of(given, None)


def test_a_line_of_the_file_may_grant_a_priority_and_a_weight(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("k1 alice priority=-5 weight=3\nk2 bob\nk3 weight=2\nk4 alice weight=3\n")
    access = Access((), (str(file),), Clock())
    found = [access.client_of(f"Bearer k{n}", "10.0.0.1") for n in range(1, 5)]
    assert found == [
        Client("alice", "alice", 3, -5),
        Client("bob", "bob"),
        Client("", "", 2),
        Client("alice", "alice", 3),
    ]
    for given, ranks in ((found[0], [-5, -5, 0, 9]), (found[1], [0, 0, 0, 9])):
        assert [given.rank(priority) for priority in (-(1 << 31), -5, 0, 9)] == ranks


@pytest.mark.parametrize(
    "line",
    ["k a weight=0", "k a weight=1001", "k weight=1 a", "k a priority=x", "k a b=1", "k a priority=-3000000000"]
    + ["k a weight=1 weight=2", "k a weight=1\nk2 a weight=2", "k a=b"],
)
def test_a_grant_that_cannot_be_meant_is_refused_without_the_key(tmp_path: Path, line: str) -> None:
    file = tmp_path / "keys"
    file.write_text(line.replace("k ", "very-secret "))
    with pytest.raises(ConfigError, match="api-key-file") as raised:
        Access((), (str(file),), Clock())
    assert "very-secret" not in str(raised.value)


def test_without_keys_a_client_is_an_address_or_a_network(tmp_path: Path) -> None:
    access = Access((), (), Clock())
    addresses = ["10.0.0.1", "::ffff:10.0.0.1", "2001:db8::1", "2001:db8::ffff:2", "fe80::1%eth0", "", None, "@x"]
    names = [access.client_of(None, address).name for address in addresses]
    assert names == ["10.0.0.1"] * 2 + ["2001:db8::/64"] * 2 + ["fe80::/64"] + [""] * 3
    assert {access.client_of(None, address).tenant for address in addresses} == {""}


def test_no_salt_reaches_another_tenant() -> None:
    access = Access(("k",), (), Clock())
    salts = {access.salt(*pair) for pair in (("", ""), ("a", ""), ("", "a"), ("", "\0a"), ("a", "b"), ("", "a\0b"))}
    assert len(salts) == 6


def test_a_file_is_read_again_when_it_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, clock = tmp_path / "keys", Clock()
    file.write_text("old\n")
    access = Access((), (str(file),), clock)
    file.write_text("new tenant\n")
    assert access.client_of("Bearer old", None).tenant == "", "not within a second"
    clock.now_s = 2.0
    assert access.client_of("Bearer new", None).tenant == "tenant"
    with pytest.raises(Unauthorized):
        access.client_of("Bearer old", None)
    file.write_text("two words too many secret\n")
    clock.now_s = 4.0
    assert access.client_of("Bearer new", None).tenant == "tenant", "a broken file changes nothing"
    file.unlink()
    clock.now_s = 6.0
    assert access.client_of("Bearer new", None).tenant == "tenant"
    assert len(caplog.records) == 2 and "secret" not in caplog.text


@pytest.mark.parametrize("text", ["", "# nothing\n", "a b c\n", "kéy\n", "key ten/ant\n", "x" * 600, b"\xff\xfe"])
def test_a_file_that_cannot_be_used_is_refused_at_the_start(tmp_path: Path, text: str | bytes) -> None:
    file = tmp_path / "keys"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match="api-key-file"):
        Access((), (str(file),), Clock())
    with pytest.raises(ConfigError, match="cannot read"):
        Access((), (str(tmp_path / "none"),), Clock())


async def test_every_path_but_the_open_ones_needs_a_key(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer, api_keys=("k",)) as stage:
        await stage.pair()
        for path in (CHAT, "/v1/completions", "/v1/responses", "/tokenize", "/nonsense"):
            status, body, headers = await stage.post(path, HI)
            assert status == body["error"]["code"] == 401 and body["error"]["type"] == "authentication_error"
            assert headers["WWW-Authenticate"] == "Bearer" and headers["X-Request-ID"]
            assert (await stage.post(path, {}, headers=bearer("k")))[0] in (400, 404)
        for path, expected in (("/v1/models", 401), ("/census", 401), ("/health", 200), ("/metrics", 200)):
            async with stage.http.get(f"{stage.url}{path}") as response:
                assert response.status == expected


async def test_tenants_have_prefixes_of_their_own(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("ka alice\nkb bob\n")
    async with staged(tokenizer, api_key_files=(str(file),)) as stage:
        prefill, _ = await stage.pair()
        salts = []
        for key, fields in (("ka", {}), ("ka", {}), ("kb", {}), ("ka", {"cache_salt": "x"})):
            asked = asyncio.create_task(stage.post(CHAT, {**HI, "max_tokens": 1, **fields}, headers=bearer(key)))
            salts.append((await prefill.first(100, LENGTH)).cache_salt)
            assert (await asked)[0] == 200
        assert salts[0] == salts[1] and len(set(salts)) == 3 and all(salts)


# --- other origins ---


async def test_allowed_origins_are_told_so(tokenizer: Tokenizer) -> None:
    origin = "https://a.example"
    async with staged(tokenizer, allowed_origins=(origin,), api_keys=("k",)) as stage:
        await stage.pair()
        asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        async with stage.http.options(f"{stage.url}{CHAT}", headers={"Origin": origin, **asks}) as response:
            assert response.status == 204 and response.headers["Access-Control-Allow-Origin"] == origin
            assert response.headers["Access-Control-Allow-Headers"] == "authorization"
            assert "POST" in response.headers["Access-Control-Allow-Methods"]
        async with stage.http.options(f"{stage.url}{CHAT}", headers={"Origin": "https://b", **asks}) as response:
            assert response.status == 403 and "Access-Control-Allow-Origin" not in response.headers
        _, _, headers = await stage.post(CHAT, {}, headers={"Origin": origin})
        assert headers["Access-Control-Allow-Origin"] == origin and headers["Vary"] == "Origin", "on errors too"
        _, _, headers = await stage.post(CHAT, {}, headers={"Origin": "https://b"})
        assert "Access-Control-Allow-Origin" not in headers


async def test_a_stream_is_for_every_origin_where_all_are_allowed(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer, allowed_origins=("*",)) as stage:
        prefill, decode = await stage.pair()
        body = {**HI, "max_tokens": 2, "stream": True}
        asked = asyncio.create_task(stage.http.post(f"{stage.url}{CHAT}", json=body, headers={"Origin": "http://x"}))
        await answer(prefill, decode, "ok", LENGTH)
        async with await asked as response:
            assert response.headers["Access-Control-Allow-Origin"] == "*"
            assert "X-Request-ID" in response.headers["Access-Control-Expose-Headers"]


async def test_without_origins_nothing_is_said_and_options_is_no_method(stage: Stage) -> None:
    headers = {"Origin": "http://x", "Access-Control-Request-Method": "POST"}
    async with stage.http.options(f"{stage.url}{CHAT}", headers=headers) as response:
        assert response.status == 405 and "Access-Control-Allow-Origin" not in response.headers


@pytest.mark.parametrize("origin", ["example.com", "https://example.com/", "ftp://x"])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match="allowed_origins"):
        config(allowed_origins=(origin,))


# --- connections ---


async def raw(stage: Stage, data: bytes, then: bytes = b"") -> tuple[int, dict[str, Any]]:
    """Send bytes, and return status and JSON body of what comes back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", stage.router.http_port, limit=1 << 24)
    try:
        writer.write(data)
        await writer.drain()
        if then:
            writer.write(then)
        async with asyncio.timeout(10):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = int(head.lower().partition("content-length:")[2].partition("\r\n")[0])
            return int(head.split()[1]), json.loads(await reader.readexactly(length))
    finally:
        writer.close()


def head(*lines: str, path: str = CHAT) -> bytes:
    """Give the head of a POST."""
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *lines, "", ""]).encode()


HEADS: list[tuple[str, bytes, int]] = [
    ("long header", head("X-Long: " + "x" * 10_000), 431),
    ("many headers", head(*(f"X-{i}: 1" for i in range(400))), 431),
    ("long path", head("Content-Length: 0", path="/" + "x" * 10_000), 431),
    ("no HTTP", b"\x16\x03\x01\x02\x00hello\r\n\r\n", 400),
    ("no version", b"GET /\r\n\r\n", 404),
    ("two lengths", head("Content-Length: 5", "Content-Length: 6") + b"hello!", 400),
    ("length and chunks", head("Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n", 400),
    ("negative length", head("Content-Length: -5"), 400),
    ("length no number", head("Content-Length: five"), 400),
    ("blank in a name", head("X Y: 1", "Content-Length: 0"), 400),
    ("nul in a value", head("X: a\0b", "Content-Length: 0"), 400),
    ("broken chunks", head("Transfer-Encoding: chunked") + b"zz\r\nhello\r\n", 400),
    ("chunk too long", head("Transfer-Encoding: chunked") + b"ffffffffffffffffff\r\n", 400),
    ("gzip", head("Content-Encoding: gzip", f"Content-Length: {len(gzip.compress(BODY))}") + gzip.compress(BODY), 415),
    ("unknown encoding", head("Content-Encoding: zstd", "Content-Length: 2") + b"{}", 415),
    ("announced too large", head(f"Content-Length: {1 << 40}"), 413),
]


@pytest.mark.parametrize(("data", "expected"), [case[1:] for case in HEADS], ids=[case[0] for case in HEADS])
async def test_what_is_no_request_is_refused_in_openais_shape(stage: Stage, data: bytes, expected: int) -> None:
    await stage.pair()
    status, body = await raw(stage, data, then=b"{}" if expected == 413 else b"")
    assert status == body["error"]["code"] == expected and body["error"]["message"]
    await stage.ready()


async def test_a_bomb_is_not_unpacked(stage: Stage) -> None:
    await stage.pair()
    bomb = gzip.compress(b" " * (64 << 20))
    status, body = await raw(stage, head("Content-Encoding: gzip", f"Content-Length: {len(bomb)}") + bomb)
    assert status == 415 and "compressed" in body["error"]["message"]


async def test_a_body_that_does_not_come_is_408(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer, request_read_s=0.2) as stage:
        await stage.pair()
        status, body = await raw(stage, head(f"Content-Length: {len(BODY)}") + BODY[:5])
        assert status == body["error"]["code"] == 408


async def test_half_a_head_and_silence_are_closed(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer, idle_s=0.3) as stage:
        for data in (b"", head("X: 1")[:-2]):
            reader, writer = await asyncio.open_connection("127.0.0.1", stage.router.http_port)
            writer.write(data)
            async with asyncio.timeout(5):
                assert await reader.read() == b""
            writer.close()


async def test_a_body_may_come_byte_by_byte(stage: Stage) -> None:
    await stage.pair()
    body = b'{"model": "x"}'
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    status, answered = await raw(stage, head("Transfer-Encoding: chunked") + chunks)
    assert status == 400 and "messages" in answered["error"]["message"]


async def test_a_client_that_leaves_within_its_body_harms_nobody(stage: Stage) -> None:
    prefill, _ = await stage.pair()
    _, writer = await asyncio.open_connection("127.0.0.1", stage.router.http_port)
    writer.write(head("Content-Length: 500") + BODY)
    await writer.drain()
    writer.transport.abort()
    await stage.ready()
    assert not prefill.heard(Prefill)


def test_the_clock_of_files_is_the_kernels(tmp_path: Path) -> None:
    file, clock = tmp_path / "keys", Clock()
    file.write_text("one")
    access = Access((), (str(file),), clock)
    os.utime(file, ns=(1, 1))
    clock.now_s = 2.0
    assert access.client_of("Bearer one", None).tenant == "", "a touched file is read again, and says the same"
