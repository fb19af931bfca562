"""The `baton bench` command.

1. Parse: one sub-command per workload, its options read off the workload's fields; `small` and `report` beside them.
2. Reach every server before anything is measured; then run them in turns: for each seed, for each server, one run.
3. Print the tables, write JSON and HTML. After Ctrl-C, or when a server is lost, what had been measured is kept.

Exit codes: 0 measured, 1 a request failed, 2 what was asked for cannot be used, 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import uvloop
from rich.console import Console

from bench.arguments import BenchCall, build_parser, workload_of
from bench.console import ConsoleListener
from bench.generator import run_workload
from bench.machine import machine
from bench.records import Run, RunFile, load, save
from bench.servers import own_server, reach
from bench.small import SMALL
from bench.workloads.plan import Workload
from protocol.errors import BatonError, ConfigError

# Wide enough for every column where the output is no terminal.
_REPORT_COLUMNS = 160


def main(arguments: Sequence[str] | None = None, prog: str = "baton bench") -> int:
    """Run the command and return its exit code."""
    parsed = build_parser(prog).parse_args(arguments)
    try:
        if parsed.workload == "report":
            return _report(parsed)
        call = BenchCall.of(parsed)
        with contextlib.ExitStack() as stack:
            workloads = SMALL if parsed.workload == "small" else (workload_of(parsed),)
            if call.needs_server:
                call = call.at(stack.enter_context(own_server()))
            return _measure(call, workloads)
    except BatonError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _measure(call: BenchCall, workloads: Sequence[Workload]) -> int:
    for path in (call.json, call.html, call.prompts):
        if path is not None:
            _make_room(path)
    runs: list[Run] = []
    try:
        with _writing(call.prompts) as prompts:
            listener = ConsoleListener(Console(stderr=True), prompts)
            uvloop.run(_play(call, workloads, listener, runs))
    finally:
        if runs:
            _present(RunFile(tuple(runs), machine()), call.json, call.html)
    return 1 if any(record.error is not None for run in runs for record in run.records) else 0


async def _play(call: BenchCall, workloads: Sequence[Workload], listener: ConsoleListener, runs: list[Run]) -> None:
    """Append a run for each workload, seed and server; the servers take turns within each seed."""
    for workload in workloads:
        workload.plans(call.seeds[0])  # raises for what cannot be planned, before any server is troubled
    servers = await asyncio.gather(*(reach(server) for server in call.servers))
    try:
        for workload in workloads:
            for seed in call.seeds:
                for server in servers:
                    runs += await run_workload(workload, server, seed, call.slo, listener)
    finally:
        listener.clear()


def _present(file: RunFile, json: Path | None, html: Path | None) -> None:
    """Print the tables and write the files."""
    if json is not None:
        save(json, file)
    from bench.tables import compare_table, runs_table

    console = Console() if sys.stdout.isatty() else Console(width=_REPORT_COLUMNS)
    console.print(runs_table(file.runs))
    if len({run.server for run in file.runs}) > 1:
        console.print(compare_table(file.runs))
    console.print(f"Client: {file.machine}", highlight=False)
    if html is not None:
        from bench.html import write_report

        write_report(html, file)
    for path in (json, html):
        if path is not None:
            console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def _report(parsed: argparse.Namespace) -> int:
    """Show saved runs again."""
    files = []
    for path in parsed.files:
        try:
            files.append(load(path))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from error
    machines = dict.fromkeys(file.machine for file in files)
    merged = RunFile(tuple(run for file in files for run in file.runs), " / ".join(machines))
    if not merged.runs:
        raise ConfigError("no runs in these files")
    for path in (parsed.json, parsed.html):
        if path is not None:
            _make_room(path)
    _present(merged, parsed.json, parsed.html)
    return 0


def _make_room(path: Path) -> None:
    """Make the folder of a file that will be written, so that a wrong path shows before the measuring."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"cannot write {path}")


@contextlib.contextmanager
def _writing(path: Path | None) -> Iterator[TextIO | None]:
    if path is None:
        yield None
        return
    with path.open("w", encoding="utf-8") as file:
        yield file
