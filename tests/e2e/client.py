"""A small HTTP client for the tests: completions by token ids, streamed or not."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import aiohttp

REQUEST_BUDGET_S = 240.0


@dataclass(slots=True)
class Streamed:
    """What a stream said, chunk by chunk."""

    chunks: list[dict[str, Any]] = field(default_factory=list)
    is_done: bool = False

    @property
    def text(self) -> str:
        """The text of choice 0."""
        parts = [c["choices"][0] for c in self.chunks if c.get("choices")]
        return "".join(p.get("text") or p.get("delta", {}).get("content") or "" for p in parts)

    @property
    def token_ids(self) -> list[int]:
        """The token ids of choice 0, where `return_token_ids` was set."""
        return [t for c in self.chunks if c.get("choices") for t in c["choices"][0].get("token_ids") or []]

    @property
    def finish_reason(self) -> str | None:
        """The last reason given for choice 0."""
        reasons = [c["choices"][0].get("finish_reason") for c in self.chunks if c.get("choices")]
        return next((r for r in reversed(reasons) if r), None)


def session() -> aiohttp.ClientSession:
    """Return a client session with a budget for each request."""
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=REQUEST_BUDGET_S))


def completion(prompt: list[int] | list[str] | str, **fields: Any) -> dict[str, Any]:
    """Return a greedy completion request that reports token ids."""
    body = {"model": "smollm2", "prompt": prompt, "temperature": 0, "return_token_ids": True}
    return {**body, **fields}


async def complete(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return the first choice of a completion, with `usage` beside it."""
    async with http.post(f"{url}/v1/completions", json=body) as response:
        answer = await response.json()
        assert response.status == 200, answer
    return {**answer["choices"][0], "usage": answer["usage"]}


async def stream(
    http: aiohttp.ClientSession, url: str, body: dict[str, Any], path: str = "/v1/completions"
) -> Streamed:
    """Read a whole stream."""
    result = Streamed()
    async with http.post(f"{url}{path}", json={**body, "stream": True}) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            data = line[6:].strip()
            if data == b"[DONE]":
                result.is_done = True
            else:
                result.chunks.append(json.loads(data))
    return result


async def gather_limited(limit: int, coroutines: list[Any]) -> list[Any]:
    """Await all, at most `limit` at once, in order of their position."""
    gate = asyncio.Semaphore(limit)

    async def one(coroutine: Any) -> Any:
        async with gate:
            return await coroutine

    return await asyncio.gather(*(one(c) for c in coroutines))
