"""Hostile requests against a running server: `python -m tests.clients.hostile --number 10000`.

1. A server is started, or one is named. A stream is read in peace: that is what it must say again and again.
2. The corpus is sent, then what is odd and must be answered (`answers.py`), then damaged bodies and broken HTTP, until
   so many have been refused, while the stream is read over and over beside it. Bodies that damage left valid are
   counted, and do not count.
3. Every refusal must be 4xx in OpenAI's shape. No 5xx, no process that is another one than before, no stream that says
   something else, no error in the log and nothing there that a client could have written. Memory and times are
   reported; the command line holds them against their limits, the test does not.
4. With `--schemathesis PROGRAM` the server's own OpenAPI document is then fuzzed with it.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.clients.answers import wrong_answers
from tests.clients.bodies import BROKEN_HTTP, CHAT, COMPLETIONS, MODEL, Sent, corpus, damaged, large
from tests.e2e.client import stream
from tests.e2e.server import Server, serving

MAX_RSS_GROWTH_BYTES = 64 << 20
MAX_P99_S = 0.05
ANSWER_BUDGET_S = 30.0
POOL_BLOCKS, POOL_TOKENS = 256, 3800
MAX_FUZZED = 4
# A schema or pattern that was not seen before is compiled in a process of its own; that takes its time, once.
GRAMMAR_FIELDS = (b"response_format", b"guided", b"structured_outputs", b'"format"', b'"tool_choice": {', b"required")
_BESIDE = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Count to ten."}],
    "temperature": 0,
    "max_tokens": 40,
}


@dataclass(slots=True)
class Report:
    """What happened.

    Attributes:
        times_s: of refusals of bodies below a megabyte that no grammar was compiled for.
        wrong: whatever must not happen, in words.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    times_s: list[float] = field(default_factory=list)
    grammar_times_s: list[float] = field(default_factory=list)
    large_times_s: list[float] = field(default_factory=list)
    num_valid: int = 0
    num_streams: int = 0
    rss_growth_bytes: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @property
    def num_refused(self) -> int:
        """Requests that were answered with 4xx."""
        return sum(count for status, count in self.statuses.items() if 400 <= status < 500)

    def lines(self) -> list[str]:
        """Return the report for people."""
        growth = ", ".join(f"{role} {grown / (1 << 20):+.1f} MiB" for role, grown in self.rss_growth_bytes.items())
        return [
            f"refused {self.num_refused}, valid after all {self.num_valid}",
            f"statuses: {', '.join(f'{count} x {status}' for status, count in sorted(self.statuses.items()))}",
            f"refusals: {_spread(self.times_s)}",
            f"with a grammar to be compiled: {_spread(self.grammar_times_s)}",
            f"of bodies of megabytes: {_spread(self.large_times_s)}",
            f"memory: {growth}",
            f"streams beside it: {self.num_streams}, each as in peace"
            if self.num_streams
            else "no stream ended beside it",
            *(f"WRONG: {line}" for line in self.wrong[:50]),
        ]


