"""One streamed completion over OpenAI HTTP, timed as its bytes arrive.

1. `Events` cuts the byte stream into server-sent events, however TCP has cut it.
2. `Reply` collects when tokens came, how many each time, and what the server counted.
3. `stream` sends one request and fills its reply; whatever goes wrong ends up in `reply.error`.

        sent ──► status ──► chunk* ──► finish_reason ──► usage ──► [DONE]
          │         │          │                                     │
          └─────────┴──────────┴──► error, silence, disconnect       └──► settled
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
import msgspec

# After [DONE] the body's own end follows at once; waiting for it lets the connection be used again.
_END_BUDGET_S: Final = 0.5
# Servers close idle connections, some after five seconds: give them up sooner, or a request meets a closing one.
_SHOWN_BODY_CHARS: Final = 200


class Events:
    """Server-sent events out of pieces of a byte stream: `feed` returns the data of those that are complete.

    Lines end in LF, CR or CR LF, an empty line ends an event, lines that begin with a colon are keep-alives, several
    `data` lines are joined. What stands after the last empty line is no event.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._skips_lf = False

    def feed(self, received: bytes) -> list[bytes]:
        """Take the next bytes and return the data of every event that they complete."""
        if self._skips_lf and received:
            received = received.removeprefix(b"\n")
            self._skips_lf = False
        if received.endswith(b"\r"):
            self._skips_lf = True
        if b"\r" in received:
            received = received.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, self._rest = (self._rest + received).split(b"\n")
        found = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                found.append(b"\n".join(self._data))
                self._data.clear()
        return found


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_DECODER: Final = msgspec.json.Decoder(_Chunk)


@dataclass(slots=True)
class Reply:
    """What has come of one request so far. Times are seconds on this process's monotonic clock.

    Attributes:
        chunk_s: arrival of each chunk with a token in it.
        chunk_tokens: tokens in each, final once `settle` has run; -1 while the server has not said.
        finished_s: end of the stream, or of the attempt.
        is_asked_to_stop: set by the caller: hang up at the next chunk.
        is_cut: hung up on that account; no error.
    """

    started_s: float = 0.0
    finished_s: float = 0.0
    chunk_s: list[float] = field(default_factory=list)
    chunk_tokens: list[int] = field(default_factory=list)
    num_prompt_tokens: int | None = None
    num_counted_tokens: int | None = None
    error: str | None = None
    is_asked_to_stop: bool = False
    is_cut: bool = False
    has_finish_reason: bool = False
    is_done: bool = False
    empty_chunks: set[int] = field(default_factory=set)

    @property
    def num_output_tokens(self) -> int:
        """Output tokens as the server counted, else as they were seen."""
        return sum(self.chunk_tokens) if self.num_counted_tokens is None else self.num_counted_tokens

    def take(self, data: bytes, now_s: float) -> None:
        """Take one event's data that arrived at `now_s`; raises msgspec.DecodeError if it is no chunk."""
        if data == b"[DONE]":
            self.is_done = True
            return
        chunk = _DECODER.decode(data)
        if chunk.error is not None:
            self.error = _words_of(chunk.error)
            return
        choice = chunk.choices[0] if chunk.choices else None
        count = self._newly_counted(chunk.usage, choice)
        if choice is None:
            return
        self.has_finish_reason = self.has_finish_reason or choice.finish_reason is not None
        text, is_token = _text_of(choice)
        if not text and choice.finish_reason is not None and any(n < 0 for n in self.chunk_tokens):
            # The closing event of a server that counts only there: the count is the total, which `settle` spreads.
            return
        if count is not None and count <= 0:
            # The rest of an earlier token's text, or a server that counts only at the end: `settle` knows which.
            if not text:
                return
            count = None
        # An empty piece is a token that shows no text (half a character, a control token), but only once the stream
        # has begun: before, it is a greeting.
        if count is None and not text and not (is_token and self.chunk_s):
            return
        if not text:
            self.empty_chunks.add(len(self.chunk_s))
        self.chunk_s.append(now_s)
        self.chunk_tokens.append(-1 if count is None else count)

    def _newly_counted(self, usage: _Usage | None, choice: _Choice | None) -> int | None:
        """Return how many tokens this event brings, or None if it does not say."""
        if usage is not None:
            self.num_prompt_tokens = usage.prompt_tokens if usage.prompt_tokens is not None else self.num_prompt_tokens
            if usage.completion_tokens is not None:
                before, self.num_counted_tokens = self.num_counted_tokens or 0, usage.completion_tokens
                return usage.completion_tokens - before
        if choice is not None and choice.token_ids is not None:
            return len(choice.token_ids)
        return None

    def settle(self) -> None:
        """Give every chunk its number of tokens, so that they add up to what the server counted."""
        total = self.num_counted_tokens
        unknown = [i for i, n in enumerate(self.chunk_tokens) if n < 0]
        left = len(unknown) if total is None else total - sum(n for n in self.chunk_tokens if n > 0)
        if left < len(unknown):
            self._drop_empty(len(unknown) - max(left, 0))
            unknown = [i for i, n in enumerate(self.chunk_tokens) if n < 0]
        for rank, i in enumerate(unknown):
            self.chunk_tokens[i] = (rank + 1) * max(left, 0) // len(unknown) - rank * max(left, 0) // len(unknown)
        if not unknown and left > 0 and self.chunk_tokens:
            self.chunk_tokens[-1] += left

    def _drop_empty(self, num_surplus: int) -> None:
        """Drop pieces without text that turn out to have been no tokens, the latest ones first."""
        empty = sorted(i for i in self.empty_chunks if self.chunk_tokens[i] < 0)
        for i in reversed(empty[-num_surplus:]):
            del self.chunk_s[i], self.chunk_tokens[i]
        self.empty_chunks.clear()


