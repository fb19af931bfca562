"""`python -m bench.router`: what a streamed token costs the router, in CPU time of its process.

    this process ── starts ──► baton router MODEL      (what is measured: a real one, with its own ports)
         │                        ▲           ▲
         ├── starts ──► bench.router_workers  │        one prefill and one decode worker, on the control wire
         └── starts ──► bench.router_clients ─┘        streaming HTTP clients; check every stream at the end

1. A run is one life of these three processes. In it every case (streams, rate) is measured once, in the order given.
2. A case: open the streams, let tokens flow until it is warm, then read the router's CPU clock twice, with at least
   `--tokens` tokens in between (few streams at a low rate: as many as `--window-s` holds). Then every stream ends.
   Before that, so many requests of `SHORT_TOKENS` tokens at once, from idle to idle, some rounds of them: what is left
   of their cost without that of their tokens is what it costs to open and close a request, its connection included.
3. At a fixed rate each step finds the router idle, as it mostly is in service: one message, then one write per stream.
   Saturated, steps queue up, so that a write may carry several tokens: that is the cost which bounds throughput.
4. Medians over the runs, with the range. CPU time is the process's clock (all threads, user and system), not load.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from bench.machine import machine
from bench.router_counter import Counter
from bench.router_process import SERVED_NAME, RouterProcess, router_process
from bench.router_profile import shares

# Quotes, line breaks and digits, as in the JSON-like answers that features ask for: JSON has to escape some of it.
SCRIPT: Final = """{"candidate": 17, "qualification": "five years of Python in production", "met": true,
"reason": "The candidate led a team of four engineers and wrote \\"most of the billing service\\" in Python."}
"""
ANSWER_BUDGET_S: Final = 150.0
WARM_TOKENS_PER_STREAM: Final = 20
SHORT_TOKENS: Final = 2
SHORT_ROUNDS: Final = 5
POLL_S: Final = 0.01
NUM_PROFILED_WINDOWS: Final = 10
MAX_TOKENS: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured. `steps_per_s` 0 stands for as many as the router takes."""

    num_streams: int
    steps_per_s: float

    @property
    def rate(self) -> str:
        """The rate in words."""
        return f"{self.steps_per_s:g}" if self.steps_per_s else "saturated"


@dataclass(frozen=True, slots=True)
class Sample:
    """One case in one run. CPU times are the router's.

    Attributes:
        user_share: share of the CPU time spent outside the kernel.
        short_s: CPU time of a request of `SHORT_TOKENS` tokens: the median of rounds.
    """

    case: Case
    num_tokens: int
    window_s: float
    cpu_s: float
    user_share: float
    short_s: float

    @property
    def us_per_token(self) -> float:
        """CPU time per token, in microseconds."""
        return self.cpu_s / self.num_tokens * 1e6

    @property
    def us_per_step(self) -> float:
        """CPU time per decode step, in microseconds."""
        return self.us_per_token * self.case.num_streams

    @property
    def us_per_request(self) -> float:
        """CPU time of opening and closing a request, in microseconds."""
        return self.short_s * 1e6 - SHORT_TOKENS * self.us_per_token


@dataclass(frozen=True, slots=True)
class Plan:
    """What the options ask for.

    Attributes:
        num_tokens: tokens in a window, at least, unless `window_s` ends it earlier.
        ahead: steps under way when saturated.
        profile: where to write the profile of the router, or None. A profiled run is slower.
    """

    model: str
    cases: tuple[Case, ...]
    num_runs: int
    num_tokens: int
    window_s: float
    ahead: int
    profile: Path | None = None


