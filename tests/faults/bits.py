"""Bits flipped on the way between prefill and decode: every one must be found, and no stream may notice.

1. What the requests answer is asked on a server without a mutation.
2. On a server that flips one bit of each piece, after its checksum was taken, prompts of their own are sent until so
   many bits were flipped. What is sent again stays whole.
3. As many pieces must have been found damaged as bits were flipped, and every stream must equal its oracle.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tests.e2e.server import Server
from tests.faults.ledger import Ledger, Record, Request
from tests.faults.load import bound, long_prompt
from tests.faults.mutated import flips

NUM_AT_ONCE = 4


@dataclass(slots=True)
class BitsReport:
    """What flipped bits did."""

    num_flipped: int = 0
    num_found: int = 0
    num_streams: int = 0
    took_s: float = 0.0
    faults: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Say it in a line."""
        missed = self.num_flipped - self.num_found
        return (
            f"bits: {self.num_flipped} flipped, {self.num_found} found; missed: {bound(missed, self.num_flipped)}; "
            f"{self.num_streams} streams, wrong: {bound(len(self.faults), self.num_streams)}; {self.took_s:.0f} s"
        )


def draw(seed: int, num_flips: int) -> list[Request]:
    """Draw requests for so many flips; their prompts share no block, so that each sends all of its KV."""
    dice = random.Random(f"bits {seed}")
    return [
        Request(long_prompt(dice, dice.randint(20, 120)), 4, dice.choice([0.0, 0.8]), dice.randrange(1 << 30))
        for _ in range(num_flips)
    ]


async def oracles(ledger: Ledger, requests: Sequence[Request]) -> dict[Request, list[int]]:
    """Ask a server without mutations."""
    return {request: await ledger.oracle(request) for request in requests}


async def run(
    server: Server,
    ledger: Ledger,
    expected: Mapping[Request, Sequence[int]],
    num_flips: int,
    tell: Callable[[str], None],
) -> BitsReport:
    """Send the requests to a server that flips bits until so many were flipped; each counts once for its prefix.

    The prefix cache would keep a prompt that was sent before from being sent again, so each is used once.
    """
    begin_s, report, left = time.monotonic(), BitsReport(), list(expected)

    async def client() -> None:
        while left and flips(server)[0] < num_flips:
            request = left.pop()
            record: Record = await ledger.stream(request)
            report.num_streams += 1
            report.faults += record.faults(expected[request])

    await asyncio.gather(*(client() for _ in range(NUM_AT_ONCE)))
    report.num_flipped, report.num_found = flips(server)
    report.took_s = time.monotonic() - begin_s
    tell(f"{report.num_flipped} bits flipped by {report.num_streams} streams")
    if report.num_found != report.num_flipped:
        report.faults.append(f"{report.num_flipped} bits were flipped and {report.num_found} found")
    if report.num_flipped < num_flips:
        report.faults.append(f"only {report.num_flipped} bits were flipped")
    return report