def _text_of(choice: _Choice) -> tuple[str, bool]:
    """Return a choice's text, and whether it can be a token although there is none."""
    if choice.delta is None:
        return choice.text or "", choice.text is not None and choice.finish_reason is None
    delta = choice.delta
    text = delta.content or delta.reasoning_content or delta.reasoning or ""
    return text, delta.content is not None and delta.role is None and choice.finish_reason is None


def _words_of(error: Any) -> str:
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or error)[:_SHOWN_BODY_CHARS]


@dataclass(frozen=True, slots=True)
class Budgets:
    """How long one request may take: to connect, without a single byte, and as a whole."""

    connect_s: float = 10.0
    silence_s: float = 300.0
    request_s: float = 1800.0


def new_session(budgets: Budgets, api_key: str | None = None) -> aiohttp.ClientSession:
    """Return a client session without a bound on connections; the caller closes it."""
    # A compressed stream would arrive in lumps.
    headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {api_key}"} if api_key else {})}
    return aiohttp.ClientSession(
        # A connection for each request: llama-server closes kept ones without a word after an answer of one token.
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(
            total=budgets.request_s, sock_connect=budgets.connect_s, sock_read=budgets.silence_s
        ),
        headers=headers,
        read_bufsize=1 << 20,
    )


async def stream(http: aiohttp.ClientSession, url: str, body: bytes, reply: Reply) -> None:
    """POST a streaming request and fill `reply` as the stream arrives; settled and with its end when this returns.

    Its clock starts before the connection is made, where none is open.
    Cancel-safe: the connection is closed, the reply is settled and holds what came before, the cancellation goes on.

    Args:
        http: makes the connection; stays open.
        url: the whole address of the endpoint.
        body: JSON.
        reply: filled while the stream runs, so that others may look at it.
    """
    reply.started_s = time.monotonic()
    try:
        async with http.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
            if response.status != 200:
                text = await response.text(errors="replace")
                reply.error = f"HTTP {response.status}: {' '.join(text.split())[:_SHOWN_BODY_CHARS]}"
            else:
                await _read(response, reply)
    except TimeoutError as error:
        reply.error = f"gave up waiting: {error}" if str(error) else "gave up waiting: the request's budget is spent"
    except msgspec.DecodeError as error:
        reply.error = f"an event that is no completion chunk: {error}"
    except (aiohttp.ClientError, OSError, ValueError) as error:
        reply.error = f"{type(error).__name__}: {error}"
    finally:
        reply.finished_s = reply.finished_s or time.monotonic()
        reply.settle()


async def _read(response: aiohttp.ClientResponse, reply: Reply) -> None:
    events = Events()
    async for received in response.content.iter_any():
        now_s = time.monotonic()
        seen = len(reply.chunk_s)
        for data in events.feed(received):
            reply.take(data, now_s)
            if reply.error is not None:
                return
        if reply.is_done:
            reply.finished_s = now_s
            await _read_to_end(response)
            return
        if reply.is_asked_to_stop and len(reply.chunk_s) > seen:
            reply.is_cut, reply.finished_s = True, now_s
            response.close()
            return
    if not reply.has_finish_reason:
        reply.error = "the stream ended before the answer did: no finish_reason and no [DONE]"


async def _read_to_end(response: aiohttp.ClientResponse) -> None:
    try:
        async with asyncio.timeout(_END_BUDGET_S):
            await response.content.read()
    except (TimeoutError, aiohttp.ClientError):
        response.close()
