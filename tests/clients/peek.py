"""A running server from outside, known by its URL alone: census and metrics."""

from __future__ import annotations

import json
import re
import urllib.request
from dataclasses import dataclass
from typing import Any

_BUDGET_S = 30.0


@dataclass(frozen=True, slots=True)
class Peek:
    """A server that somebody else may have started.

    Attributes:
        url: without a trailing slash and without /v1.
    """

    url: str

    def read(self, path: str) -> str:
        """Return the text of a GET. Raises OSError."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=_BUDGET_S) as response:
            return str(response.read().decode())

    def num_cancelled(self) -> float:
        """Return how many accepted requests ended because their client left."""
        found = re.findall(r"^baton_request_cancelled_total (\S+)$", self.read("/metrics"), re.M)
        return sum(map(float, found))

    def is_idle(self) -> bool:
        """Whether no request is unfinished and no worker holds a block for one."""
        census: dict[str, Any] = json.loads(self.read("/census"))
        is_free = all(not worker["blocks"]["leased"] for worker in census["workers"])
        return is_free and not any(census["requests"].values()) and bool(census["is_balanced"])
