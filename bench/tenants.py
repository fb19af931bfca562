"""`python -m bench.tenants`: can one tenant tell by time what another has asked? It should be a coin's toss.

Each trial, on a server with a key for each of two tenants:

1. The victim asks a prompt that nobody has asked before.
2. The spy times that prompt and one that nobody has asked, in random order.
3. The control: the victim itself does the same, and must find it easy, or the measurement could see nothing.

The figure is the area under the ROC curve of "was cached, since it was faster": 0.5 is a guess, 1 is certainty. Its
error is that of the rank-sum test. Exit code 1 if the spy is further from 0.5 than the bound and more than that error
explains, or if the control is not above `CONTROL`.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import aiohttp

from bench.machine import machine
from bench.servers import own_server

BOUND: Final = 0.02
CONTROL: Final = 0.9
FIRST_ID, LAST_ID = 1000, 40_000
REQUEST_BUDGET_S: Final = 60.0
VICTIM, SPY = "key-of-the-victim", "key-of-the-spy"


@dataclass(slots=True)
class Times:
    """Seconds that prompts took which had been asked before, and which had not."""

    asked_s: list[float] = field(default_factory=list)
    fresh_s: list[float] = field(default_factory=list)

    @property
    def area(self) -> float:
        """Chance that a prompt which was asked is faster than a fresh one; ties count half."""
        wins = sum((a < f) + (a == f) / 2 for a in self.asked_s for f in self.fresh_s)
        return wins / (len(self.asked_s) * len(self.fresh_s))

    @property
    def error(self) -> float:
        """1.96 standard deviations of `area` if there were nothing to tell."""
        asked, fresh = len(self.asked_s), len(self.fresh_s)
        return 1.96 * math.sqrt((asked + fresh + 1) / (12 * asked * fresh))

    def line(self, who: str) -> str:
        """Return it for people."""
        medians_ms = [1e3 * sorted(times_s)[len(times_s) // 2] for times_s in (self.asked_s, self.fresh_s)]
        return (
            f"{who:<10} {len(self.asked_s):>6} trials   asked before {medians_ms[0]:.2f} ms, "
            f"fresh {medians_ms[1]:.2f} ms   area {self.area:.3f} (by chance 0.5 +- {self.error:.3f})"
        )


async def ask(http: aiohttp.ClientSession, url: str, key: str, prompt: list[int]) -> float:
    """Ask for one token; return the seconds that it took. Raises RuntimeError for an answer that is not 200."""
    body = {"model": "smollm2", "prompt": prompt, "max_tokens": 1, "temperature": 0}
    begin_s = time.perf_counter()
    async with http.post(f"{url}/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"}) as response:
        answer = await response.read()
    took_s = time.perf_counter() - begin_s
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {answer[:300]!r}")
    return took_s


async def measure(url: str, num_trials: int, num_controls: int, num_tokens: int, seed: int) -> tuple[Times, Times]:
    """Return the spy's times and the control's."""
    rng, spy, control = random.Random(seed), Times(), Times()

    def prompt() -> list[int]:
        return [rng.randrange(FIRST_ID, LAST_ID) for _ in range(num_tokens)]

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=REQUEST_BUDGET_S)) as http:
        for _ in range(20):
            await ask(http, url, SPY, prompt())  # what is slow the first time
        for trial in range(num_trials):
            asked = prompt()
            await ask(http, url, VICTIM, asked)
            for key, times in ((SPY, spy), (VICTIM, control))[: 2 if trial < num_controls else 1]:
                pairs = [(asked, times.asked_s), (prompt(), times.fresh_s)]
                rng.shuffle(pairs)
                for tokens, taken_s in pairs:
                    taken_s.append(await ask(http, url, key, tokens))
    return spy, control


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.tenants", description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=2000, metavar="N", help="of the spy [%(default)s]")
    parser.add_argument("--controls", type=int, default=200, metavar="N", help="of the victim [%(default)s]")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="length of a prompt [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys"
        keys.write_text(f"{VICTIM} victim\n{SPY} spy\n", encoding="utf-8")
        keys.chmod(0o600)
        with own_server("smollm2", "--api-key-file", str(keys)) as url:
            times = measure(url, options.trials, options.controls, options.tokens, options.seed)
            spy, control = asyncio.run(times)
    print(f"{machine()}\nprompts of {options.tokens} tokens\n{spy.line('spy')}\n{control.line('control')}")
    is_told = abs(spy.area - 0.5) > max(BOUND, spy.error)
    return 1 if is_told or control.area < CONTROL else 0


if __name__ == "__main__":
    sys.exit(main())
