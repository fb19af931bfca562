"""The big version: `python -m tests.faults [COMMAND] ...`; without a command, single trials.

    all          every campaign below, scaled by --trials, one after the other (`make faults TRIALS=1000`)
    trials       one fault each, with a server in peace before and after
    rounds       many faults in little time under a closed loop: kills and stops of workers
    phases       prefill workers killed in compute, mid-transfer, after COMMIT
    disconnects  clients that leave in every phase
    unread       clients that do not read what they asked for
    rolling      every worker ended by SIGTERM in turn, again and again
    bits         one bit of every piece of KV flipped on its way
    overload     five times the load that the server can carry
    burst        the first traffic of a server, and of workers that were killed: more than it can take
    grammars     hostile grammars beside plain and structured streams
    soak         short requests, random faults, and what the processes' memory does
    siege        two tenants under random faults, in peace and beside hostile clients of every kind

Each prints how to run it again, starts one server, prints what it sees, writes it with --json, and ends with exit code
1 if anything was wrong. `everything.py` says what `all` runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import aiohttp

from tests.e2e.server import Server, serving
from tests.faults import (
    bits,
    burst,
    campaign,
    disconnects,
    everything,
    grammars,
    overload,
    rolling,
    siege,
    soak,
    trials,
    unread,
)
from tests.faults.heap import MUTATION, Heap, written_to
from tests.faults.ledger import Ledger, Request
from tests.faults.load import Oracles, bound, draw_pool, percentile
from tests.faults.mutated import mutations
from tests.faults.phases import PHASES, Cluster, PhaseKills

Result = tuple[Any, str, bool]
"""What is written as JSON, what is printed, whether anything was wrong."""

COMMANDS = (
    *("trials", "rounds", "phases", "disconnects", "unread", "rolling", "bits", "overload", "burst", "grammars"),
    *("soak", "siege"),
)
# A pool of which every block has been written soon: its first touch is no leak.
SMALL_POOL = {"disconnects": 600, "soak": 256, "siege": 600}
SESSION_BUDGET = aiohttp.ClientTimeout(total=240.0)


def tell(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


class Run:
    """One command on one server."""

    def __init__(self, args: argparse.Namespace, server: Server, http: aiohttp.ClientSession) -> None:
        self.args = args
        self.server = server
        self.http = http
        self.cluster = Cluster(server, http, {"decode": args.decode, "prefill": args.prefill})
        self.ledger = Ledger(http, server.url)

    async def oracles(self, num_tokens: tuple[int, int]) -> Any:
        """Return the pool of the campaign with its oracles."""
        pool = draw_pool(self.args.pool_seed, self.args.pool, num_tokens)
        begin_s = time.monotonic()
        found = await Oracles(self.args.oracles).ask(self.ledger, pool)
        tell(f"{len(found)} oracles in {time.monotonic() - begin_s:.0f} s")
        return found

    async def trials(self) -> Result:
        """One fault each."""
        outcomes = []
        for trial in (trials.Trial(k, self.args.seed + i) for i in range(self.args.trials) for k in self.args.kinds):
            begin_s = time.monotonic()
            outcome = await trials.run_trial(self.server, self.http, trial)
            outcomes.append(outcome)
            struck = "" if outcome.was_struck else ", too late to hit a stream"
            took = f"gap {outcome.gap_s:.2f} s{struck}, {time.monotonic() - begin_s:.0f} s"
            tell(f"{trial}: {took}: {'; '.join(outcome.faults) or 'fine'}")
        return [asdict(o) for o in outcomes], trials.summary(outcomes), any(o.faults for o in outcomes)

    async def rounds(self) -> Result:
        """Rounds of many faults."""
        oracles, reports = await self.oracles((64, 256)), []
        for number in range(self.args.rounds):
            for kind in self.args.kinds:
                what = campaign.Round(kind, self.args.seed + number, self.args.faults, self.args.width)
                report = await campaign.run_round(self.cluster, self.ledger, oracles, what)
                reports.append(report)
                worst = percentile(report.gaps_s, 1.0)
                tell(f"{what}: {report.num_hits} of {report.num_faults} hit, gap up to {worst:.2f} s, "
                     f"{report.took_s:.0f} s: {'; '.join(report.faults) or 'fine'}")  # fmt: skip
                self._write([asdict(r) for r in reports])
        return [asdict(r) for r in reports], campaign.summary(reports), any(r.faults for r in reports)

    async def phases(self) -> Result:
        """Prefill workers killed in known phases."""
        kills = PhaseKills(self.cluster, self.ledger, self.args.seed)
        report = await kills.run(self.args.trials, tell, self.args.first, self.args.aims)
        hits = ", ".join(f"{num} {phase}" for phase, num in report.hits.items())
        waits = ", ".join(f"{phase} {percentile(t, 0.99):.2f} s" for phase, t in report.ttfts_s.items())
        text = (
            f"prefill-kill: {hits} ({report.num_held} after COMMIT with its blocks still held), {report.misses} came "
            f"too late; streams wrong: {bound(len(report.faults), report.num_streams)}; first token p99: {waits} "
            f"(usual {report.usual_ttft_s:.2f} s)"
        )
        return asdict(report), text, bool(report.faults)

    async def disconnects(self) -> Result:
        """Clients that leave."""
        folder = self.args.heap
        heap = None if folder is None else Heap(folder, self.server.children()["router"])
        report = await disconnects.run(self.cluster, self.ledger, self.args.seed, self.args.number, tell, heap)
        if heap is not None:
            tell(heap.report())
        return asdict(report), report.summary(), bool(report.faults)

    async def unread(self) -> Result:
        """Clients that do not read."""
        report = await unread.run(self.cluster, self.ledger, self.args.seed, self.args.number, tell)
        return asdict(report), report.summary(), bool(report.faults)

    async def rolling(self) -> Result:
        """Workers ended in turn."""
        oracles = await self.oracles((32, 128))
        report = await rolling.run(self.cluster, self.ledger, oracles, self.args.seed, self.args.number, tell)
        return asdict(report), report.summary(), bool(report.faults)

    async def bits(self) -> Result:
        """Flipped bits."""
        report = await bits.run(self.server, self.ledger, self.args.sound, self.args.number, tell)
        return asdict(report), report.summary(), bool(report.faults)

    async def overload(self) -> Result:
        """Five times the peak."""
        report = await overload.run(self.cluster, self.ledger, self.args.seed, self.args.seconds, tell)
        return asdict(report), report.summary(), bool(report.faults)

    async def burst(self) -> Result:
        """The first traffic of a server."""
        wait_s = burst.MAX_WAIT_S
        report = await burst.run(
            self.cluster, self.ledger, self.server.url, self.args.seed, self.args.number, wait_s, tell
        )
        return asdict(report), report.summary(), bool(report.faults)

    async def grammars(self) -> Result:
        """Hostile grammars."""
        report = await grammars.run(self.cluster, self.ledger, self.server, self.args.seed, self.args.turns, tell)
        report.weigh(grammars.ITL_TARGET, grammars.ANSWER_TARGET)
        return asdict(report), report.summary(), bool(report.faults)

    async def soak(self) -> Result:
        """Short requests and random faults."""
        oracles = await self.oracles((8, 48))
        report = await soak.run(self.cluster, self.ledger, oracles, self.args.seed, self.args.number, tell)
        return asdict(report), report.summary(), bool(report.faults)

    async def siege(self) -> Result:
        """Two tenants, random faults and hostile clients."""
        pool = siege.pool(self.args.pool_seed, self.args.pool)
        oracles = await Oracles(self.args.oracles).ask(self.ledger, pool)
        report = await siege.run(self.cluster, oracles, self.args.seed, self.args.number, tell)
        report.weigh(siege.ITL_TARGET, siege.SMALL_P95_TARGET_S)
        return asdict(report), report.summary(), bool(report.faults)

    def _write(self, value: Any) -> None:
        if self.args.json is not None:
            self.args.json.write_text(json.dumps(value, indent=1) + "\n")

    async def finish(self, command: Callable[[], Awaitable[Result]]) -> tuple[str, bool]:
        """Run a command, print and write what it showed; return that in words, and whether anything was wrong."""
        value, text, is_wrong = await command()
        self._write(value)
        tell(text)
        return text, is_wrong


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = argparse.ArgumentParser(prog="python -m tests.faults", description="Faults on purpose, many of them.")
    commands = top.add_subparsers(dest="command", required=True)
    # Commands whose requests come from a pool take these as well.
    with_pool = {"rounds", "rolling", "soak", "siege"}
    workers = {
        "trials": (trials.NUM_DECODE, trials.NUM_PREFILL),
        "rounds": (3, 2),
        "phases": (2, 3),
        "overload": (1, 1),
        "burst": (1, 1),
        "grammars": (1, 1),
    }
    for name in COMMANDS:
        one = commands.add_parser(name)
        num_decode, num_prefill = workers.get(name, (2, 2))
        one.add_argument("--decode", type=int, default=num_decode, help=f"decode workers ({num_decode})")
        one.add_argument("--prefill", type=int, default=num_prefill, help=f"prefill workers ({num_prefill})")
        one.add_argument("--seed", type=int, default=0, help="of the first trial or round (0)")
        one.add_argument("--json", type=Path, help="where to write what was seen")
        one.add_argument("--log", type=Path, help="folder to keep the server's log in")
        one.add_argument(
            "--serve",
            nargs="*",
            default=[],
            metavar="NAME=VALUE",
            help="more options of baton serve, without their dashes",
        )
        one.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "baton")
        if name in with_pool:
            one.add_argument("--pool", type=int, default=60, help="distinct requests (60)")
            one.add_argument("--pool-seed", type=int, default=0, help="they follow from it (0)")
            one.add_argument("--oracles", type=Path, help="file that keeps what they answer in peace")
    choices = commands.choices
    choices["trials"].add_argument("--trials", type=int, default=20, help="of each kind (20)")
    choices["trials"].add_argument("--kinds", nargs="+", choices=trials.KINDS, default=list(trials.KINDS))
    phases = choices["phases"]
    phases.add_argument("--trials", type=int, default=20, help="hits in each phase (20)")
    phases.add_argument("--first", type=int, default=0, help="number of the first trial, to run one again (0)")
    phases.add_argument("--aims", nargs="+", choices=PHASES, default=list(PHASES), help="phases to hit (all)")
    rounds = choices["rounds"]
    rounds.add_argument("--rounds", type=int, default=2, help="of each kind (2)")
    rounds.add_argument("--faults", type=int, default=10, help="of each round (10)")
    rounds.add_argument("--width", type=int, default=5, help="streams at once (5)")
    rounds.add_argument("--kinds", nargs="+", choices=campaign.ROUND_KINDS, default=list(campaign.KILL_KINDS))
    choices["overload"].add_argument("--seconds", type=float, default=120.0, help="of overload (120)")
    choices["grammars"].add_argument("--turns", type=int, default=10, help="in peace and beside them (10)")
    numbers = {"disconnects": 1000, "unread": 400, "rolling": 200, "bits": 1000, "soak": 1000, "siege": 1000}
    for name, number in numbers.items():
        choices[name].add_argument("number", nargs="?", type=int, default=number, help=f"requests ({number})")
    choices["disconnects"].add_argument("--heap", type=Path, help="folder for snapshots of the router's heap")
    choices["burst"].add_argument("number", nargs="?", type=int, default=4, help="bursts (4)")
    everything.add_arguments(commands.add_parser("all", help="every campaign, scaled by --trials"))
    return top


async def _run(args: argparse.Namespace, server: Server) -> tuple[str, bool]:
    connector = aiohttp.TCPConnector(limit=0)
    # Any key will do where there are no keys.
    headers = siege.bearer(siege.LARGE)
    async with aiohttp.ClientSession(connector=connector, timeout=SESSION_BUDGET, headers=headers) as http:
        run = Run(args, server, http)
        return await run.finish(getattr(run, args.command))


def _ask_sound(args: argparse.Namespace) -> dict[Request, list[int]]:
    """Ask a server without mutations what the requests of `bits` answer."""

    async def ask(server: Server) -> dict[Request, list[int]]:
        async with aiohttp.ClientSession(timeout=SESSION_BUDGET) as http:
            return await bits.oracles(Ledger(http, server.url), bits.draw(args.seed, args.number))

    with tempfile.TemporaryDirectory() as folder, serving("smollm2", Path(folder), args.cache_dir) as server:
        return asyncio.run(ask(server))


def perform(words: Sequence[str]) -> tuple[str, bool]:
    """Run one campaign, given by its command line, on a server of its own; return its summary and if it was wrong."""
    args = parser().parse_args(words)
    # A seed that is not given is one all the same.
    seeded = [*words] if "--seed" in words else [words[0], f"--seed={args.seed}", *words[1:]]
    tell(f"again by: python -m tests.faults {shlex.join(seeded)}")
    more = [f"--{option}" for option in args.serve]
    if args.command == "overload" and not any(option.startswith("max-wait-s") for option in args.serve):
        more.append(f"--max-wait-s={overload.MAX_WAIT_S}")
    if args.command == "burst":
        more.append(f"--max-wait-s={burst.MAX_WAIT_S}")
    if args.command == "unread":
        more.append(f"--client-stall-s={unread.STALL_S}")
    if args.command in SMALL_POOL and not any(option.startswith("num-kv-blocks") for option in args.serve):
        more.append(f"--num-kv-blocks={SMALL_POOL[args.command]}")
    options = ("--decode", str(args.decode), "--prefill", str(args.prefill), *more)
    with tempfile.TemporaryDirectory() as folder:
        log = args.log or Path(folder)
        log.mkdir(parents=True, exist_ok=True)
        if args.command == "siege":
            options += tuple(siege.options(log))
        names = {"phases": ["late-landed"], "bits": ["flip-bits"]}.get(args.command, [])
        args.sound = _ask_sound(args) if args.command == "bits" else {}
        heap: Path | None = getattr(args, "heap", None)
        names += [] if heap is None else [MUTATION]
        with (
            written_to(heap),
            mutations(*names, seed=args.seed),
            serving("smollm2", log, args.cache_dir, *options) as server,
        ):
            return asyncio.run(_run(args, server))


def main() -> int:
    """Run the command; return its exit code."""
    words = sys.argv[1:]
    if not words or words[0] not in (*COMMANDS, "all", "-h", "--help"):
        words = ["trials", *words]
    if words[0] == "all":
        return everything.run(parser().parse_args(words), perform, tell)
    return 1 if perform(words)[1] else 0


if __name__ == "__main__":
    sys.exit(main())
