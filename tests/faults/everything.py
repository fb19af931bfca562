"""Every campaign, one after the other, each on a server of its own; how much of each follows from one number.

1. `plan` turns the number of decode kills into the command line of each campaign.
2. A campaign that cannot even run (its server does not start, its own code fails) counts as wrong, and the next begins.
3. At the end: a line for each campaign, and exit code 1 if anything was wrong in any of them.
"""

from __future__ import annotations

import argparse
import math
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.faults import campaign

FAULTS_PER_ROUND = 10
LONGEST_OVERLOAD_S, SHORTEST_OVERLOAD_S = 120.0, 10.0
OVERLOAD_S_PER_TRIAL = 0.12
# Distinct requests; each is asked once in peace.
FEWEST_IN_POOL, MOST_IN_POOL = 12, 60
MOST_BURSTS = 20
WITH_POOL = frozenset({"rounds", "rolling", "soak", "siege"})
Perform = Callable[[Sequence[str]], tuple[str, bool]]
"""Runs a campaign by its command line; returns its summary and whether anything was wrong."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `all` takes."""
    parser.add_argument("--trials", type=int, default=20, help="decode workers killed; the rest in proportion (20)")
    parser.add_argument("--seed", type=int, default=0, help="of every campaign (0)")
    parser.add_argument("--results", type=Path, help="folder for the logs and for what each campaign saw")
    parser.add_argument("--cache-dir", type=Path, help="where the model is kept")
    parser.add_argument("--only", nargs="+", choices=[name for name, _ in plan(1)], help="of the campaigns (all)")


def plan(num_trials: int) -> list[tuple[str, list[str]]]:
    """Return name and command line of each campaign for so many decode kills."""

    def share(factor: float) -> int:
        return max(1, math.ceil(factor * num_trials))

    def rounds(num_faults: int, kinds: Sequence[str]) -> list[str]:
        per_round = min(FAULTS_PER_ROUND, num_faults)
        num_rounds = math.ceil(num_faults / per_round)
        return ["rounds", "--rounds", str(num_rounds), "--faults", str(per_round), "--kinds", *kinds]

    overload_s = min(LONGEST_OVERLOAD_S, max(SHORTEST_OVERLOAD_S, OVERLOAD_S_PER_TRIAL * num_trials))
    return [
        ("decode-kills", rounds(num_trials, ["decode-kill"])),
        ("prefill-kills", ["phases", "--trials", str(share(0.3))]),
        ("other-kills", rounds(share(0.1), ["both-kill", "replacement-kill"])),
        ("stops", rounds(share(0.1), campaign.STOP_KINDS)),
        ("disconnects", ["disconnects", str(share(10.0))]),
        ("unread", ["unread", str(share(4.0))]),
        ("rolling", ["rolling", str(share(1.0))]),
        ("bits", ["bits", str(share(1.0))]),
        ("overload", ["overload", "--seconds", f"{overload_s:g}"]),
        ("burst", ["burst", str(min(MOST_BURSTS, share(0.1)))]),
        ("grammars", ["grammars", "--turns", str(share(0.02))]),
        ("soak", ["soak", str(share(10.0))]),
        ("siege", ["siege", str(share(10.0))]),
    ]


def run(args: argparse.Namespace, perform: Perform, tell: Callable[[str], None]) -> int:
    """Run the plan; return the exit code."""
    lines, is_any_wrong = [], False
    for name, words in plan(args.trials):
        if args.only and name not in args.only:
            continue
        begin_s = time.monotonic()
        tell(f"--- {name}")
        try:
            text, is_wrong = perform([*words, *_options(args, name, words[0])])
        except Exception as error:  # noqa: BLE001  the others are to run all the same
            traceback.print_exc()
            text, is_wrong = f"could not be run: {error!r}", True
        is_any_wrong |= is_wrong
        lines.append(f"{'WRONG' if is_wrong else 'fine '} {name}, {time.monotonic() - begin_s:.0f} s: {text}")
    tell("--- all campaigns\n" + "\n".join(lines))
    return 1 if is_any_wrong else 0


def _options(args: argparse.Namespace, name: str, command: str) -> list[str]:
    found = ["--seed", str(args.seed)]
    if command in WITH_POOL:
        found += ["--pool", str(min(MOST_IN_POOL, max(FEWEST_IN_POOL, args.trials)))]
    if args.cache_dir is not None:
        found += ["--cache-dir", str(args.cache_dir)]
    if args.results is not None:
        folder = args.results / name
        folder.mkdir(parents=True, exist_ok=True)
        found += ["--log", str(folder), "--json", str(folder / "seen.json")]
    return found
