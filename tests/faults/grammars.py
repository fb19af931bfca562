"""Hostile grammars beside innocent streams: what they cost others, and how they end.

1. A turn in peace: plain streams and structured ones, several at a time; each must be what it was when asked alone.
2. The same turn while hostile clients ask, again and again, for answers by grammars that are cheap at first and dear
   later.
3. Turns alternate, so that whatever else the machine does falls on both. The innocents' tokens must be the same, their
   gaps and their answers hardly slower; every hostile request ends once, by itself, and is never placed again; no
   worker is lost, and at the end nothing is held.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.e2e.client import completion
from tests.e2e.server import Server
from tests.faults.ledger import Ledger, Record, Request
from tests.faults.load import Oracles, percentile
from tests.faults.phases import Cluster

NUM_HOSTILE_CLIENTS = 2
NUM_PLAIN = 2
ITL_TARGET = 1.2
ANSWER_TARGET = 2.0
# Gaps that end a turn or begin it are no steps of a running batch.
NUM_FIRST_GAPS = 3

_MANY = "\n".join(f"T{i}: /[a-z]{{1,{i + 1}}}/" for i in range(40))
HOSTILE: dict[str, dict[str, Any]] = {
    "ambiguous": {"guided_grammar": 'start: s\ns: s s | "a" | "b" | s "a" s | "a" s "b"'},
    "ambiguous, three ways": {"guided_grammar": 'start: s\ns: s s s | s s | "a" | "b" | "c"'},
    "ambiguous from token 100": {"guided_grammar": 'start: /[a-z]{400}/ s\ns: s s | "a" | "b" | s "a" s'},
    "palindromes": {"guided_grammar": 'start: p\np: "a" p "a" | "b" p "b" | "a" | "b" | p p'},
    "all of it may be empty": {"guided_grammar": 'start: a\na: b b b b b b b\nb: c c c |\nc: d d |\nd: "x" | "y" | a'},
    "lexemes that overlap": {
        "guided_grammar": f'start: e\ne: e e | e "," e | {" | ".join(f"T{i}" for i in range(40))}\n{_MANY}'
    },
    "padded": {"guided_grammar": 'start: s\ns: s s | "a" | "b" | s "a" s' + ' | "b" "b" s "b"' * 100},
    "counted": {"guided_regex": "([a-z]{1,300} ){1,300}!"},
    "far back": {"guided_regex": "[a-z ]*a[a-z ]{60}zz"},
    "nested": {"guided_regex": "[x-z]{3}((a{100}){100}){100}b"},
    "patterns": {
        "guided_json": {
            "type": "object",
            "properties": {f"k{i}": {"type": "string", "pattern": f"^.*a.{{{20 + i}}}$"} for i in range(20)},
            "required": ["k1", "k2"],
        }
    },
    "one long word": {"guided_choice": ["lorem ipsum dolor " * 2000]},
}


@dataclass(slots=True)
class GrammarsReport:
    """What hostile grammars did.

    Attributes:
        ends: how hostile requests ended, to how often.
        gaps_s: of plain streams, in peace and beside them; `answers_s` likewise, of each innocent structured request.
    """

    num_turns: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    gaps_s: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    answers_s: dict[int, tuple[list[float], list[float]]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def itl_ratio(self) -> float:
        """The 99th percentile of plain streams' gaps, beside hostile grammars over in peace."""
        return percentile(self.gaps_s[1], 0.99) / max(1e-9, percentile(self.gaps_s[0], 0.99))

    @property
    def answer_ratio(self) -> float:
        """The innocent request that hostile grammars slowed most: its median beside them over that in peace."""
        pairs = self.answers_s.values()
        return max((percentile(b, 0.5) / max(1e-9, percentile(a, 0.5)) for a, b in pairs if a and b), default=0.0)

    def weigh(self, itl_target: float, answer_target: float) -> None:
        """Hold both ratios against their targets."""
        if self.itl_ratio > itl_target:
            self.faults.append(f"plain streams' p99 gap grew to {self.itl_ratio:.2f}x, at most {itl_target:g}x")
        if self.answer_ratio > answer_target:
            self.faults.append(f"an innocent answer took {self.answer_ratio:.2f}x, at most {answer_target:g}x")

    def summary(self) -> str:
        """Say it in a paragraph."""
        peace, beside = (
            f"p50 {percentile(g, 0.5) * 1e3:.1f}, p99 {percentile(g, 0.99) * 1e3:.1f} ms" for g in self.gaps_s
        )
        ends = ", ".join(f"{number} {end}" for end, number in sorted(self.ends.items()))
        return (
            f"grammars: {self.num_turns} turns of each kind; hostile requests: {ends or 'none'}; plain streams' gaps "
            f"{peace} in peace, {beside} beside them ({self.itl_ratio:.2f}x); the slowest innocent answer "
            f"{self.answer_ratio:.2f}x; wrong: {'; '.join(self.faults) or 'nothing'}"
        )


