"""The big version: `python -m tests.faults --trials 100 [--kinds ...] [--seed 0] [--json FILE]`.

One server for all trials. Each trial prints its seed, its longest gap and what was wrong; the exit code is 1 if
anything was.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from tests.e2e.client import session
from tests.e2e.server import Server, serving
from tests.faults.trials import KINDS, NUM_DECODE, NUM_PREFILL, Outcome, Trial, run_trial


def percentile(values: list[float], share: float) -> float:
    """Return the smallest value that at least this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


async def run(server: Server, trials: list[Trial], out: Path | None) -> list[Outcome]:
    """Run trials one after the other, telling each as it ends."""
    outcomes: list[Outcome] = []
    async with session() as http:
        for trial in trials:
            begin_s = time.monotonic()
            outcome = await run_trial(server, http, trial)
            outcomes.append(outcome)
            verdict = "; ".join(outcome.faults) or "fine"
            struck = "" if outcome.was_struck else ", too late to hit a stream"
            print(
                f"{trial}: gap {outcome.gap_s:.2f} s{struck}, {time.monotonic() - begin_s:.0f} s: {verdict}", flush=True
            )
            if out is not None:
                _write(outcomes, out)
    return outcomes


def _write(outcomes: list[Outcome], out: Path) -> None:
    out.write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")


def summary(outcomes: list[Outcome]) -> str:
    """Say per kind how many trials struck, how many failed, the bound on the rate, and the gaps."""
    lines = []
    for kind in dict.fromkeys(o.trial.kind for o in outcomes):
        struck = [o for o in outcomes if o.trial.kind == kind and o.was_struck]
        failed = [o for o in outcomes if o.trial.kind == kind and o.faults]
        bound = f", so below {3 / len(struck):.2%} (95 %)" if struck and not failed else ""
        gaps = [o.gap_s for o in struck]
        lines.append(
            f"{kind}: {len(struck)} trials struck {sum(o.num_streams for o in struck)} streams, {len(failed)} failed"
            f"{bound}; longest gap median {percentile(gaps, 0.5):.2f} s, p99 {percentile(gaps, 0.99):.2f} s"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Faults on purpose, many of them.")
    parser.add_argument("--trials", type=int, default=20, help="of each kind (20)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0, help="of the first trial (0)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "baton")
    args = parser.parse_args()
    trials = [Trial(kind, args.seed + i) for i in range(args.trials) for kind in args.kinds]
    options = ("--decode", str(NUM_DECODE), "--prefill", str(NUM_PREFILL))
    with tempfile.TemporaryDirectory() as folder, serving("smollm2", Path(folder), args.cache_dir, *options) as server:
        outcomes = asyncio.run(run(server, trials, args.json))
    print(summary(outcomes))
    return 1 if any(outcome.faults for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
