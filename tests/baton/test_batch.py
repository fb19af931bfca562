"""run-batch: every line of the input has one line in the output, whatever is in it and wherever the run broke off."""

from __future__ import annotations

import asyncio
import codecs
import io
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from baton import batch as batches
from baton.batch import Batch, BatchLine, Done, Reply, read_done
from baton.batch_cli import main, parse
from baton.batch_targets import LOWEST_PRIORITY, ServerTarget
from protocol.errors import ConfigError

URL = "/v1/completions"


@pytest.fixture(autouse=True)
def _short_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "FIRST_RETRY_S", 0.01)


def line(custom_id: str, url: str = URL, **body: Any) -> bytes:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body}).encode() + b"\n"


Respond = Callable[[web.Request, dict[str, Any]], Awaitable[web.Response]]


@asynccontextmanager
async def server(respond: Respond) -> AsyncIterator[ServerTarget]:
    """Serve what a test says at any path, and give a target for it."""

    async def handle(request: web.Request) -> web.Response:
        return await respond(request, await request.json())

    app = web.Application()
    app.router.add_post("/{path:.*}", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with ServerTarget(f"http://127.0.0.1:{runner.addresses[0][1]}/v1/", "key") as target:
            yield target
    finally:
        await runner.cleanup()


async def results(
    target: Any, lines: list[bytes], done: Done | None = None, num_open: int = 4, retry_s: float = 5.0
) -> list[dict[str, Any]]:
    out = io.BytesIO()
    await Batch(target, out, num_open, retry_s).run(lines, done or Done())
    return [json.loads(data) for data in out.getvalue().splitlines()]


async def echo(request: web.Request, body: dict[str, Any]) -> web.Response:
    return web.json_response({"at": request.path, "got": body}, headers={"X-Request-ID": "r"})


async def test_answers_and_refusals_of_the_server_are_responses() -> None:
    async def respond(request: web.Request, body: dict[str, Any]) -> web.Response:
        assert request.headers["Authorization"] == "Bearer key"
        if body.get("bad"):
            return web.json_response({"error": {"message": "no", "param": "bad"}}, status=400)
        return await echo(request, body)

    async with server(respond) as target:
        found = await results(target, [line("a", prompt="x"), line("b", bad=1), line("c", priority=3)], num_open=1)
    assert [(one["custom_id"], one["response"]["status_code"], one["error"]) for one in found] == [
        ("a", 200, None),
        ("b", 400, None),
        ("c", 200, None),
    ]
    assert found[0]["response"]["request_id"] == "r"
    assert found[0]["response"]["body"] == {"at": URL, "got": {"prompt": "x", "priority": LOWEST_PRIORITY}}
    assert found[2]["response"]["body"]["got"]["priority"] == 3


async def test_every_bad_line_has_its_error() -> None:
    lines = [
        b"{\n",
        b"\n",
        b"[]\n",
        b"\xff\n",
        b"[" * 100_000 + b"\n",
        json.dumps({"custom_id": "no body"}).encode() + b"\n",
        line(""),
        line("x" * 600),
        line("get").replace(b"POST", b"GET"),
        line("stream", stream=True),
        line("twice").replace(b"{", b'{"custom_id": "first", ', 1),
        line("a"),
        line("a", prompt="another"),
        line("b", url="/metrics"),
        line("a"),
        line("last")[:-1],
    ]
    async with server(echo) as target:
        found = await results(target, lines)
    codes = Counter(one["error"]["code"] if one["error"] else "answered" for one in found)
    assert codes == {
        "invalid_line": 7,
        "invalid_custom_id": 2,
        "invalid_method": 1,
        "invalid_stream": 1,
        "duplicate_custom_id": 2,
        "invalid_url": 1,
        "answered": 2,
    }
    assert len({one["id"] for one in found}) == len(lines)
    assert next(one for one in found if one["custom_id"] == "no body")["error"]["code"] == "invalid_line"


@pytest.mark.parametrize(
    "url",
    [
        *("/v1/../metrics", "/v1/%2e%2e/metrics", "/v1/%2E%2E%2Fcensus", "/v1/./completions", "/v1/x/../completions"),
        *("/v1//completions", "//v1/completions", "//other.example/v1/completions", "/v1/completions//", "/v1/..;/x"),
        *("http://other.example/v1/completions", "https:/v1/completions", "@other.example/v1/completions", "v1/chat"),
        *(
            "/v1/completions?x=1",
            "/v1/completions#x",
            "/v1/completions/..",
            "/v1/completions%00",
            "/v1/completions\r\n",
        ),
        *("/V1/Completions", "/v1/complet\u0131ons", " /v1/completions", "\\v1\\completions", "/v1/models", "/v1/", ""),
        *("/tokenize", "/v1/completion", "/v1/completions/x", "/v1/completions\\..\\..\\load", "/v1/%63ompletions"),
    ],
)
async def test_a_url_is_a_known_endpoint_or_reaches_nothing(url: str) -> None:
    async def respond(request: web.Request, _: dict[str, Any]) -> web.Response:
        raise AssertionError(f"{request.path} was asked")

    async with server(respond) as target:
        (one,) = await results(target, [line("a", url=url, prompt="x")])
    assert one["response"] is None and one["error"]["code"] == "invalid_url" and one["custom_id"] == "a"


async def test_endpoints_may_end_in_a_slash_and_a_file_may_begin_with_a_mark() -> None:
    first = line("a", url="/v1/chat/completions/")
    lines = [codecs.BOM_UTF8 + first, line("b", url="/score"), line("c", url="/v1/rerank")]
    async with server(echo) as target:
        found = await results(target, lines, num_open=1)
        assert [one["response"]["body"]["at"] for one in found] == ["/v1/chat/completions", "/score", "/v1/rerank"]
        plain = await results(target, [first])
    assert plain[0]["id"] == found[0]["id"]
    assert [one["response"]["body"]["got"] for one in found] == [{"priority": LOWEST_PRIORITY}, {}, {}]


async def test_a_busy_server_is_obeyed_and_waited_for() -> None:
    asked: list[float] = []

    async def respond(request: web.Request, body: dict[str, Any]) -> web.Response:
        asked.append(asyncio.get_running_loop().time())
        if len(asked) == 1:
            return web.json_response({}, status=429, headers={"Retry-After": "0.3"})
        return await echo(request, body) if len(asked) == 3 else web.json_response({}, status=503)

    async with server(respond) as target:
        (one,) = await results(target, [line("a")])
    assert one["response"]["status_code"] == 200 and asked[1] - asked[0] >= 0.3


async def test_an_unreachable_server_fails_the_line_in_the_end() -> None:
    async with ServerTarget("http://127.0.0.1:9") as target:
        (one,) = await results(target, [line("a")], retry_s=0.05)
    assert (
        one["response"] is None and one["error"]["code"] == "unreachable" and "127.0.0.1:9" in one["error"]["message"]
    )


async def test_a_server_without_priorities_is_asked_without() -> None:
    got: list[bool] = []

    async def respond(request: web.Request, body: dict[str, Any]) -> web.Response:
        got.append("priority" in body)
        if "priority" in body:
            told = {"message": "priority is not supported by this server", "param": "priority"}
            return web.json_response({"error": told}, status=400)
        return await echo(request, body)

    async with server(respond) as target:
        found = await results(target, [line("a"), line("b")], num_open=1)
    assert [one["response"]["status_code"] for one in found] == [200, 200] and got == [True, False, False]


async def test_embeddings_are_asked_without_a_priority_and_others_keep_theirs() -> None:
    async with server(echo) as target:
        lines = [line("v", url="/v1/embeddings", input="x"), line("a", prompt="x")]
        found = await results(target, lines, num_open=1)
    assert [one["response"]["body"]["got"] for one in found] == [
        {"input": "x"},
        {"prompt": "x", "priority": LOWEST_PRIORITY},
    ]


async def test_no_more_than_so_many_are_open_and_read() -> None:
    class Gate:
        num_open = most = num_read = 0

        async def answer(self, _: BatchLine) -> Reply:
            self.num_open += 1
            self.most = max(self.most, self.num_open)
            assert self.num_read <= 500 and self.num_read - self.num_done <= 8
            await asyncio.sleep(0)
            self.num_open -= 1
            self.num_done += 1
            raise batches.BadLine("done", "", None)

        num_done = 0

        def lines(self) -> Any:
            for i in range(500):
                self.num_read += 1
                yield line(str(i))

    gate = Gate()
    await Batch(gate, io.BytesIO(), 8, 1.0).run(gate.lines(), Done())
    assert gate.most == 8 and gate.num_done == 500


async def test_resuming_answers_what_is_missing_and_nothing_twice(tmp_path: Path) -> None:
    lines = [line("a"), line("b"), b"bad\n", b"bad\n", line("a", prompt="2"), line("c"), line("d")]
    async with server(echo) as target:
        whole = await results(target, lines)
        for num_kept in range(len(whole) + 1):
            out = tmp_path / f"{num_kept}.jsonl"
            half = json.dumps(whole[-1], separators=(",", ":"))[: 20 * (num_kept % 3)]
            out.write_text("".join(json.dumps(one) + "\n" for one in whole[:num_kept]) + half)
            more = await results(target, lines, read_done(out, resume=True))
            told = [json.loads(data) for data in out.read_text().splitlines()] + more
            assert sorted(one["id"] for one in told) == sorted(one["id"] for one in whole)
            assert Counter(one["custom_id"] for one in told if one["response"]) == {"a": 1, "b": 1, "c": 1, "d": 1}


async def test_resuming_passes_over_a_custom_id_whose_line_has_changed(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    async with server(echo) as target:
        out.write_text(json.dumps((await results(target, [line("a")]))[0]) + "\n")
        assert await results(target, [line("a", prompt="new")], read_done(out, resume=True)) == []


def test_an_output_is_never_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("{}\n")
    with pytest.raises(ConfigError, match="--resume"):
        read_done(out, resume=False)
    for text in ("precious\n", "precious"):
        out.write_text(text)
        with pytest.raises(ConfigError, match="cannot be gone on with"):
            read_done(out, resume=True)
        assert out.read_text() == text


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "either MODEL"),
        (["smollm2", "--url", "http://x"], "either MODEL"),
        (["--url", "x"], "must begin with http"),
        (["--url", "http://x", "--block-size", "16"], "--block-size: is for MODEL"),
        (["--url", "http://x", "--concurrency", "0"], "--concurrency"),
        (["smollm2", "--block-size", "17"], "block_size: expected one of 8, 16, 32"),
    ],
)
def test_a_command_line_that_cannot_be_used(
    more: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(line("a"))
    assert main([str(source), str(tmp_path / "out.jsonl"), *more]) == 2
    assert says in capsys.readouterr().err
    assert main([str(tmp_path / "none"), str(tmp_path / "out.jsonl"), "smollm2"]) == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "IN: name it, as in: baton run-batch in.jsonl out.jsonl smollm2"),
        ("IN", "OUT: name it"),
        ("-i IN -o OUT m more", "unexpected 'more'"),
        ("IN OUT m --resum", "--resum: there is no such option; did you mean --resume?"),
        ("IN OUT --url http://x/?a=b", "--url: is the server's address"),
        ("IN OUT --url http:///x", "--url: must begin with http"),
        ("IN OUT smolm2", "did you mean smollm2?"),
        ("-i IN -o OUT --model smollm2 --tensor-parallel-size 2", "tensor_parallel_size: a model lies on one device"),
    ],
)
def test_slips_on_the_command_line_are_told(
    words: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").write_bytes(line("a"))
    paths = {"IN": str(tmp_path / "in"), "OUT": str(tmp_path / "out")}
    assert main([paths.get(word, word) for word in words.split()]) == 2
    assert says in capsys.readouterr().err


def test_every_way_to_name_files_and_model() -> None:
    for words in (
        "in.jsonl out.jsonl smollm2",
        "-i in.jsonl -o out.jsonl --model smollm2",
        "--input-file=in.jsonl --output_file out.jsonl smollm2",
        "in.jsonl --resume out.jsonl --max-num-seqs 4 smollm2",
        "-o out.jsonl in.jsonl --model smollm2",
    ):
        found = parse(words.split())
        assert (found["input"], found["output"], found["model"]) == ("in.jsonl", "out.jsonl", "smollm2"), words


@pytest.mark.model
def test_an_engine_of_its_own_answers_as_http_would(cache_dir: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    france: dict[str, Any] = {"model": "m", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    hi: dict[str, Any] = {
        "model": "m",
        "messages": [{"role": "user", "content": "Say hi"}],
        "max_tokens": 4,
        "temperature": 0,
    }
    lines = [line(f"f{i}", **france) for i in range(20)]
    lines += [line("chat", url="/v1/chat/completions", **hi), line("other", **{**france, "model": "x"})]
    lines += [line("bad", **{**france, "top_p": 7}), line("where", url="/v1/moderations", input="x")]
    lines += [line("vector", url="/v1/embeddings", model="m", input=["hi", "ho"])]
    lines += [line("unnamed", url="/v1/completions/", **{k: v for k, v in france.items() if k != "model"})]
    source.write_bytes(codecs.BOM_UTF8 + b"".join(lines))
    options = ["--num-kv-blocks", "128", "--threads", "1", "--served-model-name", "m", "--cache-dir", str(cache_dir)]
    assert main(["-i", str(source), "-o", str(out), "--model", "smollm2", *options]) == 0
    found = {one["custom_id"]: one for one in map(json.loads, out.read_text().splitlines())}
    assert len(found) == len(lines)
    for i in range(20):
        (choice,) = found[f"f{i}"]["response"]["body"]["choices"]
        assert choice["text"] == " Paris.\n\nThe answer is:" and choice["finish_reason"] == "length"
    assert found["unnamed"]["response"]["body"]["choices"] == found["f0"]["response"]["body"]["choices"]
    assert found["unnamed"]["response"]["body"]["model"] == "m"
    assert found["chat"]["response"]["body"]["choices"][0]["message"]["role"] == "assistant"
    assert found["other"]["response"]["status_code"] == 404
    assert found["bad"]["response"]["body"]["error"]["param"] == "top_p"
    assert found["where"]["error"]["code"] == "invalid_url"
    vectors = found["vector"]["response"]["body"]["data"]
    assert [(one["index"], len(one["embedding"])) for one in vectors] == [(0, 576), (1, 576)]
    before = out.read_bytes()
    assert main([str(source), str(out), "smollm2", "--resume", *options]) == 0
    assert out.read_bytes() == before
