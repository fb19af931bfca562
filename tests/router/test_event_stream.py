"""Streams as they leave: written at once where the client reads, held where it does not, and whole in the end."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from functools import partial
from typing import Any

import pytest
from aiohttp.http import StreamWriter

from protocol.request import FinishReason, TokenLogprobs, TokenRow
from protocol.wire import Abort, Reserve, Tokens
from router.api import ChatRequest, CompletionRequest, parse
from router.event_stream import LIMIT_BYTES, PAUSE_BYTES, EventStream
from router.intake import Intake, Job
from router.members import WorkerKey
from router.stream import AnswerShape
from router.text import LoggedToken, Piece
from router.tokenizer import Tokenizer
from tests.router.tiny import SPECIAL, TEMPLATE, alphabet, byte_id, byte_ids, write_gguf
from tests.router.workers import CHAT, HI, LENGTH, Stage, answer, events, staged

LONG_TEXT = "x" * 32768
LONG_ID = len(SPECIAL) + 257
NUM_LONG = 250  # more than the kernel's buffers of both sides can take


@pytest.fixture(scope="module")
def long_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level vocabulary with one token that stands for a long text."""
    types = [3] * len(SPECIAL) + [1] * 257 + [4]
    tokens = [*SPECIAL, *alphabet(), "th", LONG_TEXT]
    path = tmp_path_factory.mktemp("long") / "long.gguf"
    return Tokenizer(write_gguf(path, tokens, types, merges=["t h"], pre="smollm", chat_template=TEMPLATE))


class Offers:
    """What sessions offered to their streams, and how often a stream refused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_taken = self.num_refused = 0
        offer = EventStream.offer

        def counted(stream: EventStream, index: int, piece: Piece) -> bool:
            is_taken = offer(stream, index, piece)
            self.num_taken += is_taken
            self.num_refused += not is_taken
            return is_taken

        monkeypatch.setattr(EventStream, "offer", counted)


async def _raw(stage: Stage, body: dict[str, Any], version: str = "1.1") -> socket.socket:
    """Send a request on a socket with a small buffer, and read nothing."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    loop, data = asyncio.get_running_loop(), json.dumps(body).encode()
    await loop.sock_connect(client, ("127.0.0.1", stage.router.http_port))
    head = f"POST {CHAT} HTTP/{version}\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    await loop.sock_sendall(client, head.encode() + data)
    return client


async def _rest(client: socket.socket) -> bytes:
    found = []
    with client:
        while data := await asyncio.get_running_loop().sock_recv(client, 1 << 20):
            found.append(data)
    return b"".join(found)


def _text(body: bytes) -> str:
    """Read the events of a body without chunks."""
    *chunks, end = [line[6:] for line in body.split(b"\n\n") if line]
    assert end == b"[DONE]"
    return "".join(json.loads(chunk)["choices"][0]["delta"].get("content", "") for chunk in chunks)


def _unchunked(body: bytes) -> bytes:
    found, at = [], 0
    while at < len(body):
        end = body.index(b"\r\n", at)
        num_bytes = int(body[at:end], 16)
        found.append(body[end + 2 : end + 2 + num_bytes])
        at = end + 2 + num_bytes + 2
    return b"".join(found)


class Script:
    """Both workers of a stage, for requests whose tokens are known: each placement goes on where its stream is."""

    def __init__(self, stage: Stage, token_ids: list[int]) -> None:
        self.num_placements = 0
        self._prefill, self._decode = stage.workers
        self._token_ids = token_ids
        self._task = asyncio.create_task(self._play())

    async def _play(self) -> None:
        while True:
            reserve = await self._decode.hear(Reserve)
            self.num_placements += 1
            assert list(reserve.emitted) == self._token_ids[: len(reserve.emitted)]
            await self._prefill.first(self._token_ids[0])
            await self._emit(reserve)

    async def _emit(self, reserve: Reserve) -> None:
        """Send a few tokens at a time, as steps do, until the end or an abort."""
        for index in range(max(1, len(reserve.emitted)), len(self._token_ids), 2):
            await asyncio.sleep(0.001)
            if any(isinstance(m, Abort) and m.transfer_id == reserve.transfer_id for m in self._decode.received):
                return
            step, is_last = self._token_ids[index : index + 2], index + 2 >= len(self._token_ids)
            self._decode.emit(reserve, step, start=index, finish=LENGTH if is_last else None)

    async def __aenter__(self) -> Script:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@pytest.fixture
