"""One line for each request of the API: what it was, how it went, and where.

    a door opens a record ─► a session notes what becomes of its choices ─► the door, or a kept stream, closes it

1. A front end opens a record before it looks at anything else, so that what is refused has a line as well. Whatever the
   request's task does later finds it with `current`: whose request it is, and where to note what happens.
2. A placement adds its workers and its transfer id, which workers' own lines name; a terminal record of a choice adds
   its tokens and times. Nothing is noted for a token.
3. `close` writes the line, once. What clients wrote is quoted as JSON quotes it, so that no line can be forged.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from protocol.timeline import Timeline
from router.access import NOBODY, Client

log = logging.getLogger(__name__)

STYLES: Final = ("text", "json", "off")
MAX_CHARS: Final = 200
MAX_TRANSFERS: Final = 16
CLIENT_LEFT: Final = 499


@dataclass(slots=True, eq=False)
class RequestRecord:
    """What is known of one request of the API.

    Attributes:
        endpoint: method and path, or the name of a call.
        status: of the answer: HTTP's number, or gRPC's name.
        num_choices: choices and readouts that were accepted.
        num_placements: of all of them; beyond one each they were placed again.
        queue_s: the longest wait of a choice for its prompt's first chunk, in the router and on its prefill worker.
    """

    endpoint: str = ""
    arrived_s: float = 0.0
    client: Client = NOBODY
    request_id: str = ""
    model: str = ""
    status: int | str = ""
    error: str = ""
    num_choices: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_placements: int = 0
    num_failovers: int = 0
    ttft_s: float | None = None
    queue_s: float | None = None
    finish: set[str] = field(default_factory=set)
    prefills: set[str] = field(default_factory=set)
    decodes: set[str] = field(default_factory=set)
    transfers: list[int] = field(default_factory=list)
    is_dismissed: bool = False
    is_handed_over: bool = False
    _gaps: tuple[float, int] = (0.0, 0)
    _write: Callable[[RequestRecord], None] | None = None

    def opened(self, model: str, num_choices: int, num_prompt_tokens: int) -> None:
        """Note an accepted request. Prompts that were read off before are the same ones."""
        self.model, self.num_choices = model, num_choices
        self.num_prompt_tokens, self.num_cached_tokens = num_prompt_tokens, 0

    def reads(self, num_readouts: int, num_prompt_tokens: int) -> None:
        """Note accepted readouts."""
        self.num_choices += num_readouts
        self.num_prompt_tokens += num_prompt_tokens

    def placed(self, transfer_id: int, prefill_id: str, decode_id: str | None) -> None:
        """Note where a choice or a readout was placed."""
        self.num_placements += 1
        self.prefills.add(prefill_id)
        if decode_id is not None:
            self.decodes.add(decode_id)
        if len(self.transfers) < MAX_TRANSFERS:
            self.transfers.append(transfer_id)

    def waited(self, queue_s: float) -> None:
        """Note how long a prompt has waited."""
        self.queue_s = max(queue_s, self.queue_s or 0.0)

    def ended(self, timeline: Timeline, finish: str) -> None:
        """Note the terminal record of a choice."""
        self.finish.add(finish)
        self.num_failovers += max(0, timeline.num_placements - 1)
        self.num_output_tokens += timeline.num_output_tokens
        if timeline.first_token_s is None or timeline.last_token_s is None:
            return
        ttft_s = timeline.first_token_s - self.arrived_s
        self.ttft_s = ttft_s if self.ttft_s is None else min(ttft_s, self.ttft_s)
        decode_s, num_gaps = timeline.last_token_s - timeline.first_token_s, timeline.num_output_tokens - 1
        self._gaps = (self._gaps[0] + decode_s, self._gaps[1] + num_gaps)

    def failed(self, error: Exception) -> None:
        """Note what was told to the client; the first error counts."""
        self.error = self.error or f"{type(error).__name__}: {error}"[:MAX_CHARS]

    def dismiss(self) -> None:
        """Write no line: another record has what there is to say."""
        self.is_dismissed = True

    def hand_over(self) -> None:
        """Leave the line to whoever closes it later: the request outlives its connection."""
        self.is_handed_over = True

    def close(self) -> None:
        """Write the line; idempotent."""
        write, self._write = self._write, None
        if write is not None and not self.is_dismissed:
            write(self)

    def fields(self, now_s: float) -> dict[str, Any]:
        """Return what the line says, without what is not known."""
        decode_s, num_gaps = self._gaps
        found: dict[str, Any] = {
            "request_id": self.request_id[:MAX_CHARS],
            "tenant": self.client.tenant,
            "client": self.client.name if self.client.name != self.client.tenant else "",
            "endpoint": self.endpoint[:MAX_CHARS],
            "model": self.model[:MAX_CHARS],
            "status": self.status,
            "error": self.error,
            "finish": ",".join(sorted(self.finish)),
            "e2e_ms": _ms(now_s - self.arrived_s),
        }
        if self.num_choices:
            found |= {
                "n": self.num_choices,
                "prompt_tokens": self.num_prompt_tokens,
                "cached_tokens": self.num_cached_tokens,
                "output_tokens": self.num_output_tokens,
                "queue_ms": _ms(self.queue_s),
                "ttft_ms": _ms(self.ttft_s),
                "tpot_ms": _ms(decode_s / num_gaps if num_gaps else None),
                "prefill": ",".join(sorted(self.prefills)),
                "decode": ",".join(sorted(self.decodes)),
                "placements": self.num_placements,
                "failovers": self.num_failovers,
                "transfers": ",".join(map(str, self.transfers)),
            }
        return {name: value for name, value in found.items() if value is not None and value != ""}


_CURRENT: ContextVar[RequestRecord | None] = ContextVar("request record", default=None)


def current() -> RequestRecord:
    """Return the record of the request that the running task serves; one that nobody writes where no door opened it."""
    return _CURRENT.get() or RequestRecord()


class AccessLog:
    """Writes the lines of one router.

    Args:
        style: one of STYLES.
        clock: monotonic seconds.
    """

    def __init__(self, style: str, clock: Callable[[], float]) -> None:
        self._style = style
        self._clock = clock

    @contextmanager
    def record(self, endpoint: str) -> Iterator[RequestRecord]:
        """Open a record for what the running task does within; it is closed at the end, unless it was handed over."""
        record = RequestRecord(endpoint, self._clock(), _write=self._write if self._style != "off" else None)
        token = _CURRENT.set(record)
        try:
            yield record
        finally:
            _CURRENT.reset(token)
            if not record.is_handed_over:
                record.close()

    def _write(self, record: RequestRecord) -> None:
        if not log.isEnabledFor(logging.INFO):
            return
        created = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        found = {"time": created, **record.fields(self._clock())}
        if self._style == "json":
            log.info("%s", json.dumps(found).replace("\x7f", "\\u007f"))
        else:
            log.info("%s", " ".join(f"{name}={_shown(value)}" for name, value in found.items()))


def _shown(value: Any) -> str:
    """Return a value as text shows it: strings as JSON quotes them, in ASCII, so that none of them ends a line."""
    return json.dumps(value).replace("\x7f", "\\u007f") if isinstance(value, str) else str(value)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 1)
