"""How long a newcomer will wait for its first token: what is ahead of it, over the pace at which first tokens come.

    begin ──► AHEAD ── served: credited ──► (gone)
                └───── gone: not credited ► (gone)

1. A request's work is its prompt and a share of its own, so that short prompts count too.
2. The pace is measured only while somebody waits: work served over time with work ahead, the past fading. One request
   at a time shows the machine's pace as well as a full queue does; prompts, slots and blocks bound it alike.
3. A long silence is an outage and no measure of the pace.

Pure: the clock is an argument.
"""

from __future__ import annotations

import math
from typing import Final

FADE_S: Final = 5.0
OUTAGE_S: Final = 2.0
REQUEST_TOKENS: Final = 128
MIN_MEASURED_S: Final = 0.5


class Pace:
    """The pace of one router's first tokens, and the work ahead of a newcomer."""

    def __init__(self) -> None:
        self._ahead: dict[int, int] = {}
        self._ahead_tokens = 0
        self._served_tokens = 0.0
        self._busy_s = 0.0
        self._seen_s = 0.0

    def begin(self, request_id: int, num_prompt_tokens: int, now_s: float) -> None:
        """Note a request that waits for its first token from now on."""
        self._pass_time(now_s)
        self._ahead[request_id] = work = num_prompt_tokens + REQUEST_TOKENS
        self._ahead_tokens += work

    def served(self, request_id: int, now_s: float) -> None:
        """Note a request's first token; later ones count for nothing."""
        if request_id in self._ahead:
            self._pass_time(now_s)
            self._served_tokens += self._leave(request_id)

    def gone(self, request_id: int, now_s: float) -> None:
        """Note that a request has ended, whether it was served or not."""
        if request_id in self._ahead:
            self._pass_time(now_s)
            self._leave(request_id)

    def wait_s(self) -> float:
        """Predict the wait of a newcomer; 0 as long as too little was seen to tell."""
        if not self._ahead_tokens or self._busy_s < MIN_MEASURED_S or not self._served_tokens:
            return 0.0
        return self._ahead_tokens * self._busy_s / self._served_tokens

    def _leave(self, request_id: int) -> int:
        work = self._ahead.pop(request_id)
        self._ahead_tokens -= work
        return work

    def _pass_time(self, now_s: float) -> None:
        passed_s, self._seen_s = min(OUTAGE_S, max(0.0, now_s - self._seen_s)), now_s
        if self._ahead:
            fade = math.exp(-passed_s / FADE_S)
            self._busy_s = self._busy_s * fade + passed_s
            self._served_tokens *= fade
