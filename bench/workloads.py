"""What is sent: closed-loop streams, and streams beside which long prompts arrive.

Prompts are random token ids from a seed, so their lengths are exact and no two share a prefix.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

import aiohttp

from bench.client import Sample, run_completion

# Ordinary tokens of any vocabulary that is larger: below lie control tokens and single bytes.
_TOKEN_IDS = (1000, 30000)

Say = Callable[[str], None]


class Target:
    """A server under test and the model it serves."""

    def __init__(self, url: str, model: str, seed: int) -> None:
        self.url, self.model = url.rstrip("/"), model
        self._random = random.Random(seed)

    def body(self, num_prompt_tokens: int, num_output_tokens: int) -> dict[str, Any]:
        """Return a greedy completion of exactly these lengths."""
        return {
            "model": self.model,
            "prompt": [self._random.randrange(*_TOKEN_IDS) for _ in range(num_prompt_tokens)],
            "max_tokens": num_output_tokens,
            "min_tokens": num_output_tokens,
            "ignore_eos": True,
            "temperature": 0,
        }


def new_session() -> aiohttp.ClientSession:
    """Return a client session without a bound on connections, and ten minutes for each request."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=600, sock_connect=10)
    )


async def closed(
    target: Target, *, num_streams: int, num_requests: int, prompt_tokens: int, output_tokens: int, say: Say
) -> tuple[list[Sample], float]:
    """Keep `num_streams` requests running until `num_requests` are done; return samples and seconds."""
    bodies = [target.body(prompt_tokens, output_tokens) for _ in range(num_requests)]
    samples: list[Sample] = []
    async with new_session() as http:
        await run_completion(http, target.url, target.body(16, 4))  # warm-up, not counted
        started_s = time.monotonic()

        async def stream() -> None:
            while bodies:
                samples.append(await run_completion(http, target.url, bodies.pop()))
                say(f"{len(samples)} of {num_requests} requests")

        await asyncio.gather(*(stream() for _ in range(num_streams)))
    return samples, time.monotonic() - started_s


async def interference(
    target: Target, *, num_streams: int, output_tokens: int, long_tokens: int, every_s: float, say: Say
) -> tuple[list[Sample], list[Sample], float]:
    """Run steady streams while a long prompt arrives every `every_s`; return their samples and seconds.

    With `every_s` 0 no long prompt arrives: the baseline.
    """
    long_samples: list[Sample] = []
    async with new_session() as http:
        await run_completion(http, target.url, target.body(16, 4))  # warm-up, not counted
        started_s = time.monotonic()
        steady = [
            asyncio.create_task(run_completion(http, target.url, target.body(32, output_tokens)))
            for _ in range(num_streams)
        ]

        async def arrivals() -> None:
            while every_s > 0:
                await asyncio.sleep(every_s)
                long_samples.append(await run_completion(http, target.url, target.body(long_tokens, 2)))
                say(f"{len(long_samples)} long prompts answered")

        arriving = asyncio.create_task(arrivals())
        samples = list(await asyncio.gather(*steady))
        duration_s = time.monotonic() - started_s
        arriving.cancel()
        await asyncio.gather(arriving, return_exceptions=True)
    return samples, long_samples, duration_s
