"""`python -m bench`: the small set, against a running server or one that it starts.

    closed loop at 1 and 4 streams ─► 4 streams alone ─► 4 streams while 512-token prompts arrive

Figures of one run on a busy machine mean little by themselves: compare ratios taken in one run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.measures import Summary, summarise
from bench.workloads import Target, closed, interference

READY_BUDGET_S = 120.0
STOP_BUDGET_S = 40.0
NUM_STEADY = 4
REPORT_COLUMNS = 132


async def measure(target: Target, say: Console) -> dict[str, Summary]:
    """Run the small set; return the figures of each part by its name."""
    results: dict[str, Summary] = {}

    def show(line: str) -> None:
        if say.is_terminal:
            say.print(line, end="\r")

    for num_streams in (1, NUM_STEADY):
        samples, duration_s = await closed(
            target, num_streams=num_streams, num_requests=4 * num_streams, prompt_tokens=128, output_tokens=48, say=show
        )
        results[f"closed, {num_streams} streams"] = summarise(samples, duration_s)
    for name, every_s in (("steady alone", 0.0), ("steady beside prompts", 3.0)):
        samples, long_samples, duration_s = await interference(
            target, num_streams=NUM_STEADY, output_tokens=128, long_tokens=512, every_s=every_s, say=show
        )
        results[name] = summarise(samples, duration_s)
        if long_samples:
            results["the prompts themselves"] = summarise(long_samples, duration_s)
    return results


def table_of(results: dict[str, Summary]) -> Table:
    """Return the figures as a table."""
    table = Table("run", "requests", "errors", "tokens/s", "TTFT p50", "ITL p50", "ITL p99", "ITL max", "TPOT p50")
    for name, s in results.items():
        times = (s.ttft_p50_ms, s.itl_p50_ms, s.itl_p99_ms, s.itl_max_ms, s.tpot_p50_ms)
        shown = ["-" if t is None else f"{t:.1f} ms" for t in times]
        table.add_row(name, str(s.num_requests), str(s.num_errors), f"{s.tokens_per_s:.1f}", *shown)
    return table


@contextlib.contextmanager
def own_server() -> Iterator[str]:
    """Start `baton serve smollm2` on a free port, yield its URL when ready, and end it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([sys.executable, "-m", "baton", "serve", "smollm2", "--port", str(port)])
    try:
        give_up_s = time.monotonic() + READY_BUDGET_S
        while not _is_ready(url):
            if process.poll() is not None or time.monotonic() > give_up_s:
                raise SystemExit("baton serve did not become ready")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(STOP_BUDGET_S)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


def main() -> int:
    """Run the command; return its exit code: 1 if any request failed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure a server's latencies.")
    parser.add_argument("--url", help="a running server; without it one is started")
    parser.add_argument("--model", default="smollm2", help="name that it serves (smollm2)")
    parser.add_argument("--seed", type=int, default=1, help="of the random prompts (1)")
    parser.add_argument("--json", type=Path, help="file that the figures are written to")
    args = parser.parse_args()
    console = Console() if sys.stdout.isatty() else Console(width=REPORT_COLUMNS)
    with contextlib.nullcontext(args.url) if args.url else own_server() as url:
        results = asyncio.run(measure(Target(url, args.model, args.seed), console))
    console.print(table_of(results))
    alone, beside = results["steady alone"].itl_p99_ms, results["steady beside prompts"].itl_p99_ms
    if alone and beside:
        console.print(f"ITL p99 of steady streams, with prompts arriving / without: {beside / alone:.2f}")
    if args.json is not None:
        args.json.write_text(json.dumps({name: asdict(s) for name, s in results.items()}, indent=2) + "\n")
    return 1 if any(s.num_errors for s in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
