"""A port for workers and their keepers: what a connection may take here before it has proved itself.

    connected ─► STRANGER ── `trust`, once the secret is proved ─► KNOWN: nothing of this file holds it any more
                    └── HEAD_BUDGET_S without a head, STRANGER_BYTES sent, or one stranger too many ─► cut

1. A stranger has HEAD_BUDGET_S to send the head of a request, however it drips, and `protocol.channel` gives it
   HANDSHAKE_BUDGET_S for the proof. 2. Whatever it sends until then (heads, bodies, frames, pings) is counted before
   anything reads it: at STRANGER_BYTES it is cut. 3. A connection brings one request.
4. There are at most MAX_STRANGERS at a port.

Who has to go when there is one too many is chosen so that an honest worker gets in while others hold connections, or
open them as fast as they can. It is never the newest: then whoever came first would keep everybody out. It is one of
the host that has most of them, so that one host pushes out nobody of another. Of those it is the oldest, who has had
time for its proof, as long as that is older than HONEST_S; if all are younger they come in a flood, and any one of them
goes: an honest one, which needs a few milliseconds, mostly stays.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Protocol

from aiohttp import web
from aiohttp.web_request import BaseRequest

log = logging.getLogger(__name__)

MAX_STRANGERS: Final = 128
STRANGER_BYTES: Final = 16 << 10
HEAD_BUDGET_S: Final = 5.0
HONEST_S: Final = 1.0
MAX_LINE_BYTES: Final = 4096
MAX_HEADERS: Final = 32
READ_BYTES: Final = 4096
LINGER_S: Final = 1.0
SAY_EVERY_S: Final = 10.0
MAX_SAID: Final = 10


class Stranger(Protocol):
    """A connection that has proved nothing."""

    def cut(self) -> None:
        """End it at once."""


class Hearsay:
    """Lines of the log that strangers cause: MAX_SAID in SAY_EVERY_S, and then how many more there were.

    Args:
        speaker: logger of whoever warns.
        clock: monotonic seconds.
    """

    def __init__(self, speaker: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._speaker = speaker
        self._clock = clock
        self._since_s = float("-inf")
        self._num_said = self._num_left_out = 0

    def warn(self, message: str, *arguments: object) -> None:
        """Write a line, or count it."""
        now_s = self._clock()
        if now_s - self._since_s >= SAY_EVERY_S:
            if self._num_left_out:
                self._speaker.warning("%d more lines like the last one were left out", self._num_left_out)
            self._since_s, self._num_said, self._num_left_out = now_s, 0, 0
        if self._num_said < MAX_SAID:
            self._num_said += 1
            self._speaker.warning(message, *arguments)
        else:
            self._num_left_out += 1


class Strangers:
    """The connections of one port that have proved nothing.

    Args:
        max_num: how many there may be; one too many costs one of them its place.
        clock: monotonic seconds.
    """

    def __init__(self, max_num: int = MAX_STRANGERS, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_num = max_num
        self._clock = clock
        self._dice = random.Random()
        self._here: dict[Stranger, tuple[str, float]] = {}  # in the order in which they came
        self._num_by_host: Counter[str] = Counter()
        self._hearsay = Hearsay(log, clock)

    def __len__(self) -> int:
        return len(self._here)

    def enter(self, stranger: Stranger, host: str) -> None:
        """Let one in, and cut another if there are too many."""
        self._here[stranger] = (host, self._clock())
        self._num_by_host[host] += 1
        if len(self._here) > self._max_num:
            self.cut(self._one_too_many(stranger), f"there are more than {self._max_num} of them")

    def leave(self, stranger: Stranger) -> None:
        """Note that one has gone, or is a stranger no more; idempotent."""
        found = self._here.pop(stranger, None)
        if found is None:
            return
        self._num_by_host[found[0]] -= 1
        if not self._num_by_host[found[0]]:
            del self._num_by_host[found[0]]

    def cut(self, stranger: Stranger, reason: str) -> None:
        """Cut one."""
        host = self._here[stranger][0] if stranger in self._here else "an unknown host"
        self.leave(stranger)
        stranger.cut()
        self._hearsay.warn("cut an unproved connection from %s: %s", host, reason)

    def _one_too_many(self, newest: Stranger) -> Stranger:
        most = max(self._num_by_host.values())
        crowded = {host for host, number in self._num_by_host.items() if number == most}
        candidates = [one for one, (host, _) in self._here.items() if host in crowded and one is not newest]
        if not candidates:  # as many hosts as strangers
            candidates = [one for one in self._here if one is not newest]
        oldest = candidates[0]
        is_old = self._clock() - self._here[oldest][1] >= HONEST_S
        return oldest if is_old else self._dice.choice(candidates)


class GuardedRunner(web.AppRunner):
    """Runs an application whose connections are strangers until `trust` is called for their request.

    Args:
        strangers: of its port.
        shutdown_timeout: how long handlers may go on at the end.
        handler_cancellation: cancel a handler whose connection is lost.
    """

    def __init__(
        self,
        app: web.Application,
        shutdown_timeout: float,
        handler_cancellation: bool = False,
        strangers: Strangers | None = None,
    ) -> None:
        app.on_response_prepare.append(_end_with)
        super().__init__(
            app,
            access_log=None,
            handler_cancellation=handler_cancellation,
            shutdown_timeout=shutdown_timeout,
            keepalive_timeout=HEAD_BUDGET_S,
            lingering_time=LINGER_S,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
            max_headers=MAX_HEADERS,
            read_bufsize=READ_BYTES,
            auto_decompress=False,
        )
        self.strangers = Strangers() if strangers is None else strangers

    @property
    def server(self) -> Any:
        """What makes a protocol of each new connection."""
        server = super().server
        return None if server is None else partial(_Connection, self.strangers, server)


class _Connection(web.RequestHandler):
    """A connection that is counted, and whose bytes are, until it is trusted."""

    __slots__ = ("_num_bytes", "_strangers", "is_known")

    def __init__(self, strangers: Strangers, server: web.Server) -> None:
        super().__init__(server, loop=server._loop, **server._kwargs)
        self._strangers = strangers
        self._num_bytes = 0
        self.is_known = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        peername = transport.get_extra_info("peername")
        self._strangers.enter(self, str(peername[0]) if peername else "")

    def connection_lost(self, exc: BaseException | None) -> None:
        self._strangers.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self.is_known:
            self._num_bytes += len(data)
            if self._num_bytes > STRANGER_BYTES:
                self._strangers.cut(self, f"it sent more than {STRANGER_BYTES} bytes")
                return
        super().data_received(data)

    def cut(self) -> None:
        """End it at once."""
        if self.transport is not None:
            self.transport.abort()

    def trust(self) -> None:
        """Hold it no longer: it has proved the secret."""
        self.is_known = True
        self._strangers.leave(self)

    def handle_error(
        self, request: BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Return the answer to what is no request; strangers write no tracebacks into the log."""
        if status >= 500 and not isinstance(exc, ConnectionError):
            return super().handle_error(request, status, exc, message)
        if request.writer.output_size > 0 or isinstance(exc, ConnectionError):
            raise ConnectionResetError("there is nobody to be answered")
        log.debug("what %s sent cannot be read: %s", request.remote, type(exc).__name__)
        response = web.Response(status=status, text="this is not HTTP that can be read\n")
        response.force_close()
        return response


def trust(request: BaseRequest) -> None:
    """Let a request's connection be a stranger no more, where a `GuardedRunner` serves it."""
    connection = request.protocol
    if isinstance(connection, _Connection):
        connection.trust()


async def _end_with(_: web.Request, response: web.StreamResponse) -> None:
    """End a connection with its answer: a stranger that asks again comes again."""
    response.force_close()
