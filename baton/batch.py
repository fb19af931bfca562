"""`baton run-batch`: OpenAI's batch format, answered line by line, by an engine in this process or by a server.

    IN: {"custom_id", "method", "url", "body"}  ─►  OUT: {"id", "custom_id", "response" | null, "error" | null}

1. Lines are read as there is room for them: a bounded number is open, whatever the size of the file.
2. Each line of IN gets one line in OUT, in the order in which answers come: what cannot be sent gets an error line.
3. A line's `id` follows from its content. With `resume`, lines whose id or custom_id stands in OUT are passed over;
   half a line at its end, as a killed process leaves it, is cut off first.
4. Where the target has no room (429, 503, no connection) a line waits as long as it is told, and tries again.
"""

from __future__ import annotations

import asyncio
import codecs
import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

import msgspec

from baton.values import did_you_mean
from protocol.errors import ConfigError, InvalidRequest
from router.json_bounds import check_unique

MAX_CUSTOM_ID_CHARS: Final = 512
FIRST_RETRY_S: Final = 0.5
MAX_RETRY_S: Final = 30.0
DUPLICATE: Final = "duplicate_custom_id"
# Of every line of OUT: what begins otherwise is not ours to cut off.
BEGINNING: Final = b'{"id":"batch_req_'
BUSY_STATUSES: Final = frozenset({429, 503})


class BatchLine(msgspec.Struct, frozen=True, kw_only=True):
    """One request as IN has it."""

    custom_id: str
    url: str
    body: dict[str, Any]
    method: str = "POST"


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """What the target answered, errors of the API included."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class LineError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a line has no response."""

    code: str
    message: str


