"""`baton run-batch IN OUT [MODEL | --url URL]`, and the same as vLLM's users type it: `-i IN -o OUT --model MODEL`.

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
from urllib.parse import urlsplit

import uvloop

from baton.batch import Batch, Done, Tally, Target, read_done
from baton.command_line import add_options, spelled, unexpected
from baton.config import environment
from baton.hangup import hold
from baton.log_lines import SHORT, start_log
from baton.option import Option
from baton.options import in_process_options
from baton.vllm_names import ALIASES, ELSEWHERE
from model.errors import ModelError
from protocol.errors import BatonError, ConfigError

NUM_OPEN_AT_SERVER: Final = 32
RETRY_S: Final = 600.0
_OWN: Final = (
    "--input-file",
    "--output-file",
    "--model",
    "--url",
    "--api-key",
    "--resume",
    "--concurrency",
    "--retry-s",
)


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
    hold()
    start_log(logging.WARNING, SHORT)
    try:
        plan = _plan(parse(arguments))
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


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """Read the command line. Raises ConfigError for what is unknown, missing or given twice."""
    options = tuple(in_process_options().values())
    parsed, rest = _parser(options).parse_known_intermixed_args(spelled(arguments))
    found = vars(parsed)
    if rest:
        raise unexpected("run-batch", options, _OWN, rest[0])
    places = {"input": "IN", "output": "OUT", "model": "MODEL"}
    open_places = [place for place in places if found[place] is None]
    names = found.pop("names")
    if len(names) > len(open_places):
        raise ConfigError(f"unexpected {names[len(open_places)]!r}: IN, OUT and MODEL are there already")
    found |= zip(open_places, names, strict=False)
    for place in ("input", "output"):
        if found[place] is None:
            raise ConfigError(f"{places[place]}: name it, as in: baton run-batch in.jsonl out.jsonl smollm2")
    return found


def _parser(options: Sequence[Option]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="baton run-batch",
        usage="baton run-batch IN OUT [MODEL | --url URL] [options]",
        description="Answer a file of requests in OpenAI's batch format, with an engine of its own or by a server.",
        allow_abbrev=False,
    )
    names = "file of requests, one a line; file for the results; model to load here, as for baton serve"
    parser.add_argument("names", metavar="IN OUT MODEL", nargs="*", help=names)
    parser.add_argument("-i", "--input-file", dest="input", metavar="IN", help="the same, as an option")
    parser.add_argument("-o", "--output-file", dest="output", metavar="OUT", help="the same, as an option")
    parser.add_argument("--model", metavar="MODEL", help="the same, as an option")
    parser.add_argument("--url", help="server that answers instead, http://host:port")
    parser.add_argument("--api-key", help="for the server [OPENAI_API_KEY]")
    parser.add_argument("--resume", action="store_true", help="go on where OUT ends")
    at_once = f"lines open at once [{NUM_OPEN_AT_SERVER} at a server, two decode batches here]"
    parser.add_argument("--concurrency", type=int, metavar="LINES", help=at_once)
    retry = f"how long a line tries to reach the server; 429 is always waited out [{RETRY_S:g} s]"
    parser.add_argument("--retry-s", type=float, default=RETRY_S, metavar="S", help=retry)
    add_options(parser, options)
    return parser


def _plan(options: dict[str, Any]) -> Plan:
    """Check the command line, and look at OUT. Raises ConfigError."""
    engine = {key: value for key, value in options.items() if key in {*in_process_options(), *ALIASES, *ELSEWHERE}}
    model, url, concurrency = options["model"], options["url"], options["concurrency"]
    if (model is None) == (url is None):
        raise ConfigError("name either MODEL, to be loaded here, or a server with --url")
    if url is not None and engine:
        raise ConfigError(f"--{next(iter(engine)).replace('_', '-')}: is for MODEL; the server has options of its own")
    if url is not None:
        _check_url(url)
    if concurrency is not None and concurrency < 1:
        raise ConfigError("--concurrency: must be at least 1")
    source, out = Path(options["input"]), Path(options["output"])
    if not source.is_file():
        raise ConfigError(f"{source} is no file")
    done = read_done(out, options["resume"])
    api_key = options["api_key"] or environment().get("OPENAI_API_KEY")
    return Plan(source, out, done, model, url, engine, concurrency, options["retry_s"], api_key)


def _check_url(url: str) -> None:
    """Raise ConfigError for what is no address of a server: endpoints are put behind it."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--url: must begin with http:// or https:// and a host, not {url!r}")
    if parts.query or parts.fragment:
        raise ConfigError(f"--url: is the server's address, without ? and #; got {url!r}")


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
