"""Which newcomers are refused before any work is done. Used on one event loop.

1. Each unfinished choice and each unread readout holds a place. When all of them are taken, a client that holds fewer
   than its share is let in all the same, up to twice as many in all; whoever holds more is refused until it does not.
2. Whoever would wait too long for a first token is refused, and told when to come back. Readouts wait only for each
   other. The wait is that of the client (`router/pace.py`): one that floods is refused, one that asks little is not.
"""

from __future__ import annotations

from collections.abc import Iterable

from protocol.errors import Overloaded
from router.access import Client
from router.config import RouterConfig
from router.fairness import Shares
from router.members import Worker
from router.metrics import Metrics
from router.pace import Capacity, Pace

OVERLOAD_RETRY_S = 1.0
# How far beyond the limit those may go who hold less than their share.
OVERBOOKING = 2


class Admission:
    """Places and paces of one router.

    Attributes:
        places: who holds how many; whoever opens a request takes them, and gives them back.
        pace, reading_pace: of first tokens, and of readouts.
    """

    def __init__(self, config: RouterConfig, metrics: Metrics) -> None:
        self.reload(config)
        self._metrics = metrics
        self.places = Shares()
        self.pace = Pace()
        self.reading_pace = Pace()

    def reload(self, config: RouterConfig) -> None:
        """Take over limits."""
        self._limit = config.max_num_requests
        self._max_wait_s = config.max_wait_s

    def check(self, client: Client, num_places: int, is_readout: bool, admitting: Shares | None) -> None:
        """Refuse a client that wants so many places, or do nothing.

        Args:
            client: whose request it is.
            num_places: how many it wants.
            is_readout: whether they are for readouts.
            admitting: places of requests that are not open yet and count as well.

        Raises:
            Overloaded: too many unfinished requests, or a newcomer would wait too long.
        """
        total, held = self.places.total, self.places.held(client)
        if admitting is not None:
            total, held = total + admitting.total, held + admitting.held(client)
        if total + num_places > self._limit:
            share = max(1, self._limit * client.weight // self.places.weights_with(client))
            if held + num_places > share or total + num_places > OVERBOOKING * self._limit:
                self._metrics.shed()
                reason = f"{total} requests are unfinished, the limit is {self._limit}"
                raise Overloaded(reason, OVERLOAD_RETRY_S)
        pace, what = (self.reading_pace, "a readout") if is_readout else (self.pace, "a first token")
        if (wait_s := pace.wait_s(client)) > self._max_wait_s:
            self._metrics.shed()
            raise Overloaded(
                f"{what} would take some {wait_s:.1f} s, the limit is {self._max_wait_s:g} s",
                wait_s - self._max_wait_s,
            )

    def told(self, prefills: Iterable[Worker]) -> None:
        """Note which prefill workers there are, and what they say of their own pace."""
        found = [worker.registration for worker in prefills if not worker.is_draining]
        shares = [one.context_share for one in found if one.prompt_tokens_per_s]
        capacity = Capacity(sum(one.prompt_tokens_per_s for one in found), sum(shares) / max(1, len(shares)))
        self.pace.told(capacity)
        self.reading_pace.told(capacity)