class Siege:
    """One run against one server."""

    def __init__(self, server: Server, http: aiohttp.ClientSession, seed: int) -> None:
        self._server = server
        self._http = http
        self._dice = random.Random(f"hostile {seed}")
        self.report = Report()

    async def run(self, number: int, num_senders: int, budget_s: float) -> Report:
        """Send requests until `number` have been refused, or the budget is over."""
        peace = (await stream(self._http, self._server.url, _BESIDE, CHAT)).text
        for first in (100, 200):
            # Blocks that are written for the first time are no leak.
            filling = {"model": MODEL, "prompt": [first + i % 50 for i in range(POOL_TOKENS)], "max_tokens": 2}
            await self._send(Sent("filling", COMPLETIONS, json.dumps(filling).encode(), is_surely_bad=False))
        for sent in (*large(), *(damaged(self._dice) for _ in range(min(200, number)))):
            await self._send(sent)  # memory that the first requests of any kind need is no leak
        children, before = self._server.children(), self._memory()
        beside = asyncio.create_task(self._stream_beside(peace))
        try:
            until_s = time.monotonic() + budget_s
            for sent in (*corpus(), *large()):
                await self._send(sent)
            for name, data in BROKEN_HTTP:
                await self._send_raw(name, data)
            self.report.wrong += await wrong_answers(self._http, self._server.url)
            await asyncio.gather(*(self._sender(number, until_s) for _ in range(num_senders)))
            while not self.report.num_streams and not beside.done() and time.monotonic() < until_s:
                await asyncio.sleep(0.05)
        finally:
            beside.cancel()
            await asyncio.gather(beside, return_exceptions=True)
        if self._server.children() != children:
            self.report.wrong.append(f"processes {self._server.children()} were {children}")
        self.report.rss_growth_bytes = {role: rss - before[role] for role, rss in self._memory().items()}
        self._read_log()
        if (await stream(self._http, self._server.url, _BESIDE, CHAT)).text != peace:
            self.report.wrong.append("the stream after it says something else")
        return self.report

    async def _sender(self, number: int, until_s: float) -> None:
        while self.report.num_refused < number and time.monotonic() < until_s:
            share = self._dice.random()
            if share < 0.05:
                await self._send_raw(*self._dice.choice(BROKEN_HTTP))
            else:
                await self._send(self._dice.choice(corpus()) if share < 0.15 else damaged(self._dice))

    async def _send(self, sent: Sent) -> None:
        headers = {"Content-Type": "application/json", **sent.headers}
        started_s = time.perf_counter()
        try:
            async with self._http.post(
                self._server.url + sent.path, data=io.BytesIO(sent.data), headers=headers
            ) as response:
                body = await response.read()
        except aiohttp.ClientConnectionError as error:
            # What is refused while it is still sent may be cut after the answer.
            if len(sent.data) < 1 << 20:
                self.report.wrong.append(f"{sent.name} at {sent.path}: {error!r}")
            return
        took_s = time.perf_counter() - started_s
        self.report.statuses[response.status] += 1
        if response.status < 400:
            self.report.num_valid += 1
            if sent.is_surely_bad:
                self.report.wrong.append(f"{sent.name} at {sent.path} was taken: {sent.data[:200]!r}")
            return
        self._judge(f"{sent.name} at {sent.path}: {sent.data[:2000]!r}", response.status, body)
        if len(sent.data) >= 1 << 20:
            self.report.large_times_s.append(took_s)
        elif any(name in sent.data for name in GRAMMAR_FIELDS) and sent.path != "/tokenize":
            self.report.grammar_times_s.append(took_s)
        else:
            self.report.times_s.append(took_s)

    async def _send_raw(self, name: str, data: bytes) -> None:
        port = int(self._server.url.rsplit(":", 1)[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        try:
            writer.write(data)
            async with asyncio.timeout(ANSWER_BUDGET_S):
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = int(head.lower().partition("content-length:")[2].partition("\r\n")[0])
                body = await reader.readexactly(length)
            status = int(head.split()[1])
            self.report.statuses[status] += 1
            self._judge(f"broken HTTP: {name}", status, body)
        except (OSError, EOFError, TimeoutError) as error:
            self.report.wrong.append(f"broken HTTP: {name}: {error!r}")
        finally:
            writer.close()

    def _read_log(self) -> None:
        """Nobody but the server's own processes begins a line of its log, and no error is logged for a client's."""
        for line in self._server.log.read_text(errors="replace").splitlines():
            if not line.isprintable() or " ERROR " in line or line.startswith("Traceback"):
                self.report.wrong.append(f"in the log: {line[:300]!a}")

    def _judge(self, what: str, status: int, body: bytes) -> None:
        if not 400 <= status < 500:
            self.report.wrong.append(f"{status} for {what}: {body[:300]!r}")
            return
        try:
            error: dict[str, Any] = json.loads(body)["error"]
            is_ours = (
                error["code"] == status
                and bool(error["message"])
                and set(error) == {"message", "type", "param", "code"}
            )
        except (ValueError, KeyError, TypeError):
            is_ours = False
        if not is_ours:
            self.report.wrong.append(f"{status} in another shape for {what}: {body[:300]!r}")

    async def _stream_beside(self, peace: str) -> None:
        while True:
            found = await stream(self._http, self._server.url, _BESIDE, CHAT)
            if found.text != peace or not found.is_done:
                self.report.wrong.append(f"a stream beside it said {found.text!r}")
                return
            self.report.num_streams += 1

    def _memory(self) -> dict[str, int]:
        """Return resident bytes of every process by its role."""
        found = {}
        for role, pid in self._server.children().items():
            status = Path(f"/proc/{pid}/status").read_text()
            found[role] = int(status.partition("VmRSS:")[2].split()[0]) << 10
        return found


async def besiege(server: Server, number: int, seed: int, num_senders: int = 4, budget_s: float = 3600.0) -> Report:
    """Send hostile requests until `number` have been refused, or the budget is over."""
    timeout = aiohttp.ClientTimeout(total=240.0)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        return await Siege(server, http, seed).run(number, num_senders, budget_s)


def _spread(times_s: list[float]) -> str:
    if not times_s:
        return "none"
    ordered = sorted(1e3 * time_s for time_s in times_s)
    p50, p99 = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.99))
    return f"{len(ordered)}, p50 {p50:.1f} ms, p99 {p99:.1f} ms, longest {ordered[-1]:.1f} ms"


