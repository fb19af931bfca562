"""Who answers the lines of a batch: a running server, or an engine in this process.

Against a server, online traffic goes before the batch: each request has the lowest priority there is, unless its body
names one, and a 429 is obeyed. A server that knows no priorities says so once, and is asked without one from then on.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Self

import aiohttp
import msgspec

from baton.batch import BatchLine, Reply, Response, Unreachable, endpoint_of
from router.endpoints import ENDPOINTS

LOWEST_PRIORITY: Final = (1 << 31) - 1
CONNECT_BUDGET_S: Final = 10.0
_BY_TAG: Final = {row.path: row.tag for row in ENDPOINTS if row.method == "POST" and row.tag in ("generate", "read")}


class ServerTarget:
    """A server at a URL. Use it as a context, on one event loop."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._session: aiohttp.ClientSession | None = None
        self._has_priorities = True

    async def __aenter__(self) -> Self:
        # No limit on the whole: a request of the lowest priority waits for as long as others come.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_BUDGET_S)
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=connector, headers=self._headers)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._session is not None
        await self._session.close()

    async def answer(self, line: BatchLine) -> Reply:
        """Send one request; raises as `Target.answer` does."""
        path = endpoint_of(line, _BY_TAG)
        # What is only read knows no priority, and says nothing of whether others do.
        if not self._has_priorities or "priority" in line.body or _BY_TAG[path] == "read":
            return await self._post(path, line.body)
        reply = await self._post(path, {**line.body, "priority": LOWEST_PRIORITY})
        if reply.response.status_code != 400 or not _is_about_priority(reply.response.body):
            return reply
        self._has_priorities = False
        return await self._post(path, line.body)

    async def _post(self, path: str, body: Mapping[str, Any]) -> Reply:
        assert self._session is not None
        sent_id = f"batch-{secrets.token_hex(12)}"
        headers = {"Content-Type": "application/json", "X-Request-ID": sent_id}
        try:
            async with self._session.post(self._url + path, data=msgspec.json.encode(body), headers=headers) as got:
                data = await got.read()
                request_id = got.headers.get("X-Request-ID", sent_id)
                retry_after_s = _seconds(got.headers.get("Retry-After"))
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unreachable(f"{self._url}: {error or type(error).__name__}") from error
        response = Response(status_code=got.status, request_id=request_id, body=msgspec.Raw(_as_json(data)))
        return Reply(response, retry_after_s)


def _is_about_priority(body: msgspec.Raw) -> bool:
    found = msgspec.json.decode(body)
    error = found.get("error") if isinstance(found, dict) else None
    return isinstance(error, dict) and "priority" in f"{error.get('param')} {error.get('message')}"


def _as_json(data: bytes) -> bytes:
    """Return a body as JSON on one line; what is none, as a string of it."""
    try:
        return msgspec.json.encode(msgspec.json.decode(data))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return msgspec.json.encode(data.decode("utf-8", "replace"))


def _seconds(value: str | None) -> float | None:
    try:
        return None if value is None else min(float(value), 3600.0)
    except ValueError:
        return None
