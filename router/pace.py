"""How long a newcomer will wait for its first token: what is ahead of it, over the pace at which first tokens come.

    begin ──► AHEAD ── served: credited ──► (gone)
                └───── gone: not credited ► (gone)

1. A request's work is its prompt, a share of its own, so that short prompts count too, and what attention adds to long
   ones. Prompt tokens that somebody before it has had count for nothing: they will be cached.
2. What workers say of their own pace when they register counts as one second that was measured: it holds from the first
   request on, and fades as more is seen. When workers come or go the pace changes by as much as theirs adds up to.
3. The pace is measured only while somebody waits: work served over time with work ahead, the past fading. One request
   at a time shows the machine's pace as well as a full queue does; prompts, slots and blocks bound it alike.
4. Several prompts are computed at once, so that none may be served for long: time without a first token counts against
   the pace when it is longer than all that is ahead should take, or when the next first token comes.
5. A silence that is longer still is an outage and no measure of the pace.
6. Clients take turns, so one that has little ahead of it waits for little: for its own work, and as much of others' as
   they have while it has its turns.

Pure: the clock is an argument.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from router.access import NOBODY, Client
from router.fairness import Shares

FADE_S: Final = 5.0
OUTAGE_S: Final = 2.0
REQUEST_TOKENS: Final = 32
MIN_MEASURED_S: Final = 0.5
TOLD_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the prefill workers of a router say that they can do, added up.

    Attributes:
        tokens_per_s: of short prompts; 0 where nobody says.
        context_share: what each token of context adds to the time that a prompt token takes, as a share of it.
    """

    tokens_per_s: float = 0.0
    context_share: float = 0.0


class Pace:
    """The pace of one router's first tokens, and the work ahead of a newcomer."""

    def __init__(self) -> None:
        self._ahead: dict[int, tuple[int, Client]] = {}
        self._shares = Shares()
        self._served_tokens = 0.0
        self._busy_s = 0.0
        self._silent_s = 0.0
        self._seen_s = 0.0
        self._capacity = Capacity()

    def told(self, capacity: Capacity) -> None:
        """Note what the workers that are here can do."""
        before, now = self._capacity.tokens_per_s, capacity.tokens_per_s
        if not now:
            return  # what was seen of those who went is the best guess at who comes
        self._capacity = capacity
        if before:
            self._served_tokens *= now / before
        elif self._busy_s < TOLD_S:
            self._busy_s += TOLD_S
            self._served_tokens += TOLD_S * now

    def begin(
        self, request_id: int, num_prompt_tokens: int, now_s: float, client: Client = NOBODY, num_new_tokens: int = -1
    ) -> None:
        """Note a request that waits for its first token from now on.

        Args:
            request_id: of the request.
            num_prompt_tokens: the whole prompt's.
            now_s: on the clock of all events.
            client: whose it is.
            num_new_tokens: those of the prompt that are not cached yet; all of them if negative.
        """
        self._pass_time(now_s)
        work = self._work(num_prompt_tokens, num_prompt_tokens if num_new_tokens < 0 else num_new_tokens)
        self._ahead[request_id] = (work, client)
        self._shares.take(client, work)

    def served(self, request_id: int, now_s: float) -> None:
        """Note a request's first token; later ones count for nothing."""
        if request_id in self._ahead:
            self._pass_time(now_s)
            self._count_silence(self._silent_s)
            self._served_tokens += self._leave(request_id)

    def gone(self, request_id: int, now_s: float) -> None:
        """Note that a request has ended, whether it was served or not."""
        if request_id in self._ahead:
            self._pass_time(now_s)
            self._leave(request_id)

    def wait_s(self, client: Client = NOBODY) -> float:
        """Predict the wait of a newcomer; 0 as long as too little was seen and told to tell."""
        if not self._shares.total or self._busy_s < MIN_MEASURED_S or not self._served_tokens:
            return 0.0
        own = self._shares.held(client)
        others = self._shares.total - own
        turns = (own + REQUEST_TOKENS) * (self._shares.weights_with(client) - client.weight) / client.weight
        return (own + min(others, turns)) * self._busy_s / self._served_tokens

    def _work(self, num_prompt_tokens: int, num_new_tokens: int) -> int:
        mean_context = num_prompt_tokens - num_new_tokens / 2
        return round(num_new_tokens * (1.0 + self._capacity.context_share * mean_context)) + REQUEST_TOKENS

    def _leave(self, request_id: int) -> int:
        work, client = self._ahead.pop(request_id)
        self._shares.give(client, work)
        return work

    def _pass_time(self, now_s: float) -> None:
        passed_s, self._seen_s = max(0.0, now_s - self._seen_s), now_s
        if not self._ahead:
            self._silent_s = 0.0
            return
        expected_s = self._shares.total * self._busy_s / self._served_tokens if self._served_tokens else 0.0
        self._silent_s += min(passed_s, max(OUTAGE_S, expected_s))
        self._count_silence(self._silent_s - expected_s)

    def _count_silence(self, seconds: float) -> None:
        """Count time against the pace."""
        if seconds > 0.0:
            fade = math.exp(-seconds / FADE_S)
            self._busy_s = self._busy_s * fade + seconds
            self._served_tokens *= fade
            self._silent_s -= seconds