class ResultLine(msgspec.Struct, frozen=True, kw_only=True):
    """One line of OUT."""

    id: str
    custom_id: str | None
    response: Response | None = None
    error: LineError | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of one attempt.

    Attributes:
        retry_after_s: how long the target asked to be left alone, or None.
    """

    response: Response
    retry_after_s: float | None = None


class Unreachable(Exception):
    """The target could not be reached, or broke off; another attempt may succeed."""


class BadLine(Exception):
    """A line that cannot be sent; `code` and message stand in its error."""

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.custom_id = custom_id


class Target(Protocol):
    """Who answers."""

    async def answer(self, line: BatchLine) -> Reply:
        """Answer a request, whatever the answer is.

        Raises:
            BadLine: it cannot be sent.
            Unreachable: nothing came of it.
        """


@dataclass(slots=True)
class Tally:
    """How many lines came to what."""

    num_answered: int = 0
    num_refused: int = 0
    num_failed: int = 0
    num_skipped: int = 0

    def __str__(self) -> str:
        return (
            f"{self.num_answered} answered, {self.num_refused} refused, {self.num_failed} failed, "
            f"{self.num_skipped} there already"
        )

    def add(self, result: ResultLine) -> None:
        """Count a result."""
        if result.response is None:
            self.num_failed += 1
        elif result.response.status_code < 400:
            self.num_answered += 1
        else:
            self.num_refused += 1


@dataclass(frozen=True, slots=True)
class Job:
    """One line that has to be answered."""

    id: str
    data: bytes


@dataclass(slots=True)
class Done:
    """What OUT holds already: the custom_id by each line's id, None where there is none or it was an earlier line's."""

    ids: dict[str, str | None] = field(default_factory=dict)

    def custom_ids(self) -> set[str]:
        """Return the custom_ids that have their answer."""
        return {custom_id for custom_id in self.ids.values() if custom_id is not None}


class _Found(msgspec.Struct):
    """What of a line of OUT tells whose it is."""

    id: str = ""
    custom_id: str | None = None
    error: LineError | None = None


def read_done(path: Path, resume: bool) -> Done:
    """Return what OUT holds, after cutting off half a line at its end.

    Raises:
        ConfigError: it is there, and `resume` was not asked for; or it cannot be used.
    """
    done = Done()
    try:
        if not path.exists() or path.stat().st_size == 0:
            return done
        if not resume:
            raise ConfigError(f"{path} is there already: go on with --resume, or name another file")
        with path.open("r+b") as file:
            end = 0
            for data in file:
                if not data.endswith(b"\n") and data[: len(BEGINNING)] == BEGINNING[: len(data)]:
                    file.truncate(end)
                    break
                end += len(data)
                found = msgspec.json.decode(data, type=_Found)
                is_duplicate = found.error is not None and found.error.code == DUPLICATE
                done.ids[found.id] = None if is_duplicate else found.custom_id
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{path} cannot be gone on with: {error}") from error
    return done


def parse_line(data: bytes) -> BatchLine:
    """Decode and check a line. Raises BadLine."""
    try:
        line = msgspec.json.decode(data, type=BatchLine)
        check_unique(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, InvalidRequest) as error:
        raise BadLine("invalid_line", f"not a line of a batch: {error}", _custom_id(data)) from error
    custom_id = line.custom_id[:MAX_CUSTOM_ID_CHARS]
    if not line.custom_id or len(line.custom_id) > MAX_CUSTOM_ID_CHARS:
        raise BadLine("invalid_custom_id", f"custom_id must have 1 to {MAX_CUSTOM_ID_CHARS} characters", custom_id)
    if line.method != "POST":
        raise BadLine("invalid_method", f"method: only POST, not {line.method[:32]!r}", custom_id)
    if line.body.get("stream"):
        raise BadLine("invalid_stream", "body.stream: a batch has no streams", custom_id)
    return line


def endpoint_of(line: BatchLine, known: Iterable[str]) -> str:
    """Return which of the known endpoints a line's url is; only a slash at its end is forgiven.

    Whatever else a url may hold that a server, a proxy or a client's library would resolve (dots, escapes, a query,
    another host) makes it none of them, so that a file reaches nothing else of a server.

    Raises:
        BadLine: it is none of them.
    """
    endpoints = sorted(known)
    found = line.url.removesuffix("/")
    if found not in endpoints:
        meant = did_you_mean(line.url[:64], endpoints, 0.8)
        told = f"url: one of {', '.join(endpoints)}, not {line.url[:64]!r}{meant}"
        raise BadLine("invalid_url", told, line.custom_id)
    return found


def _custom_id(data: bytes) -> str | None:
    try:
        return msgspec.json.decode(data, type=_Found).custom_id
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


class Batch:
    """Runs the lines of one file.

    Args:
        target: who answers.
        out: takes the results, a whole line at a time.
        num_open: lines that are open at once.
        retry_s: how long a line that cannot reach the target tries; a target that is busy is always waited for.
    """

    def __init__(self, target: Target, out: BinaryIO, num_open: int, retry_s: float) -> None:
        self.tally = Tally()
        self._target = target
        self._out = out
        self._num_open = num_open
        self._retry_s = retry_s
        self._custom_ids: set[str] = set()

    async def run(self, lines: Iterable[bytes], done: Done, on_line: Callable[[], None] = lambda: None) -> None:
        """Answer every line that is not done yet. Cancel-safe: what is written is whole.

        Raises:
            OSError: the results cannot be written.
        """
        jobs, done_custom_ids = self._jobs(lines, done), done.custom_ids()

        async def run_some() -> None:
            for job in jobs:
                result = await self._answer(job, done_custom_ids)
                if result is None:
                    self.tally.num_skipped += 1
                else:
                    self._out.write(msgspec.json.encode(result) + b"\n")
                    self._out.flush()
                    self.tally.add(result)
                on_line()

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._num_open):
                    group.create_task(run_some())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    def _jobs(self, lines: Iterable[bytes], done: Done) -> Iterator[Job]:
        """Yield the lines that OUT has no answer to, each with an id that its content gives."""
        seen: Counter[bytes] = Counter()
        for number, data in enumerate(lines):
            data = data.rstrip(b"\r\n")
            if number == 0:
                data = data.removeprefix(codecs.BOM_UTF8)
            digest = hashlib.blake2b(data, digest_size=12).digest()
            job = Job(f"batch_req_{digest.hex()}" + (f"_{seen[digest]}" if seen[digest] else ""), data)
            seen[digest] += 1
            if job.id not in done.ids:
                yield job
                continue
            self.tally.num_skipped += 1
            if (custom_id := done.ids[job.id]) is not None:
                self._custom_ids.add(custom_id)

    async def _answer(self, job: Job, done_custom_ids: set[str]) -> ResultLine | None:
        custom_id = None
        try:
            line = parse_line(job.data)
            custom_id = line.custom_id
            if custom_id in self._custom_ids:
                raise BadLine(DUPLICATE, f"custom_id {custom_id!r} stands in an earlier line", custom_id)
            self._custom_ids.add(custom_id)
            if custom_id in done_custom_ids:
                return None
            response = await self._insist(line)
            return ResultLine(id=job.id, custom_id=custom_id, response=response)
        except BadLine as error:
            told = LineError(code=error.code, message=str(error))
            return ResultLine(id=job.id, custom_id=custom_id or error.custom_id, error=told)
        except Unreachable as error:
            return ResultLine(id=job.id, custom_id=custom_id, error=LineError(code="unreachable", message=str(error)))

    async def _insist(self, line: BatchLine) -> Response:
        """Ask until there is an answer that stands. Raises Unreachable, BadLine."""
        pause_s, loop = FIRST_RETRY_S, asyncio.get_running_loop()
        give_up_s = loop.time() + self._retry_s
        while True:
            try:
                reply = await self._target.answer(line)
            except Unreachable:
                if loop.time() >= give_up_s:
                    raise
                wait_s = pause_s
            else:
                status = reply.response.status_code
                if status not in BUSY_STATUSES or status == 503 and loop.time() >= give_up_s:
                    return reply.response
                wait_s = max(pause_s, reply.retry_after_s or 0.0)
            # Spread out, so that lines which were refused together do not come back together.
            await asyncio.sleep(wait_s * random.uniform(1.0, 1.5))
            pause_s = min(2 * pause_s, MAX_RETRY_S)
