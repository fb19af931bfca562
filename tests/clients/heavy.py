"""The heavy clients, each in an environment of its own, against one running server: `make test-clients`.

    python -m tests.clients.heavy [--url URL] [litellm | instructor | langchain_openai | npm | openai_generated ...]

1. Each environment is made if it is not there (`environments.py`); that may take minutes and needs the package indexes.
2. One disaggregated server with SmolLM2 is started, or the one at --url is used.
3. A client's script runs in its environment and prints a line per check; streams that it left half read must show as
   cancelled, and when it is done no worker may hold a block for anybody.
4. A line per client with its version and time; exit code 1 if any check failed or an environment could not be made.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from model.source import resolve
from tests.clients.environments import CHECKOUT, Environment, InstallError, ensure, version
from tests.clients.peek import Peek
from tests.e2e.server import serving, wait_until

HERE: Final = Path(__file__).parent
MODEL: Final = "smollm2"
NAMES: Final = ("litellm", "instructor", "langchain_openai", "npm", "openai_generated")
BUDGET_S: Final = 1800.0
_SETTLE_BUDGET_S: Final = 60.0
# Libraries that would otherwise ask a hub or report home.
OFFLINE: Final = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "DO_NOT_TRACK": "1",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one client did.

    Attributes:
        num_checks: that passed.
        problems: what went wrong; empty if nothing did.
    """

    client: str
    version: str
    num_checks: int
    seconds: float
    problems: tuple[str, ...]

    def line(self) -> str:
        """Return it for people."""
        verdict = "FAILED" if self.problems else "ok"
        return f"{self.client} {self.version}: {verdict}, {self.num_checks} checks in {self.seconds:.0f} s"


@contextmanager
def one_server(url: str | None, *options: str) -> Iterator[Peek]:
    """Yield the server at `url`, or one of our own, disaggregated."""
    if url is not None:
        yield Peek(url.rstrip("/").removesuffix("/v1"))
        return
    cache = Path(os.environ.get("BATON_CACHE") or Path.home() / ".cache" / "baton")
    resolve(MODEL, cache, print)
    with tempfile.TemporaryDirectory() as folder, serving(MODEL, Path(folder), cache, *options) as server:
        yield Peek(server.url)


def command_of(environment: Environment, server: Peek) -> list[str]:
    """Return what drives one client."""
    if environment.is_node:
        return ["node", str(HERE / "npm" / "drive.mjs"), f"{server.url}/v1", MODEL]
    if environment.name == "openai_generated":
        return [sys.executable, "-m", "tests.clients.generated"]  # wants names and a length of its own
    script = HERE / environment.name / "drive.py"
    return [str(environment.python), "-P", str(HERE / "run_checks.py"), str(script), f"{server.url}/v1", MODEL]


def drive(name: str, server: Peek) -> Outcome:
    """Run one client's checks; what it raises or the server keeps is in the outcome's problems."""
    try:
        environment = ensure(name)
    except InstallError as error:
        return Outcome(name, "not installed", 0, 0.0, (str(error),))
    cancelled, started_s = server.num_cancelled(), time.monotonic()
    folder = CHECKOUT if name == "openai_generated" else environment.folder
    status, output = _told(command_of(environment, server), folder)
    problems = [] if status == 0 else [f"exit code {status}" if status else f"not within {BUDGET_S:g} s"]
    seconds = time.monotonic() - started_s
    aborted = sum(int(number) for number in re.findall(r"^aborted (\d+)$", output, re.MULTILINE))
    problems += _unsettled(server, cancelled + aborted)
    num_checks = len(re.findall(r"^ok ", output, re.MULTILINE))
    return Outcome(name, version(environment), num_checks, seconds, tuple(problems))


def _told(command: list[str], folder: Path) -> tuple[int | None, str]:
    """Run a command and pass on what it prints line by line; returns its exit code, None if its time ran out."""
    lines: list[str] = []
    process = subprocess.Popen(
        command, cwd=folder, env=os.environ | OFFLINE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    timer = threading.Timer(BUDGET_S, process.kill)
    timer.start()
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        print(line.rstrip(), flush=True)
    is_late = not timer.is_alive()
    timer.cancel()
    return (None if is_late else process.wait()), "".join(lines)


def _unsettled(server: Peek, num_cancelled: float) -> list[str]:
    try:
        wait_until(lambda: server.num_cancelled() >= num_cancelled, _SETTLE_BUDGET_S, "streams seen to be left")
        wait_until(server.is_idle, _SETTLE_BUDGET_S, "no block leased, nothing running")
    except AssertionError as error:
        return [str(error)]
    return []


def main() -> int:
    """Drive the clients that are named, or all; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all if none is given")
    parser.add_argument("--url", help="of a server that runs; without it one is started")
    args = parser.parse_args()
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"no such client: {', '.join(sorted(unknown))}")
    with one_server(args.url) as server:
        outcomes = [drive(name, server) for name in args.names or NAMES]
    for outcome in outcomes:
        print(outcome.line())
        for problem in outcome.problems:
            print(f"  {problem}")
    return 1 if any(outcome.problems for outcome in outcomes) else 0


if __name__ == "__main__":
    raise SystemExit(main())
