"""Trials: a few streams, a fault at a random moment of them, and what must hold afterwards.

1. A trial is its kind and its seed: requests, moment and victim all follow from them, so it can be run again.
2. Its requests are asked once in peace (the oracle), then together while the fault strikes.
3. Every stream must equal its oracle, end once, and say so. Then the supervisor's replacement is awaited, and the
   census of every worker must show nothing leased and every block accounted for.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import aiohttp

from tests.e2e.server import Server
from tests.faults.ledger import Ledger, Record, Request
from tests.faults.load import bound, percentile

KINDS = ("decode-kill", "prefill-kill", "both-kill", "decode-stop")
RECOVERY_BUDGET_S = 60.0
QUIET_BUDGET_S = 2.0
NUM_DECODE, NUM_PREFILL = 2, 2
ENDLESS = "([a-z]{2,9}[,.]? )+"
_PROMPTS = (
    "The longest road in the country",
    "A good interview begins with",
    "What the candidate has done in the last five years:",
    "Requirements: five years of Rust, two of distributed systems, and patience. The first candidate",
)


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial, determined by kind and seed."""

    kind: str
    seed: int

    def __str__(self) -> str:
        """Say how to run it again."""
        return f"--kinds {self.kind} --seed {self.seed} --trials 1"


@dataclass(slots=True)
class Outcome:
    """What a trial showed.

    Attributes:
        faults: what is wrong, in words.
        gap_s: the longest wait between two tokens of any stream.
        num_streams: streams of the trial; `was_struck` if any was still running when the fault struck.
    """

    trial: Trial
    faults: list[str] = field(default_factory=list)
    gap_s: float = 0.0
    num_streams: int = 0
    was_struck: bool = False


def requests_of(trial: Trial, dice: random.Random) -> list[Request]:
    """Draw the requests of a trial: greedy, seeded and constrained ones, 64 to 160 tokens, one prompt in company."""
    return [
        Request(
            prompt=f"{dice.choice(_PROMPTS)} ({trial.seed % 7})",
            max_tokens=dice.randint(64, 160),
            temperature=dice.choice([0.0, 0.8, 1.0]),
            seed=dice.randrange(1 << 30),
            regex=dice.choice(["", "", ENDLESS]),
        )
        for _ in range(dice.randint(2, 4))
    ]


async def run_trial(server: Server, http: aiohttp.ClientSession, trial: Trial) -> Outcome:
    """Run one trial on a server that is whole and quiet, and leave it so."""
    dice = random.Random(f"{trial.kind} {trial.seed}")
    requests, outcome, ledger = requests_of(trial, dice), Outcome(trial), Ledger(http, server.url)
    oracles = [await ledger.oracle(request) for request in requests]
    records = [Record(request) for request in requests]
    running = [
        asyncio.create_task(ledger.stream(request, record)) for request, record in zip(requests, records, strict=True)
    ]
    strike = asyncio.create_task(_strike(server, trial, records, dice))
    await asyncio.gather(*running)
    outcome.was_struck = await strike
    outcome.num_streams = len(records)
    outcome.gap_s = max(record.longest_gap_s for record in records)
    for number, (record, oracle) in enumerate(zip(records, oracles, strict=True)):
        outcome.faults += [f"stream {number}: {fault}" for fault in record.faults(oracle)]
    outcome.faults += await asyncio.to_thread(_aftermath, server)
    return outcome


async def _strike(server: Server, trial: Trial, records: list[Record], dice: random.Random) -> bool:
    """Wait for the moment, then do the deed; return whether the streams were still running."""
    if trial.kind == "prefill-kill":
        # In the queue, while computing, while sending, or after: prompts take some tens of ms each.
        await asyncio.sleep(dice.uniform(0.0, 0.25))
    else:
        target = dice.choice(records)
        moment = dice.randrange(1, target.request.max_tokens)
        while len(target.token_ids) < moment and not target.is_done and not target.errors:
            await asyncio.sleep(0.001)
    is_running = any(not record.is_done for record in records)
    workers = await asyncio.to_thread(server.workers)
    roles = {"decode-kill": ("decode",), "prefill-kill": ("prefill",), "both-kill": ("decode", "prefill")}
    for role in roles.get(trial.kind, ("decode",)):
        pids = [w["pid"] for w in workers if w["role"] == role]
        busy = [w["pid"] for w in workers if w["role"] == role and w["num_running"]]
        victim = dice.choice(busy or pids)
        if trial.kind == "decode-stop":
            os.kill(victim, signal.SIGSTOP)
            asyncio.get_running_loop().call_later(dice.uniform(0.5, 8.0), _continue, victim)
        else:
            os.kill(victim, signal.SIGKILL)
    return is_running


def _continue(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return  # fenced, and ended by its supervisor


def _aftermath(server: Server) -> list[str]:
    """Wait until the server is whole and quiet again; say what is not as it was."""
    if not _within(RECOVERY_BUDGET_S, lambda: len(server.workers()) == NUM_DECODE + NUM_PREFILL):
        return [f"not whole again within {RECOVERY_BUDGET_S} s: {[w['worker_id'] for w in server.workers()]}"]
    if not _within(QUIET_BUDGET_S, lambda: all(w["blocks"]["leased"] == 0 for w in server.workers())):
        return [f"blocks leased {QUIET_BUDGET_S} s after the last stream: {server.workers()}"]
    return [f"census does not balance: {worker}" for worker in server.workers() if not _is_balanced(worker["blocks"])]


def _is_balanced(blocks: dict[str, int]) -> bool:
    return blocks["free"] + blocks["cached"] + blocks["leased"] == blocks["total"]


def _within(budget_s: float, holds: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + budget_s
    while not holds():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)
    return True


def summary(outcomes: Sequence[Outcome]) -> str:
    """Say per kind how many trials struck, how many failed, the bound on the rate, and the gaps."""
    lines = []
    for kind in dict.fromkeys(o.trial.kind for o in outcomes):
        struck = [o for o in outcomes if o.trial.kind == kind and o.was_struck]
        num_failed = sum(bool(o.faults) for o in outcomes if o.trial.kind == kind)
        gaps = [o.gap_s for o in struck]
        lines.append(
            f"{kind}: {len(struck)} trials struck {sum(o.num_streams for o in struck)} streams; failed: "
            f"{bound(num_failed, len(struck))}; longest gap median {percentile(gaps, 0.5):.2f} s, "
            f"p99 {percentile(gaps, 0.99):.2f} s"
        )
    return "\n".join(lines)