def _fuzz(program: str, server: Server, num_examples: int, folder: Path) -> int:
    """Fuzz every POST of the server's own document; return the exit code.

    The document is changed in two places, or nothing would get past the first check, and every answer would be as long
    as the model can write: the model's name is one that is served, and an answer has at most `MAX_FUZZED` tokens.
    """
    document = server.get("/openapi.json")
    for schema in document["components"]["schemas"].values():
        fields = schema.get("properties", {})
        for name in {"model", "max_tokens", "max_completion_tokens", "max_output_tokens"} & fields.keys():
            fields[name] = {"enum": [MODEL]} if name == "model" else {"type": "integer", "maximum": MAX_FUZZED}
            schema["required"] = sorted({*schema.get("required", ()), name})
    paths = [path for path, item in document["paths"].items() if "post" in item]
    file = folder / "openapi.json"
    file.write_text(json.dumps(document), encoding="utf-8")
    command = [program, "run", str(file), "--url", server.url, "--request-timeout", "60", "--continue-on-failure"]
    command += ["--checks", "not_a_server_error,content_type_conformance", "--max-examples", str(num_examples)]
    command += ["--phases", "examples,coverage,fuzzing", "--seed", "1", "--mode", "all"]
    command += [argument for path in paths for argument in ("--include-path", path)]
    return subprocess.run(command, check=False).returncode


def main() -> int:
    """Run against a server of its own; return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=10_000, help="refusals to be counted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--senders", type=int, default=4, help="requests at once; more of them wait for each other")
    parser.add_argument("--budget-s", type=float, default=3600.0, help="end earlier, and report what there is")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "baton")
    parser.add_argument("--schemathesis", help="program to fuzz the OpenAPI document with")
    parser.add_argument("--examples", type=int, default=200, help="of schemathesis, for each path")
    args = parser.parse_args()
    pool = ("--num-kv-blocks", str(POOL_BLOCKS))
    with tempfile.TemporaryDirectory() as folder, serving(MODEL, Path(folder), args.cache_dir, *pool) as server:
        report = asyncio.run(besiege(server, args.number, args.seed, args.senders, args.budget_s))
        ordered = sorted(report.times_s)
        if ordered and ordered[int(0.99 * len(ordered))] > MAX_P99_S:
            report.wrong.append(f"the 99th percentile of refusals is above {MAX_P99_S * 1e3:g} ms")
        for role, grown in report.rss_growth_bytes.items():
            if grown > MAX_RSS_GROWTH_BYTES:
                report.wrong.append(f"{role} has grown by {grown / (1 << 20):.1f} MiB")
        print("\n".join(report.lines()), flush=True)
        children = server.children()
        code = 0 if args.schemathesis is None else _fuzz(args.schemathesis, server, args.examples, Path(folder))
        if server.children() != children:
            print("WRONG: a process was replaced")
            code = 1
    return 1 if report.wrong else code


if __name__ == "__main__":
    sys.exit(main())