def most_unsent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What streams held after each write, in bytes."""
    seen: list[int] = []
    offer, push = EventStream.offer, EventStream.push

    def offered(stream: EventStream, index: int, piece: Piece) -> bool:
        is_taken = offer(stream, index, piece)
        seen.append(stream.unsent_bytes)
        return is_taken

    async def pushed(stream: EventStream, data: bytes) -> None:
        await push(stream, data)
        seen.append(stream.unsent_bytes)

    monkeypatch.setattr(EventStream, "offer", offered)
    monkeypatch.setattr(EventStream, "push", pushed)
    return seen


def _long_script(num_long: int) -> tuple[list[int], str]:
    """Give tokens of 32 KiB with a digit after each, and their text."""
    token_ids = [byte_id("a"), *(i for n in range(num_long) for i in (LONG_ID, byte_id(str(n % 10))))]
    return token_ids, "a" + "".join(LONG_TEXT + str(n % 10) for n in range(num_long))


async def test_a_client_that_does_not_read_pauses_its_own_stream_and_loses_nothing(
    long_tokenizer: Tokenizer, most_unsent: list[int]
) -> None:
    token_ids, text = _long_script(NUM_LONG)
    async with staged(long_tokenizer) as stage:
        prefill, decode = await stage.pair(max_model_len=10_000, num_blocks=10_000)
        dispatch = stage.router.switchboard.dispatch
        async with Script(stage, token_ids) as script:
            slow = await _raw(stage, {**HI, "stream": True, "max_tokens": len(token_ids)})
            await stage.until(lambda: script.num_placements > 0 and dispatch.num_running == dispatch.num_waiting == 0)
            assert stage.router.switchboard.num_requests == 1, "paused, not ended"
        asked = asyncio.create_task(stage.http.post(f"{stage.url}{CHAT}", json={**HI, "stream": True, "max_tokens": 6}))
        await answer(prefill, decode, "other", LENGTH)
        async with await asked as response:
            assert len(await events(response)) == 6
        async with Script(stage, token_ids) as script:
            head, _, data = (await _rest(slow)).partition(b"\r\n\r\n")
    assert b"chunked" in head and script.num_placements >= 1, "placed again"
    assert _text(_unchunked(data)) == text
    assert PAUSE_BYTES < max(most_unsent) < LIMIT_BYTES


async def test_a_burst_of_tokens_does_not_outrun_the_pause(long_tokenizer: Tokenizer) -> None:
    async with staged(long_tokenizer) as stage:
        prefill, decode = await stage.pair(max_model_len=10_000, num_blocks=10_000)
        slow = await _raw(stage, {**HI, "stream": True, "max_tokens": NUM_LONG + 1})
        reserve = await decode.hear(Reserve)
        await prefill.first(byte_id("a"))
        head = await asyncio.get_running_loop().sock_recv(slow, 1)
        await asyncio.sleep(0.05)
        for index in range(1, NUM_LONG):
            # As after a time in which the router had no CPU: its handler runs only when all of them are taken.
            row = TokenRow(reserve.request_id, reserve.epoch, index, LONG_ID)
            stage.router.switchboard.take(WorkerKey("d0", 1), Tokens(rows=(row,)))
        assert (await decode.hear(Abort)).transfer_id == reserve.transfer_id
        reading = asyncio.create_task(_rest(slow))
        again = await decode.hear(Reserve)
        assert len(again.emitted) * len(LONG_TEXT) < 2 * LIMIT_BYTES, "the rest of the burst did not count"
        await prefill.first(byte_id("a"))
        decode.emit(again, [LONG_ID], start=len(again.emitted), finish=LENGTH)
        text = _text(_unchunked((head + await reading).partition(b"\r\n\r\n")[2]))
    assert text == "a" + LONG_TEXT * len(again.emitted)


async def test_a_client_that_never_reads_is_cut_and_its_request_cancelled(
    long_tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    token_ids, _ = _long_script(NUM_LONG)
    async with staged(long_tokenizer, client_stall_s=0.4) as stage:
        await stage.pair(max_model_len=10_000, num_blocks=10_000)
        async with Script(stage, token_ids):
            with await _raw(stage, {**HI, "stream": True, "max_tokens": len(token_ids)}):
                await stage.until(lambda: stage.router.switchboard.num_requests == 1)
                await stage.until(lambda: stage.router.switchboard.num_requests == 0)
    assert "its client has read nothing for 0.4 s" in caplog.text


async def test_what_is_unsent_at_the_end_is_cut_as_well(
    long_tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, most_unsent: list[int]
) -> None:
    caplog.set_level(logging.INFO)
    token_ids, _ = _long_script(5)
    async with staged(long_tokenizer, client_stall_s=0.4) as stage:
        await stage.pair(max_model_len=10_000, num_blocks=10_000)
        async with Script(stage, token_ids):
            with await _raw(stage, {**HI, "stream": True, "max_tokens": len(token_ids)}):
                await stage.until(lambda: "its client has read nothing for 0.4 s" in caplog.text)
    assert 0 < most_unsent[-1] < PAUSE_BYTES, "it was never full"


async def test_a_client_that_reads_slowly_but_steadily_gets_everything(long_tokenizer: Tokenizer) -> None:
    token_ids, text = _long_script(24)
    async with staged(long_tokenizer, client_stall_s=0.4) as stage:
        await stage.pair(max_model_len=10_000, num_blocks=10_000)
        async with Script(stage, token_ids):
            slow = await _raw(stage, {**HI, "stream": True, "max_tokens": len(token_ids)})
            begin_s, found = asyncio.get_running_loop().time(), b""
            with slow:
                while data := await asyncio.get_running_loop().sock_recv(slow, 4096):
                    found += data
                    await asyncio.sleep(0.01)
            assert asyncio.get_running_loop().time() - begin_s > 0.8, "longer than a client may read nothing"
    assert _text(_unchunked(found.partition(b"\r\n\r\n")[2])) == text


async def test_a_client_that_reads_is_written_to_without_waking_its_handler(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    offers = Offers(monkeypatch)
    prefill, decode = await stage.pair()
    asked = asyncio.create_task(stage.http.post(f"{stage.url}{CHAT}", json={**HI, "stream": True, "max_tokens": 50}))
    reserve = await decode.hear(Reserve)
    await prefill.first(byte_id("a"))
    async with await asked as response:
        await response.content.readline()
        decode.emit(reserve, byte_ids("b" * 40), finish=LENGTH)
        assert len(await events(response)) == 41
    assert (offers.num_taken, offers.num_refused) == (40, 0)


async def test_the_head_goes_out_with_the_first_event_and_the_end_with_the_last_one(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = await stage.pair()
    writes, write, write_lines = list[bytes](), StreamWriter._write, StreamWriter._writelines

    def written(writer: StreamWriter, data: bytes) -> None:
        writes.append(data)
        write(writer, data)

    def written_lines(writer: StreamWriter, parts: tuple[bytes, ...]) -> None:
        writes.append(b"".join(parts))
        write_lines(writer, parts)

    monkeypatch.setattr(StreamWriter, "_write", written)
    monkeypatch.setattr(StreamWriter, "_writelines", written_lines)
    asked = asyncio.create_task(_raw(stage, {**HI, "stream": True}))
    await answer(prefill, decode, "abc", LENGTH)
    await _rest(await asked)
    events = [data for data in writes if b"data: " in data]
    assert len(events) == 2 and writes == events, writes
    assert events[0].startswith(b"HTTP/1.1 200") and events[1].endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def test_a_client_of_http_1_0_gets_events_without_chunks(stage: Stage) -> None:
    prefill, decode = await stage.pair()
    client = await _raw(stage, {**HI, "stream": True, "max_tokens": 9}, version="1.0")
    await answer(prefill, decode, "plainly", LENGTH)
    head, _, data = (await _rest(client)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200") and b"chunked" not in head
    assert _text(data) == "plainly"


async def test_a_fault_in_one_answer_ends_that_stream_and_no_worker(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shaped = AnswerShape.chunk

    def faulty(shape: AnswerShape, index: int, piece: Piece) -> bytes:
        if piece.text == "!":
            raise ValueError("a bug")
        return shaped(shape, index, piece)

    monkeypatch.setattr(AnswerShape, "chunk", faulty)
    prefill, decode = await stage.pair()
    ask = partial(stage.http.post, f"{stage.url}{CHAT}", json={**HI, "stream": True, "max_tokens": 9})
    asked = asyncio.create_task(ask(headers={"Connection": "close"}))
    reserve = await decode.hear(Reserve)
    await prefill.first(byte_id("a"))
    async with await asked as response:
        await response.content.readline()
        decode.emit(reserve, byte_ids("b!c"))
        last = (await events(response))[-1]
    assert last["error"]["message"] == "internal error" and "a bug" in caplog.text
    asked = asyncio.create_task(ask())
    await answer(prefill, decode, "fine", LENGTH)
    async with await asked as response:
        assert response.status == 200 and len(await events(response)) == 5
    assert [w.registration.worker_id for w in stage.router.switchboard.registry] == ["p0", "d0"]


PLAIN: tuple[tuple[str, dict[str, Any]], ...] = (
    ("chat", {}),
    ("chat", {"stream_options": {"include_usage": True}, "n": 2}),
    ("completions", {}),
    ("completions", {"echo": True, "stream_options": {"include_usage": True}}),
)
OTHER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("chat", {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}),
    ("chat", {"logprobs": True}),
    ("completions", {"return_token_ids": True}),
)


def _job(tokenizer: Tokenizer, kind: str, fields: dict[str, Any]) -> Job:
    more = {"messages": HI["messages"]} if kind == "chat" else {"prompt": "abc"}
    body = json.dumps({"model": "m", "stream": True, "max_tokens": 9, **more, **fields}).encode()
    if kind == "chat":
        return Intake(tokenizer, ("m",)).job(parse(body, ChatRequest), 100)
    return Intake(tokenizer, ("m",)).job(parse(body, CompletionRequest), 100)


@pytest.mark.parametrize(("kind", "fields"), PLAIN + OTHER)
@pytest.mark.parametrize("text", ["plain", '"\\\n\t\x00\x7f', "é🚀世\u2028", "</script>", "data: \n\n"])
def test_later_chunks_are_the_first_one_with_another_text(
    tokenizer: Tokenizer, kind: str, fields: dict[str, Any], text: str
) -> None:
    job = _job(tokenizer, kind, fields)
    shape = AnswerShape(job, tokenizer, "x")
    logged = [LoggedToken(5, TokenLogprobs(-0.5))] if "logprobs" in fields else []
    index = len(job.choices) - 1
    chunks = [shape.chunk(index, Piece(text, [7], logged)) for _ in range(3)]
    first, second, third = (json.loads(chunk.removeprefix(b"data: ")) for chunk in chunks)
    assert all(chunk.endswith(b"\n\n") and chunk.count(b"\n\n") == 1 for chunk in chunks)
    assert [_take_text(c) for c in (second, third)] == [text, text] and _take_text(first).endswith(text)
    for chunk in (first, second, third):
        chunk.pop("prompt_token_ids", None)
        chunk["choices"][0].pop("prompt_token_ids", None)
        chunk["choices"][0].get("delta", {}).pop("role", None)
        if chunk.get("usage"):
            del chunk["usage"]["completion_tokens"], chunk["usage"]["total_tokens"]
    assert first == second == third


def _take_text(chunk: dict[str, Any]) -> str:
    (choice,) = chunk["choices"]
    found: str = choice["delta"].pop("content") if "delta" in choice else choice.pop("text")
    return found


def test_a_chunk_without_text_is_not_sent_and_a_last_one_always(tokenizer: Tokenizer) -> None:
    shape = AnswerShape(_job(tokenizer, "chat", {}), tokenizer, "x")
    assert (
        shape.chunk(0, Piece("", [1])) == b"" and shape.chunk(0, Piece("a", [2])) and not shape.chunk(0, Piece("", [3]))
    )
    last = json.loads(shape.chunk(0, Piece("", [4], finish_reason=FinishReason.LENGTH))[6:])
    assert last["choices"][0]["finish_reason"] == "length" and shape.usage.completion_tokens == 4
