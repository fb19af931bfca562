"""What clients saw, token by token, held against the run without a fault.

oracle(request) ─► the tokens of a quiet server          once per request
Ledger.stream(request) ─► a Record: tokens, when each came, how the stream ended
Record.faults(oracle) ─► what is wrong with it, in words; nothing is right only if this is empty
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.e2e.client import completion

REQUEST_BUDGET_S = 120.0


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a trial; everything random about it comes from its seed.

    Attributes:
        regex: what its output must obey, which must have no end; empty for anything.
    """

    prompt: str
    max_tokens: int
    temperature: float
    seed: int
    regex: str = ""

    def body(self) -> dict[str, Any]:
        """Return it as OpenAI's completions take it."""
        return completion(
            self.prompt,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=self.seed,
            ignore_eos=True,
            stream=True,
            **({"structured_outputs": {"regex": self.regex}} if self.regex else {}),
        )


@dataclass(slots=True)
class Record:
    """One stream as its client saw it.

    Attributes:
        token_ids: in the order they came.
        times_s: when each came, on this process's monotonic clock.
        errors: error events and broken connections, in words.
        num_ends: terminal records: finish reasons and error events.
        status: of the HTTP answer; 0 before there is one.
        retry_after: that header of a refusal.
        begun_s, answered_s, ended_s: when it was asked, its head came and it was over; 0 before.
    """

    request: Request
    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    num_ends: int = 0
    is_done: bool = False
    status: int = 0
    retry_after: str | None = None
    begun_s: float = 0.0
    answered_s: float = 0.0
    ended_s: float = 0.0

    @property
    def ttft_s(self) -> float | None:
        """Asking to first token, if one came."""
        return self.times_s[0] - self.begun_s if self.times_s else None

    @property
    def mean_tpot_s(self) -> float:
        """The mean wait between two tokens; 0 for fewer than two."""
        return (self.times_s[-1] - self.times_s[0]) / (len(self.times_s) - 1) if len(self.times_s) > 1 else 0.0

    def gap_around_s(self, since_s: float, until_s: float) -> float | None:
        """Return the longest wait between two tokens that overlaps a span, or None if no token was awaited then."""
        pairs = zip(self.times_s, self.times_s[1:], strict=False)
        return max((b - a for a, b in pairs if b >= since_s and a <= until_s), default=None)

    def is_explicit_failure(self, oracle: Sequence[int]) -> bool:
        """Whether it ended with exactly one error, said by the server, after right tokens only."""
        was_said = [e for e in self.errors if e.startswith(("error event", "HTTP 503"))]
        is_right_so_far = self.token_ids == list(oracle[: len(self.token_ids)])
        return len(self.errors) == len(was_said) == self.num_ends == 1 and not self.is_done and is_right_so_far

    @property
    def longest_gap_s(self) -> float:
        """The longest wait between two tokens."""
        return max((b - a for a, b in zip(self.times_s, self.times_s[1:], strict=False)), default=0.0)

    def faults(self, oracle: Sequence[int]) -> list[str]:
        """Say what is wrong with this stream: lost, doubled or other tokens, an error, no end or several."""
        found = list(self.errors)
        if self.token_ids != list(oracle):
            same = next((i for i, (a, b) in enumerate(zip(self.token_ids, oracle, strict=False)) if a != b), None)
            where = (
                f"differs at token {same}" if same is not None else f"has {len(self.token_ids)} of {len(oracle)} tokens"
            )
            found.append(f"the stream {where}")
        if self.num_ends != 1 or not self.is_done:
            found.append(f"{self.num_ends} terminal records, {'with' if self.is_done else 'without'} [DONE]")
        return found


class Ledger:
    """Streams requests from one server and keeps what came. Used on one event loop."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self._http = http
        self._url = url
        self._oracles: dict[Request, list[int]] = {}

    async def oracle(self, request: Request) -> list[int]:
        """Return the tokens of a request on the server as it is now, which must be left in peace."""
        if request not in self._oracles:
            record = await self.stream(request)
            assert record.is_done and not record.errors and record.num_ends == 1, record.errors
            assert len(record.token_ids) == request.max_tokens
            self._oracles[request] = record.token_ids
        return self._oracles[request]

    async def stream(self, request: Request, record: Record | None = None) -> Record:
        """Read one stream to its end into `record`, which may be looked at meanwhile."""
        record = record or Record(request)
        record.begun_s = time.monotonic()
        try:
            async with asyncio.timeout(REQUEST_BUDGET_S):
                await self._read(request.body(), record)
        except TimeoutError:
            record.errors.append(f"no end within {REQUEST_BUDGET_S} s")
        except aiohttp.ClientError as error:
            record.errors.append(f"connection: {error!r}")
        finally:
            record.ended_s = time.monotonic()
        return record

    async def ask(self, body: dict[str, Any]) -> Record:
        """Read the stream of any body, of which nothing is expected."""
        record = Record(Request("", 0, 0.0, 0))
        record.begun_s = time.monotonic()
        await self._read(body, record)
        record.ended_s = time.monotonic()
        return record

    async def _read(self, body: dict[str, Any], record: Record) -> None:
        async with self._http.post(f"{self._url}/v1/completions", json=body) as response:
            record.status, record.answered_s = response.status, time.monotonic()
            record.retry_after = response.headers.get("Retry-After")
            if response.status != 200:
                record.errors.append(f"HTTP {response.status}: {(await response.text())[:200]}")
                record.num_ends += 1
                return
            async for line in response.content:
                if line.startswith(b"data: "):
                    self._take(line[6:].strip(), record)

    def _take(self, data: bytes, record: Record) -> None:
        if data == b"[DONE]":
            record.is_done = True
            return
        chunk = json.loads(data)
        if "error" in chunk:
            record.errors.append(f"error event: {chunk['error'].get('message')}")
            record.num_ends += 1
            return
        for choice in chunk.get("choices", ()):
            fresh = choice.get("token_ids") or []
            record.token_ids.extend(fresh)
            record.times_s.extend([time.monotonic()] * len(fresh))
            record.num_ends += choice.get("finish_reason") is not None
