"""`python -m bench.peers`: install the peers, list how they are started, measure them beside Baton.

    install llama vllm transformers   ─► .peers/
    list                              ─► every recipe's command
    measure [--only SCENARIO ...]     ─► tables, and JSON
    report FILE                       ─► the tables of a saved comparison
    stop                              ─► ends servers that a killed run left behind

Exit codes: 0 done, 1 nothing was measured or a request failed, 2 what was asked for cannot be done, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import get_args

from rich.console import Console

from bench.peers.install import install, missing
from bench.peers.layout import Layout, PeerName
from bench.peers.measuring import Manners, Measuring
from bench.peers.processes import set_niceness, this_process
from bench.peers.recipes import Cores, Recipe, recipes
from bench.peers.results import Comparison, load, save
from bench.peers.scenarios import Scenario, scenarios, targets
from bench.peers.serving import shown_command, stop_all
from bench.peers.summary import figures_tables, targets_table
from protocol.errors import BatonError, ConfigError

_REPORT_COLUMNS = 200
_SHOWN_PORT = 8000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parsed = _parser().parse_args(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=_REPORT_COLUMNS)
    try:
        with _sigterm_as_interrupt():
            return int(parsed.run(parsed, console))
    except (BatonError, ValueError, OSError) as error:
        print(f"bench.peers: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Make SIGTERM unwind as Ctrl-C does, so that servers are stopped."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description="Measure Baton beside other servers.")
    parser.add_argument("--root", type=Path, default=Layout().root, metavar="FOLDER", help="where peers lie [.peers]")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("install", help="install peers and make the model in every format")
    command.add_argument("peers", nargs="*", metavar="PEER", help=f"{', '.join(get_args(PeerName))} [all]")
    command.set_defaults(run=_install)
    command = commands.add_parser("list", help="show every recipe's command")
    _add_cores(command)
    command.set_defaults(run=_list)
    command = commands.add_parser("measure", help="take turns, print ratios, write JSON")
    _add_cores(command)
    _add_measure(command)
    command.set_defaults(run=_measure)
    command = commands.add_parser("report", help="show a saved comparison again")
    command.add_argument("file", type=Path)
    command.set_defaults(run=_report)
    command = commands.add_parser("stop", help="end servers that an earlier run left behind")
    command.set_defaults(run=_stop)
    return parser


def _add_cores(command: argparse.ArgumentParser) -> None:
    command.add_argument("--prefill-core", type=int, default=0, metavar="CORE", help="[%(default)s]")
    command.add_argument("--decode-core", type=int, default=1, metavar="CORE", help="[%(default)s]")


def _add_measure(command: argparse.ArgumentParser) -> None:
    usual, names = Manners(), list(scenarios(Cores(), 1.0))
    command.add_argument("--only", nargs="+", choices=names, metavar="SCENARIO", help=f"some of: {', '.join(names)}")
    command.add_argument("--servers", nargs="+", metavar="LABEL", help="only these servers (see `list`)")
    command.add_argument(
        "--rounds", type=int, default=usual.num_rounds, metavar="N", help="turns of each [%(default)s]"
    )
    command.add_argument("--seed", type=int, default=usual.seed, metavar="N", help="of all prompts [%(default)s]")
    command.add_argument(
        "--window-s", type=float, default=40.0, metavar="S", help="of an interference phase [%(default)s]"
    )
    command.add_argument(
        "--max-foreign",
        type=float,
        default=usual.max_foreign_cores,
        metavar="CORES",
        help="others may use [%(default)s]",
    )
    command.add_argument(
        "--repeats", type=int, default=usual.num_repeats, metavar="N", help="of a disturbed turn [%(default)s]"
    )
    command.add_argument(
        "--quiet-s", type=float, default=usual.quiet_budget_s, metavar="S", help="wait for others [%(default)s]"
    )
    command.add_argument(
        "--nice", type=int, default=0, metavar="N", help="of servers and client; <0 as root [%(default)s]"
    )
    command.add_argument("--out", type=Path, metavar="FILE", help="JSON [.peers/results/TIME.json]")


def _install(parsed: argparse.Namespace, console: Console) -> int:
    peers: list[PeerName] = parsed.peers or list(get_args(PeerName))
    if unknown := sorted(set(peers) - set(get_args(PeerName))):
        raise ConfigError(f"no such peer: {', '.join(unknown)} (there are {', '.join(get_args(PeerName))})")
    install(_layout(parsed), peers, lambda text: _say(console, text))
    return 0


def _list(parsed: argparse.Namespace, console: Console) -> int:
    for recipe in _recipes(parsed).values():
        absent = "  NOT INSTALLED" if missing(_layout(parsed), recipe) else ""
        _say(console, f"\n{recipe.label}  [{recipe.weights}, {recipe.tuning}]{absent}")
        _say(console, shown_command(recipe, _SHOWN_PORT))
    return 0


def _measure(parsed: argparse.Namespace, console: Console) -> int:
    known, chosen, layout = _recipes(parsed), scenarios(_cores(parsed), parsed.window_s), _layout(parsed)
    if unknown := sorted(set(parsed.servers or ()) - set(known)):
        raise ConfigError(f"no such server: {', '.join(unknown)} (see `list`)")
    out = parsed.out or layout.root / "results" / f"{datetime.now(UTC):%Y-%m-%d-%H%M}.json"
    measuring = Measuring(known, _manners(parsed), layout.logs, lambda text: _say(console, text))
    with _alone(layout), contextlib.ExitStack() as stack:
        stack.callback(_keep, measuring, out, console)
        for name in parsed.only or chosen:
            labels = _present(parsed, known, chosen[name], console)
            _say(console, f"{name}: {', '.join(labels) or 'nothing to measure'}")
            measuring.measure(chosen[name], labels)
    return 0 if measuring.turns and not any(turn.num_errors for turn in measuring.turns) else 1


def _manners(parsed: argparse.Namespace) -> Manners:
    if parsed.nice:
        # The client as well: from here on whatever it starts inherits it, and its session is told.
        set_niceness([this_process()], parsed.nice)
    return Manners(
        num_rounds=parsed.rounds,
        seed=parsed.seed,
        max_foreign_cores=parsed.max_foreign,
        num_repeats=parsed.repeats,
        quiet_budget_s=parsed.quiet_s,
        niceness=parsed.nice,
    )


@contextlib.contextmanager
def _alone(layout: Layout) -> Iterator[None]:
    """Keep a second comparison from starting on the same machine; raises ConfigError where one runs already."""
    layout.root.mkdir(parents=True, exist_ok=True)
    with (layout.root / "measuring.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError("another comparison is being measured; two at once would measure each other") from None
        yield


def _keep(measuring: Measuring, out: Path, console: Console) -> None:
    """Save and show what there is, also after an interruption."""
    comparison = measuring.comparison()
    if comparison.turns:
        save(out, comparison)
        _show(comparison, console)
        _say(console, f"written: {out}")


def _present(
    parsed: argparse.Namespace, known: Mapping[str, Recipe], scenario: Scenario, console: Console
) -> list[str]:
    """Return which servers of a scenario are wanted and installed; says what is left out."""
    labels = []
    for label in scenario.recipes:
        if parsed.servers is not None and label not in parsed.servers:
            continue
        if absent := missing(_layout(parsed), known[label]):
            _say(console, f"  {label} is left out: no {absent} (python -m bench.peers install)")
        else:
            labels.append(label)
    return labels


def _report(parsed: argparse.Namespace, console: Console) -> int:
    _show(load(parsed.file), console)
    return 0


def _stop(parsed: argparse.Namespace, console: Console) -> int:
    _say(console, f"{stop_all()} processes ended")
    return 0


def _show(comparison: Comparison, console: Console) -> None:
    nice = f", niceness {comparison.niceness}" if comparison.niceness else ""
    _say(console, f"\n{comparison.machine}, {comparison.made_at}{nice}")
    for table in figures_tables(comparison, list(scenarios(Cores(), 1.0).values())):
        console.print(table)
    console.print(targets_table(comparison, targets()))


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _layout(parsed: argparse.Namespace) -> Layout:
    return Layout(parsed.root.resolve())


def _cores(parsed: argparse.Namespace) -> Cores:
    cores, usable = Cores(parsed.prefill_core, parsed.decode_core), os.sched_getaffinity(0)
    if not set(cores.both) <= usable or cores.prefill == cores.decode:
        raise ConfigError(f"--prefill-core, --decode-core: expected two different ones of {sorted(usable)}")
    return cores


def _recipes(parsed: argparse.Namespace) -> dict[str, Recipe]:
    return recipes(_layout(parsed), _cores(parsed))


if __name__ == "__main__":
    sys.exit(main())
