"""The clients of a router benchmark: a process with many streaming HTTP connections and next to no work per token.

    {"open": N} ─► N connections, one request each ─► {"opened": N} when each has its first event
    (events are counted as they come; the bytes are kept)
    {"close": N} ─► every stream has ended ─► decoded and compared ─► {"num_tokens": …}, or {"error": …}

1. Commands come on standard input, one JSON object a line; answers go to standard output.
2. While it is measured a client only counts the ends of events: two cores are shared with the router.
3. When all is over every stream is read as a client would read it: chunks, events, JSON, text. Each must have received
   the script's text, from its beginning, every token once and in order.
"""

from __future__ import annotations

import asyncio
import json
import sys
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Final

from bench.router_counter import Counter

END_OF_EVENT: Final = b"\n\n"
STREAM_BUDGET_S: Final = 120.0


class BadStream(Exception):
    """A client did not receive what the script says."""


class StreamClient(asyncio.Protocol):
    """One connection with one streaming request."""

    def __init__(self, request: bytes, counter: Counter) -> None:
        loop = asyncio.get_running_loop()
        self.begun: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self.chunks: list[bytes] = []
        self._request = request
        self._counter = counter
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Count the events that end here."""
        self.chunks.append(data)
        # An event that ends on the border of two reads must count as well.
        num_events = (self._tail + data).count(END_OF_EVENT)
        self._tail = data[-1:]
        if num_events:
            self._counter.add(num_events)
            if not self.begun.done():
                self.begun.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        """Note the end."""
        for future in (self.begun, self.ended):
            if not future.done():
                future.set_result(None)


class Clients:
    """All connections of one measurement.

    Args:
        port: of the router on this machine.
        request: whole HTTP request, the same for every client.
        words: text of each token of the script, in order; it is repeated without end.
    """

    def __init__(self, port: int, request: bytes, words: list[str], counter: Counter) -> None:
        self._port = port
        self._request = request
        self._words = words
        self._counter = counter
        self._clients: list[StreamClient] = []

    async def open(self, num_streams: int) -> None:
        """Open streams and wait for the first event of each."""
        loop = asyncio.get_running_loop()
        for _ in range(num_streams):
            _, client = await loop.create_connection(
                lambda: StreamClient(self._request, self._counter), "127.0.0.1", self._port
            )
            self._clients.append(client)
        async with asyncio.timeout(STREAM_BUDGET_S):
            await asyncio.gather(*(client.begun for client in self._clients))

    async def finish(self) -> int:
        """Wait until every stream has ended and check it; return the tokens received.

        Raises:
            BadStream: tokens are missing, doubled or wrong, or a stream did not end well.
        """
        clients, self._clients = self._clients, []
        async with asyncio.timeout(STREAM_BUDGET_S):
            await asyncio.gather(*(client.ended for client in clients))
        # [DONE] was counted as well, but is no token.
        self._counter.add(-len(clients))
        return sum(check_stream(b"".join(client.chunks), self._words) for client in clients)


def check_stream(data: bytes, words: list[str]) -> int:
    """Return how many tokens a stream carried.

    Args:
        data: the raw HTTP response.
        words: text of each token, repeated without end.

    Raises:
        BadStream: it is not the answer that the script says.
    """
    head, _, body = data.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200") or b"text/event-stream" not in head:
        raise BadStream(f"no stream: {data[:300]!r}")
    *events, end = [e.removeprefix(b"data: ") for e in unchunked(body).split(END_OF_EVENT) if e]
    if end != b"[DONE]":
        raise BadStream(f"ends with {end[:200]!r}")
    choices = [json.loads(event)["choices"][0] for event in events]
    if choices[-1]["finish_reason"] != "length":
        raise BadStream(f"finish reason {choices[-1]['finish_reason']!r}")
    pieces = [choice["delta"].get("content", "") for choice in choices]
    if pieces != list(islice(cycle(words), len(pieces))):
        raise BadStream(f"not the script's tokens: {''.join(pieces)[:200]!r}")
    return len(pieces)


def unchunked(body: bytes) -> bytes:
    """Return a body without the frame of `Transfer-Encoding: chunked`.

    Raises:
        BadStream: it is cut off.
    """
    found: list[bytes] = []
    at = 0
    while True:
        end = body.find(b"\r\n", at)
        if end < 0:
            raise BadStream("the response is cut off")
        length = int(body[at:end], 16)
        if length == 0:
            return b"".join(found)
        found.append(body[end + 2 : end + 2 + length])
        at = end + 2 + length + 2


async def run() -> None:
    """Obey the lines of standard input until it ends."""
    reader = asyncio.StreamReader(limit=1 << 24)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    settings = json.loads(await reader.readline())
    counter = Counter(Path(settings["counter"]))
    clients = Clients(settings["port"], settings["request"].encode(), settings["words"], counter)
    while line := await reader.readline():
        say(await _obey(clients, json.loads(line)))


async def _obey(clients: Clients, command: dict[str, Any]) -> dict[str, Any]:
    try:
        if "open" in command:
            await clients.open(command["open"])
            return {"opened": command["open"]}
        return {"num_tokens": await clients.finish()}
    except TimeoutError:
        return {"error": f"not within {STREAM_BUDGET_S:g} s"}
    except (BadStream, OSError) as error:
        return {"error": str(error)}


def say(answer: dict[str, Any]) -> None:
    """Write one line to standard output."""
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(run())
