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
import signal
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import get_args

from rich.console import Console

from bench.peers.install import install, missing
from bench.peers.layout import CHECKOUT, Layout, PeerName
from bench.peers.measuring import Manners, Measuring
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
    signal.signal(signal.SIGTERM, _end)
    try:
        return int(parsed.run(parsed, console))
    except (BatonError, ValueError, OSError) as error:
        print(f"bench.peers: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _end(number: int, frame: FrameType | None) -> None:
    # As Ctrl-C does: unwinds, so that the servers are stopped.
    raise KeyboardInterrupt


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
    command.add_argument("--out", type=Path, metavar="FILE", help="JSON [docs/results/peers-DATE.json]")


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
    known, chosen = _recipes(parsed), scenarios(_cores(parsed), parsed.window_s)
    if unknown := sorted(set(parsed.servers or ()) - set(known)):
        raise ConfigError(f"no such server: {', '.join(unknown)} (see `list`)")
    manners = Manners(parsed.rounds, parsed.seed, parsed.max_foreign, parsed.repeats, parsed.quiet_s)
    measuring = Measuring(known, manners, _layout(parsed).logs, lambda text: _say(console, text))
    try:
        for name in parsed.only or chosen:
            labels = _present(parsed, known, chosen[name], console)
            _say(console, f"{name}: {', '.join(labels) or 'nothing to measure'}")
            measuring.measure(chosen[name], labels)
    finally:
        comparison = measuring.comparison()
        if comparison.turns:
            out = parsed.out or CHECKOUT / "docs" / "results" / f"peers-{datetime.now(UTC):%Y-%m-%d}.json"
            save(out, comparison)
            _show(comparison, console)
            _say(console, f"written: {out}")
    return 0 if comparison.turns and not any(turn.num_errors for turn in comparison.turns) else 1


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
    _say(console, f"\n{comparison.machine}, {comparison.made_at}")
    for table in figures_tables(comparison, list(scenarios(Cores(), 1.0).values())):
        console.print(table)
    console.print(targets_table(comparison, targets()))


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _layout(parsed: argparse.Namespace) -> Layout:
    return Layout(parsed.root.resolve())


def _cores(parsed: argparse.Namespace) -> Cores:
    return Cores(parsed.prefill_core, parsed.decode_core)


def _recipes(parsed: argparse.Namespace) -> dict[str, Recipe]:
    return recipes(_layout(parsed), _cores(parsed))


if __name__ == "__main__":
    sys.exit(main())
