"""A server under test: where it is, how it wants to be asked, and how one of our own is started.

1. `reach` turns an address into a `Server`; it asks for the model's name where none is given. Unreachable is an error.
2. `Server.body` makes a request's JSON, with the server's extra fields put in last.
3. `own_server` starts `baton serve` on a free port and ends it.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import aiohttp
import msgspec

from bench.client import Budgets, new_session
from protocol.errors import ConfigError

Api = Literal["completions", "chat"]

READY_BUDGET_S: Final = 180.0
STOP_BUDGET_S: Final = 40.0
_REACH_BUDGET_S: Final = 10.0
_ENDPOINTS: Final[dict[Api, str]] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True, slots=True)
class Server:
    """A server under test.

    Attributes:
        url: base URL without a trailing slash and without /v1.
        label: what tables call it.
        extra_body: fields put into each request over the usual ones; a null takes a usual field away.
    """

    url: str
    model: str
    label: str
    api: Api = "completions"
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    budgets: Budgets = field(default_factory=Budgets)
    api_key: str | None = None

    @property
    def endpoint(self) -> str:
        """Where requests go."""
        return self.url + _ENDPOINTS[self.api]

    @property
    def name(self) -> str:
        """Label and address, for messages."""
        return self.url if self.label in self.url else f"{self.label} at {self.url}"

    def body(self, prompt: str, num_output_tokens: int) -> bytes:
        """Return the JSON of a greedy streaming request for exactly this many output tokens."""
        asked: dict[str, Any] = {"model": self.model}
        if self.api == "chat":
            asked["messages"] = [{"role": "user", "content": prompt}]
        else:
            asked["prompt"] = prompt
        asked |= {
            "max_tokens": num_output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            # A control token after the end would show no text, and its arrival could not be seen.
            "skip_special_tokens": False,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        asked |= self.extra_body
        return msgspec.json.encode({name: value for name, value in asked.items() if value is not None})

    def new_session(self) -> aiohttp.ClientSession:
        """Return a client session within the server's budgets; the caller closes it."""
        return new_session(self.budgets, self.api_key)


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def base_url(text: str) -> str:
    """Return an address as `Server.url` wants it; raises ConfigError if it is none."""
    if not text.startswith(("http://", "https://")):
        raise ConfigError(f"{text!r} is no address: expected http://HOST:PORT")
    return text.rstrip("/").removesuffix("/v1").rstrip("/")


async def reach(server: Server) -> Server:
    """Return the server with its model's name, asked for if it is empty; raises ConfigError if nobody answers."""
    budget = aiohttp.ClientTimeout(total=_REACH_BUDGET_S)
    try:
        async with server.new_session() as http, http.get(f"{server.url}/v1/models", timeout=budget) as response:
            status, answer = response.status, await response.read()
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        raise ConfigError(f"{server.name} cannot be reached: {_reason(error)}") from error
    if server.model:
        return server
    try:
        models = msgspec.json.decode(answer, type=_Models).data
    except msgspec.DecodeError:
        models = []
    if not models:
        raise ConfigError(f"{server.name} names no model (HTTP {status} on /v1/models): use --model")
    return replace(server, model=models[0].id)


def _reason(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        return error.os_error.strerror or str(error.os_error)
    return str(error) or f"no answer within {_REACH_BUDGET_S:.0f} s"


@contextlib.contextmanager
def own_server(model: str = "smollm2", *options: str) -> Iterator[str]:
    """Start `baton serve MODEL` with these options on a free port, yield its address when it is ready, and end it.

    Raises:
        ConfigError: it ended or did not become ready in time; what it printed is on standard error.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "baton", "serve", model, "--port", str(port), *options]
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        give_up_s = time.monotonic() + READY_BUDGET_S
        while not _is_ready(url):
            if process.poll() is not None:
                raise ConfigError(f"baton serve {model} ended with code {process.returncode}")
            if time.monotonic() > give_up_s:
                raise ConfigError(f"baton serve {model} was not ready within {READY_BUDGET_S:.0f} s")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(STOP_BUDGET_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False