class Helper:
    """A process of ours that obeys one line of JSON at a time."""

    def __init__(self, process: asyncio.subprocess.Process, name: str) -> None:
        self._process = process
        self._name = name

    async def tell(self, command: dict[str, Any]) -> None:
        """Send a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        await self._process.stdin.drain()

    async def answer(self) -> dict[str, Any]:
        """Return what it says next. Raises RuntimeError when it fails or ends."""
        assert self._process.stdout is not None
        async with asyncio.timeout(ANSWER_BUDGET_S):
            line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._name} ended")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise RuntimeError(f"{self._name}: {found['error']}")
        return found

    async def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """Send a line and return the answer."""
        await self.tell(command)
        return await self.answer()


@contextlib.asynccontextmanager
async def helper(module: str, settings: dict[str, Any]) -> AsyncIterator[Helper]:
    """Run one of our modules as a process for the time of a run; its first line are the settings."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 24
    )
    try:
        found = Helper(process, module)
        await found.tell(settings)
        yield found
        assert process.stdin is not None
        process.stdin.close()
        async with asyncio.timeout(10):
            await process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def run_once(plan: Plan) -> list[Sample]:
    """Bring the three processes up and measure every case."""
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        path = Path(folder) / "counter"
        async with router_process(plan.model, Path(folder), plan.profile) as router:
            with contextlib.closing(Counter.create(path)) as counter:
                told: dict[str, Any] = {"counter": str(path), "ahead": plan.ahead}
                told |= {"control_port": router.control_port, "secret": router.secret}
                async with helper(f"{__package__}.router_workers", told) as workers:
                    await workers.answer()
                    await router.until(200)
                    token_ids, words = await _script(router)
                    await workers.ask({"script": token_ids})
                    told = {"counter": str(path), "port": router.port, "words": words, "request": _request(router)}
                    async with helper(f"{__package__}.router_clients", told) as clients:
                        scene = Scene(plan, router, workers, clients, counter)
                        return [await measure(case, scene) for case in plan.cases]


@dataclass(frozen=True, slots=True)
class Scene:
    """The processes of one run."""

    plan: Plan
    router: RouterProcess
    workers: Helper
    clients: Helper
    counter: Counter


async def measure(case: Case, scene: Scene) -> Sample:
    """Measure one case: streams are opened for it and ended after it."""
    plan, router, counter = scene.plan, scene.router, scene.counter
    short_s = await _short_requests(case.num_streams, scene)
    await scene.clients.ask({"open": case.num_streams})
    await scene.workers.ask({"steps_per_s": case.steps_per_s})
    await _until(counter, counter.value + WARM_TOKENS_PER_STREAM * case.num_streams, plan.window_s)
    if plan.profile is not None:
        router.toggle_profile()
    begin, begin_s, begin_tokens = router.cpu(), time.monotonic(), counter.value
    await _until(counter, begin_tokens + plan.num_tokens, plan.window_s)
    end, end_s, end_tokens = router.cpu(), time.monotonic(), counter.value
    if plan.profile is not None:
        router.toggle_profile()
    await _end(scene)
    user_s, system_s = end.user_s - begin.user_s, end.system_s - begin.system_s
    return Sample(
        case=case,
        num_tokens=end_tokens - begin_tokens,
        window_s=end_s - begin_s,
        cpu_s=end.all_s - begin.all_s,
        user_share=user_s / max(1e-9, user_s + system_s),
        short_s=short_s,
    )


async def _short_requests(num_streams: int, scene: Scene) -> float:
    """Return the CPU time of a short request; a first round, in which caches fill, does not count."""
    rounds: list[float] = []
    for _ in range(1 + SHORT_ROUNDS):
        idle = scene.router.cpu()
        await scene.clients.ask({"open": num_streams})
        await _end(scene)
        rounds.append((scene.router.cpu().all_s - idle.all_s) / num_streams)
    return statistics.median(rounds[1:])


async def _end(scene: Scene) -> None:
    """End every stream and check what it has received."""
    sent, received = await scene.workers.ask({"end": True}), await scene.clients.ask({"close": True})
    if sent["num_tokens"] != received["num_tokens"]:
        raise RuntimeError(f"{sent['num_tokens']} tokens were sent, {received['num_tokens']} received")


async def _until(counter: Counter, wanted: int, budget_s: float) -> None:
    deadline_s = time.monotonic() + budget_s
    while counter.value < wanted and time.monotonic() < deadline_s:  # noqa: ASYNC110  (another process moves it)
        await asyncio.sleep(POLL_S)


async def _script(router: RouterProcess) -> tuple[list[int], list[str]]:
    """Return the script's token ids and the text of each, as the router's own tokenizer has them."""
    found = await router.post("/tokenize", {"prompt": SCRIPT, "add_special_tokens": False, "return_token_strs": True})
    return found["tokens"], found["token_strs"]


def _request(router: RouterProcess) -> str:
    """Return the HTTP request that every client sends."""
    messages = [{"role": "user", "content": "Judge the candidate."}]
    body = json.dumps({"model": SERVED_NAME, "messages": messages, "stream": True, "max_tokens": MAX_TOKENS})
    head = [
        *("POST /v1/chat/completions HTTP/1.1", f"Host: 127.0.0.1:{router.port}", "Connection: close"),
        *("Content-Type: application/json", f"Content-Length: {len(body)}"),
    ]
    return "\r\n".join(head) + "\r\n\r\n" + body