def innocents(seed: int, num_tokens: int) -> tuple[list[Request], list[Request]]:
    """Draw plain requests, and structured ones of several sorts that have no end of their own."""
    dice = random.Random(f"grammars {seed}")
    plain = [
        Request(f"The road to place {i} of {seed}", num_tokens, 0.0, dice.randrange(1 << 30)) for i in range(NUM_PLAIN)
    ]
    patterns = ("([a-z]{2,9}, ){100,}x", r"(\{\"n\": [0-9]{1,3}\}\n){100,}x", "((yes|no|perhaps)[,.] ){100,}x")
    bound = [
        Request(f"List {i} of {seed}:", num_tokens // 2, 1.0, dice.randrange(1 << 30), p)
        for i, p in enumerate(patterns)
    ]
    return plain, bound


class _Hostile:
    """Clients that ask for the worst grammars, one after the other, until told to stop."""

    def __init__(self, ledger: Ledger, report: GrammarsReport, dice: random.Random) -> None:
        self._ledger = ledger
        self._report = report
        self._dice = dice
        self._order = list(HOSTILE)
        self._dice.shuffle(self._order)

    async def client(self, is_over: Callable[[], bool]) -> None:
        """Ask until it is over; then leave what is running, as such a client would."""
        while not is_over():
            self._order.append(self._order.pop(0))
            name = self._order[-1]
            body = completion("x", max_tokens=1500, temperature=2.0, seed=self._dice.randrange(1 << 30), stream=True)
            asking = asyncio.create_task(self._ledger.ask({**body, "ignore_eos": True, **HOSTILE[name]}))
            while not asking.done() and not is_over():
                await asyncio.wait({asking}, timeout=0.05)
            if not asking.done():
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
                self._count("left when the turn was over")
                return
            self._judge(name, asking.result())
            await asyncio.sleep(0.01)

    def _judge(self, name: str, record: Record) -> None:
        errors = [error for error in record.errors if error.startswith(("HTTP 400", "error event", "HTTP 429"))]
        if record.num_ends != 1 or len(errors) != len(record.errors) or record.is_done is bool(record.errors):
            self._report.faults.append(f"{name}: {record.num_ends} ends, {record.errors}")
        elif record.errors and "placements" in record.errors[0]:
            self._report.faults.append(f"{name} was placed again: {record.errors}")
        how = "finished" if record.is_done else record.errors[0].split(":")[0] if record.errors else "unended"
        self._count(how)

    def _count(self, how: str) -> None:
        self._report.ends[how] = self._report.ends.get(how, 0) + 1


async def run(
    cluster: Cluster,
    ledger: Ledger,
    server: Server,
    seed: int,
    num_turns: int,
    tell: Callable[[str], None],
    num_tokens: int = 300,
) -> GrammarsReport:
    """Alternate turns in peace and beside hostile grammars; leaves the cluster whole."""
    report = GrammarsReport()
    plain, bound = innocents(seed, num_tokens)
    oracles = await Oracles().ask(ledger, [*plain, *bound])
    before, held = _health(server), await cluster.aftermath()
    report.faults += held
    for number in range(num_turns):
        for is_hostile in (False, True):
            hostile = _Hostile(ledger, report, random.Random(f"hostile {seed} {number}"))
            await _turn(ledger, report, plain, bound, oracles, hostile if is_hostile else None)
        report.num_turns += 1
        tell(f"turn {number}: {report.summary()}")
    report.faults += await cluster.aftermath()
    after = _health(server)
    report.faults += [
        f"{what}: {before[what]} before, {after[what]} after" for what in before if before[what] != after[what]
    ]
    return report


async def _turn(
    ledger: Ledger,
    report: GrammarsReport,
    plain: Sequence[Request],
    bound: Sequence[Request],
    oracles: dict[Request, list[int]],
    hostile: _Hostile | None,
) -> None:
    is_over = False
    clients = (
        [asyncio.create_task(hostile.client(lambda: is_over)) for _ in range(NUM_HOSTILE_CLIENTS)] if hostile else []
    )
    if hostile:
        await asyncio.sleep(0.5)
    records = await asyncio.gather(*(ledger.stream(request) for request in (*plain, *bound)))
    is_over = True
    await asyncio.gather(*clients)
    which = int(hostile is not None)
    for record in records:
        report.faults += [f"{record.request.prompt}: {fault}" for fault in record.faults(oracles[record.request])]
        if record.request.regex:
            times = report.answers_s.setdefault(record.request.seed, ([], []))
            times[which].append(record.ended_s - record.begun_s)
        else:
            gaps = [b - a for a, b in zip(record.times_s, record.times_s[1:], strict=False)]
            report.gaps_s[which].extend(gaps[NUM_FIRST_GAPS:])


def _health(server: Server) -> dict[str, Any]:
    """Return what hostile grammars must leave as it is: the workers, and the counts of what failed otherwise."""
    return {
        "workers": sorted(worker["instance"] for worker in server.workers()),
        "placed again": server.metrics().get('baton_request_failed_total{reason="placements"}'),
        "not ready": server.metrics().get('baton_request_failed_total{reason="not_ready"}'),
    }
