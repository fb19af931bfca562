"""A tiny OpenAI-compatible server as a process of its own, with a known pace and, if wanted, a troublesome family.

    python -m tests.bench.slow_server --port N [--gap-ms 5] [--family] [--fail] [--deaf]

--family starts four processes that ignore SIGTERM: a child in a session of its own, one without the mark in its
environment, one with neither, and an orphan in a session of its own.
--fail ends at once with status 3; --deaf never answers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time

from aiohttp import web

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
UNMARKED = {name: value for name, value in os.environ.items() if not name.startswith("BENCH_PEERS")}


async def _health(request: web.Request) -> web.Response:
    return web.json_response({})


async def _models(request: web.Request) -> web.Response:
    return web.json_response({"data": [{"id": "m"}]})


def _completion(gap_s: float) -> web.RequestHandler | object:
    async def complete(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        num_tokens, num_words = int(body["max_tokens"]), len(body["prompt"].split())
        for index in range(num_tokens):
            await asyncio.sleep(gap_s)
            choice = {"text": " a", "finish_reason": "length" if index == num_tokens - 1 else None}
            await response.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
        usage = {"prompt_tokens": num_words, "completion_tokens": num_tokens}
        await response.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    return complete


def _start_family() -> None:
    subprocess.Popen([sys.executable, "-c", STUBBORN], start_new_session=True)
    subprocess.Popen([sys.executable, "-c", STUBBORN], env=UNMARKED)
    subprocess.Popen([sys.executable, "-c", STUBBORN], env=UNMARKED, start_new_session=True)
    if os.fork() == 0:
        # This one ends at once: its child is nobody's from then on.
        subprocess.Popen([sys.executable, "-c", STUBBORN], start_new_session=True)
        os._exit(0)
    os.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--gap-ms", type=float, default=5.0)
    for flag in ("family", "fail", "deaf"):
        parser.add_argument(f"--{flag}", action="store_true")
    parsed = parser.parse_args()
    if parsed.fail:
        print("no such model", flush=True)
        sys.exit(3)
    if parsed.deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    if parsed.family:
        _start_family()
    app = web.Application()
    app.router.add_get("/health", _health)
    app.router.add_get("/v1/models", _models)
    app.router.add_post("/v1/completions", _completion(parsed.gap_ms / 1e3))  # type: ignore[arg-type]
    web.run_app(app, host="127.0.0.1", port=parsed.port, print=lambda *_: None)


if __name__ == "__main__":
    main()