def table(samples: Sequence[Sample]) -> str:
    """Return one line per case: medians over its runs, and the range of what matters."""
    head = ("streams", "steps/s", "tokens/s", "us/token", "range", "us/step", "user", "us/request", "tokens", "runs")
    rows = [head]
    for case in dict.fromkeys(sample.case for sample in samples):
        found = [sample for sample in samples if sample.case == case]
        cost = [sample.us_per_token for sample in found]
        rates = [sample.num_tokens / sample.window_s for sample in found]
        rate = f"{statistics.median(rates) / case.num_streams:.0f}"
        rows.append(
            (
                str(case.num_streams),
                rate if case.steps_per_s else f"{rate} (saturated)",
                f"{statistics.median(rates):.0f}",
                f"{statistics.median(cost):.1f}",
                f"{min(cost):.1f}-{max(cost):.1f}",
                f"{statistics.median(cost) * case.num_streams:.0f}",
                f"{statistics.median(sample.user_share for sample in found):.0%}",
                f"{statistics.median(sample.us_per_request for sample in found):.0f}",
                str(min(sample.num_tokens for sample in found)),
                str(len(found)),
            )
        )
    return aligned(rows)


def breakdown(plan: Plan, samples: Sequence[Sample]) -> str:
    """Run every case once more, longer and sampled; return one line per area with its share of the median cost."""
    columns: list[dict[str, float]] = []
    for case in plan.cases:
        with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
            profile = Path(folder) / "profile.json"
            num_tokens = plan.num_tokens * NUM_PROFILED_WINDOWS
            asyncio.run(run_once(replace(plan, cases=(case,), num_tokens=num_tokens, profile=profile)))
            by_area = shares(json.loads(profile.read_text()))
        found = [sample for sample in samples if sample.case == case]
        cost_us = statistics.median(sample.us_per_token for sample in found)
        user_us = cost_us * statistics.median(sample.user_share for sample in found)
        areas = {area: share * user_us for area, share in by_area.items()}
        columns.append({**areas, "kernel: send, receive, wake": cost_us - user_us, "together": cost_us})
    rows = [("us/token", *(f"{case.num_streams} x {case.rate}" for case in plan.cases))]
    rows += [(area, *(f"{column[area]:.1f}" for column in columns)) for area in columns[0]]
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def parse(arguments: Sequence[str] | None = None) -> tuple[Plan, argparse.Namespace]:
    """Read the options."""
    parser = argparse.ArgumentParser(prog="python -m bench.router", description="What a token costs the router.")
    parser.add_argument("--model", default="smollm2", help="whose tokenizer is used [%(default)s]")
    parser.add_argument("--streams", type=_counts, default=(64,), metavar="N,N", help="streams at once [64]")
    parser.add_argument(
        "--rates",
        type=_rates,
        default=(30.0, 100.0, 0.0),
        metavar="R,R",
        help="steps per second, 0 saturates [30,100,0]",
    )
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="lives of the router [%(default)s]")
    parser.add_argument("--tokens", type=int, default=20_000, metavar="N", help="measured in a case [%(default)s]")
    parser.add_argument("--window-s", type=float, default=30.0, metavar="S", help="longest window [%(default)s]")
    parser.add_argument("--ahead", type=int, default=2, metavar="N", help="steps under way if saturated [%(default)s]")
    parser.add_argument("--breakdown", action="store_true", help="sample further runs: what it is spent on")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there")
    found = parser.parse_args(arguments)
    cases = tuple(Case(num_streams, rate) for num_streams in found.streams for rate in found.rates)
    plan = Plan(found.model, cases, found.runs, found.tokens, found.window_s, found.ahead)
    return plan, found


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _rates(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    plan, options = parse(arguments)
    samples: list[Sample] = []
    for number in range(1, plan.num_runs + 1):
        print(f"run {number} of {plan.num_runs}", file=sys.stderr, flush=True)
        samples += asyncio.run(run_once(plan))
    print(f"{machine()}\nrouter CPU time, medians over runs\n{table(samples)}")
    if options.breakdown:
        print("\nof which (kernel: measured; the rest: divided as the samples of one more run are)")
        print(breakdown(plan, samples))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(sample) for sample in samples], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
