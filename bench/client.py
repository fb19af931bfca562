"""One streamed completion, timed chunk by chunk."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass(slots=True)
class Sample:
    """What one request gave. Times are seconds on this process's monotonic clock.

    Attributes:
        token_s: when each chunk with text arrived; one token a chunk where the server can.
        num_output_tokens: as the server counts them, or the number of chunks where it does not say.
        error: why it failed, or None.
    """

    started_s: float
    token_s: list[float] = field(default_factory=list)
    finished_s: float | None = None
    num_output_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return self.token_s[0] - self.started_s if self.token_s else None

    @property
    def gaps_s(self) -> list[float]:
        """Gaps between chunks (ITL)."""
        return [b - a for a, b in zip(self.token_s, self.token_s[1:], strict=False)]

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first."""
        if self.finished_s is None or self.ttft_s is None or self.num_output_tokens < 2:
            return None
        return (self.token_s[-1] - self.token_s[0]) / (self.num_output_tokens - 1)


async def run_completion(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Sample:
    """Send one streamed completion and time it; a failure is a sample with an error, never an exception.

    Args:
        http: makes the connection; stays open.
        url: the server's base URL.
        body: what to POST to /v1/completions; streaming and usage are added.
    """
    payload = {**body, "stream": True, "stream_options": {"include_usage": True}}
    sample = Sample(time.monotonic())
    try:
        async with http.post(f"{url}/v1/completions", json=payload) as response:
            if response.status != 200:
                sample.error = f"HTTP {response.status}: {(await response.text())[:200]}"
                return sample
            await _read(response, sample)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        sample.error = f"{type(error).__name__}: {error}"
    return sample


async def _read(response: aiohttp.ClientResponse, sample: Sample) -> None:
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        now_s, data = time.monotonic(), line[6:].strip()
        if data == b"[DONE]":
            sample.finished_s = now_s
            sample.num_output_tokens = sample.num_output_tokens or len(sample.token_s)
            return
        chunk = json.loads(data)
        if "error" in chunk:
            sample.error = str(chunk["error"].get("message"))
            return
        if any(choice.get("text") for choice in chunk.get("choices", ())):
            sample.token_s.append(now_s)
        if chunk.get("usage"):
            sample.num_output_tokens = int(chunk["usage"]["completion_tokens"])
    sample.error = "the stream ended without [DONE]"
