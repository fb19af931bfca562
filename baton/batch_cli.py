"""`baton run-batch IN OUT [MODEL | --url URL]`.

Exit codes: 0 every line has its answer or its error, 1 it broke off, 2 something on the command line cannot be used.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import uvloop

from baton.batch import Batch, Done, Tally, Target, read_done
from baton.config import environment
from baton.log_lines import SHORT, start_log
from baton.options import in_process_options
from model.errors import ModelError
from protocol.errors import BatonError, ConfigError

NUM_OPEN_AT_SERVER: Final = 32
RETRY_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What the command line asks for: either `model` or `url` is set. `engine` are options of the model's engine."""

    source: Path
    out: Path
    done: Done
    model: str | None
    url: str | None
    engine: dict[str, Any]
    concurrency: int | None
    retry_s: float
    api_key: str | None


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit code of the process."""
    options = vars(_parser().parse_args(arguments))
    start_log(logging.WARNING, SHORT)
    try:
        plan = _plan(options)
        with plan.source.open("rb") as lines, plan.out.open("ab") as results:
            tally = uvloop.run(_run(plan, lines, results))
        print(f"{plan.out}: {tally}", file=sys.stderr)
        return 0
    except (BatonError, ModelError, OSError) as error:
        print(f"baton run-batch: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError | ModelError) else 1
    except KeyboardInterrupt:
        print("baton run-batch: broken off; --resume goes on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="baton run-batch",
        usage="baton run-batch IN OUT [MODEL | --url URL] [options]",
        description="Answer a file of requests in OpenAI's batch format, with an engine of its own or by a server.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("input", metavar="IN", help="file of requests, one a line")
    parser.add_argument("output", metavar="OUT", help="file for the results, one a line")
    parser.add_argument("model", metavar="MODEL", nargs="?", help="model to load here, as for baton serve")
    parser.add_argument("--url", default=None, help="server that answers instead, http://host:port")
    parser.add_argument("--api-key", default=None, help="for the server [OPENAI_API_KEY]")
    parser.add_argument("--resume", action="store_true", default=False, help="go on where OUT ends")
    at_once = f"lines open at once [{NUM_OPEN_AT_SERVER} at a server, two decode batches here]"
    parser.add_argument("--concurrency", type=int, default=None, metavar="LINES", help=at_once)
    retry = f"how long a line tries to reach the server; 429 is always waited out [{RETRY_S:g}]"
    parser.add_argument("--retry-s", type=float, default=RETRY_S, metavar="S", help=retry)
    engine = parser.add_argument_group("engine of its own (docs/configuration.md)")
    for key, option in in_process_options().items():
        action = "append" if option.is_list else "store"
        engine.add_argument(f"--{option.name}", dest=f"engine_{key}", action=action, metavar="VALUE", help=option.help)
    return parser


def _plan(options: dict[str, Any]) -> Plan:
    """Check the command line, and look at OUT. Raises ConfigError."""
    engine = {key.removeprefix("engine_"): value for key, value in options.items() if key.startswith("engine_")}
    model, url, concurrency = options.get("model"), options["url"], options["concurrency"]
    if (model is None) == (url is None):
        raise ConfigError("name either MODEL, to be loaded here, or a server with --url")
    if url is not None and engine:
        raise ConfigError(f"--{next(iter(engine)).replace('_', '-')}: is for MODEL; the server has options of its own")
    if url is not None and not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url: must begin with http:// or https://, not {url!r}")
    if concurrency is not None and concurrency < 1:
        raise ConfigError("--concurrency: must be at least 1")
    source, out = Path(options["input"]), Path(options["output"])
    if not source.is_file():
        raise ConfigError(f"{source} is no file")
    done = read_done(out, options["resume"])
    api_key = options["api_key"] or environment().get("OPENAI_API_KEY")
    return Plan(source, out, done, model, url, engine, concurrency, options["retry_s"], api_key)


async def _run(plan: Plan, lines: BinaryIO, results: BinaryIO) -> Tally:
    async with _engine(plan) if plan.model is not None else _server(plan) as (target, num_open):
        batch = Batch(target, results, plan.concurrency or num_open, plan.retry_s)
        with _bar(plan.source) as on_line:
            await batch.run(lines, plan.done, on_line)
        return batch.tally


@contextmanager
def _bar(source: Path) -> Iterator[Callable[[], None]]:
    """Show how many lines are done, where stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with source.open("rb") as file:
        num_lines = sum(1 for _ in file)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(source.name, total=num_lines)
        yield lambda: progress.advance(task)


@asynccontextmanager
async def _server(plan: Plan) -> AsyncIterator[tuple[Target, int]]:
    from baton.batch_targets import ServerTarget

    async with ServerTarget(plan.url or "", plan.api_key) as target:
        yield target, NUM_OPEN_AT_SERVER


@asynccontextmanager
async def _engine(plan: Plan) -> AsyncIterator[tuple[Target, int]]:
    from baton.batch_engine import EngineTarget
    from baton.in_process import InProcess, configure

    engine = InProcess(configure(plan.model or "", plan.engine))
    await engine.start()
    try:
        yield EngineTarget(engine), engine.max_num_open
    finally:
        await engine.close()
