"""A small server that streams as OpenAI-compatible ones do, well or badly; the model's name chooses how.

| model | what it does |
|---|---|
| plain | one token a chunk, usage and [DONE] at the end |
| counting | the same with running usage in every chunk |
| pairs | two tokens a chunk, counted only at the end |
| closing-count | one token a chunk, counted only in the event with the finish reason |
| torn | CR LF, comments, and every byte written by itself |
| greeting | chat: a chunk with the role and no text before the first token |
| control | every third token shows no text |
| no-done | ends after finish_reason without [DONE] |
| cut-short | ends after two tokens |
| hangs-up | closes the connection after two tokens |
| error-event | two tokens, then an error event |
| garbage | an event that is no JSON |
| refuses | HTTP 422 |
| refuses-later | the same, but only where more than a hundred tokens are asked for |
| stalls | two tokens, then silence |
| stalls-later | the same, but only where more than a hundred tokens are asked for |
| no-usage | never counts anything |
| half-words | makes three tokens of two words, and adds five |
| jittery | 5 ms a token, but 600 ms for the 3rd |
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

GAP_S = 0.005


def count_tokens(text: str) -> int:
    """Count as SmolLM2's vocabulary does for the texts of `bench.text`."""
    return len(re.findall(r" ?\w+| ?[^\w\s]+|\n", text))


@dataclass
class OpenAiServer:
    """A running server and what it was asked.

    Attributes:
        bodies: every completion request, in order.
        num_running: streams under way.
        num_at_once: the most of them at any time.
        num_left: clients that hung up before the end.
    """

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    num_running: int = 0
    num_at_once: int = 0
    num_left: int = 0

    async def models(self, request: web.Request) -> web.Response:
        """Answer /v1/models."""
        return web.json_response({"object": "list", "data": [{"id": "plain", "object": "model"}]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Answer both endpoints."""
        body = await request.json()
        self.bodies.append(body)
        if body["model"] == "refuses" or (body["model"] == "refuses-later" and body["max_tokens"] > 100):
            return web.json_response({"error": {"message": "unknown field ignore_eos"}}, status=422)
        self.num_running += 1
        self.num_at_once = max(self.num_at_once, self.num_running)
        try:
            return await _Stream(request, body).run()
        except (ConnectionResetError, asyncio.CancelledError):
            self.num_left += 1
            raise
        finally:
            self.num_running -= 1


class _Stream:
    def __init__(self, request: web.Request, body: dict[str, Any]) -> None:
        self._request, self._body, self._model = request, body, body["model"]
        self._is_chat = request.path.endswith("/chat/completions")
        prompt = body["messages"][0]["content"] if self._is_chat else body["prompt"]
        self._num_prompt_tokens = count_tokens(prompt) + (12 if self._is_chat else 0)
        if self._model == "half-words":
            self._num_prompt_tokens = count_tokens(prompt) * 3 // 2 + 5
        self._response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})

    async def run(self) -> web.StreamResponse:
        await self._response.prepare(self._request)
        if self._model == "greeting":
            await self._event(self._chunk("", role="assistant"))
        if self._model == "hangs-up" and self._request.transport is not None:
            await self._tokens(2)
            self._request.transport.close()
        elif self._model == "stalls-later" and self._body["max_tokens"] > 100:
            await self._tokens(2)
            await asyncio.sleep(30)
        elif self._model in ("cut-short", "error-event", "garbage", "stalls"):
            await self._tokens(2)
            await self._go_wrong()
        else:
            await self._tokens(self._body["max_tokens"])
            await self._end()
        return self._response

    async def _tokens(self, num_tokens: int) -> None:
        step = 2 if self._model == "pairs" else 1
        for index in range(0, num_tokens, step):
            await asyncio.sleep(0.6 if self._model == "jittery" and index == 2 else GAP_S)
            size = min(step, num_tokens - index)
            text = "" if self._model == "control" and index % 3 == 2 else " word" * size
            await self._event(self._chunk(text, num_tokens=index + size))

    async def _go_wrong(self) -> None:
        if self._model == "error-event":
            await self._event({"error": {"message": "the worker is gone", "code": 500}})
        elif self._model == "garbage":
            await self._write(b"data: {not json\n\n")
        elif self._model == "stalls":
            await asyncio.sleep(30)

    async def _end(self) -> None:
        last = self._chunk("", finish_reason="length", num_tokens=self._body["max_tokens"])
        if self._model == "closing-count":
            last["usage"] = self._usage(self._body["max_tokens"])
        await self._event(last)
        if self._model not in ("no-usage", "closing-count"):
            await self._event({"choices": [], "usage": self._usage(self._body["max_tokens"])})
        if self._model != "no-done":
            await self._write(b"data: [DONE]\n\n")

    def _usage(self, num_tokens: int) -> dict[str, int]:
        return {"prompt_tokens": self._num_prompt_tokens, "completion_tokens": num_tokens}

    def _chunk(
        self, text: str, role: str | None = None, finish_reason: str | None = None, num_tokens: int = 0
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason}
        if self._is_chat:
            choice["delta"] = {"content": text, **({"role": role} if role else {})}
        else:
            choice["text"] = text
        chunk: dict[str, Any] = {"choices": [choice]}
        if self._model == "counting":
            chunk["usage"] = self._usage(num_tokens)
        return chunk

    async def _event(self, payload: dict[str, Any]) -> None:
        data = json.dumps(payload).encode()
        if self._model == "torn":
            await self._write(b": keep-alive\r\n\r\nevent: chunk\r\ndata:" + data + b"\r\n\r\n")
        else:
            await self._write(b"data: " + data + b"\n\n")

    async def _write(self, data: bytes) -> None:
        if self._model != "torn":
            await self._response.write(data)
            return
        for i in range(len(data)):
            await self._response.write(data[i : i + 1])
            if i % 16 == 0:
                await asyncio.sleep(0)


@asynccontextmanager
async def openai_server() -> AsyncIterator[OpenAiServer]:
    """Run a server on a free port."""
    server = OpenAiServer()
    app = web.Application(client_max_size=1 << 26)
    app.router.add_get("/v1/models", server.models)
    app.router.add_post("/v1/completions", server.complete)
    app.router.add_post("/v1/chat/completions", server.complete)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()
