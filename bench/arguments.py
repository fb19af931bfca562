"""The options of `baton bench`, and what they come to.

Where several servers are measured, `--model`, `--api`, `--api-key` and `--extra-body` may be given once for all, or for
one of them as LABEL=VALUE.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, Self, get_args, get_type_hints
from urllib.parse import urlsplit

import msgspec

from bench.client import Budgets
from bench.records import Slo
from bench.servers import Api, Server, base_url
from bench.workloads.catalog import WORKLOADS
from bench.workloads.plan import Workload
from protocol.errors import ConfigError

_OWN_LABEL: Final = "baton"
_REPORT: Final = Path("bench-report") / "bench-report.html"
_SLO_FIELDS: Final = {"ttft": "ttft_s", "tpot": "tpot_s", "itl_p99": "itl_p99_s", "e2e": "e2e_s"}


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Build the parser of the command and of every workload."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Measure a server's latencies over OpenAI HTTP.",
        epilog=f"`{prog} WORKLOAD --help` lists the options of a workload.",
    )
    commands = parser.add_subparsers(dest="workload", metavar="WORKLOAD", required=True)
    for name, kind in WORKLOADS.items():
        command = commands.add_parser(name, help=kind.summary, description=kind.__doc__, allow_abbrev=False)
        _add_settings(command, kind)
        _add_common(command)
    small = commands.add_parser(
        "small",
        help="a short set of these; starts `baton serve smollm2` where no server is named",
        allow_abbrev=False,
    )
    _add_common(small)
    small.set_defaults(html=_REPORT, json=_REPORT.with_suffix(".json"))
    report = commands.add_parser("report", help="show saved runs again", allow_abbrev=False)
    report.add_argument("files", metavar="FILE", type=Path, nargs="+", help="JSON written by an earlier call")
    _add_outputs(report)
    return parser


def _add_settings(command: argparse.ArgumentParser, kind: type[Workload]) -> None:
    group = command.add_argument_group("workload")
    types = get_type_hints(kind)
    for setting in fields(kind):
        is_required = setting.name == "path"
        group.add_argument(
            f"--{setting.name.replace('_', '-')}",
            type=types[setting.name],
            metavar=types[setting.name].__name__.upper(),
            required=is_required,
            default=None if is_required else setting.default,
            help=f"{setting.metadata['meaning']}{'' if is_required else ' [%(default)s]'}",
        )
    group.add_argument("--scale", type=float, default=1.0, metavar="FLOAT", help="divide lengths by this [%(default)s]")


def _add_common(command: argparse.ArgumentParser) -> None:
    servers = command.add_argument_group("servers")
    servers.add_argument("--url", help="the server's address")
    servers.add_argument("--label", help="what tables call it [host:port]")
    servers.add_argument("--compare", nargs="+", metavar="LABEL=URL", help="two or more servers, measured in turns")
    servers.add_argument("--model", action="append", default=[], help="model's name [the first one the server names]")
    servers.add_argument("--api", action="append", default=[], help="completions or chat [completions]")
    servers.add_argument("--api-key", action="append", default=[], metavar="KEY", help="sent as a bearer token")
    servers.add_argument(
        "--extra-body",
        action="append",
        default=[],
        metavar="JSON",
        help="fields put into each request; null takes one away, as in '{\"ignore_eos\": null}'",
    )
    budgets = Budgets()
    for name, meaning in (
        ("connect", "seconds to connect"),
        ("silence", "seconds without a byte"),
        ("request", "seconds for a whole request"),
    ):
        default = getattr(budgets, f"{name}_s")
        servers.add_argument(
            f"--{name}-s", type=_positive, default=default, metavar="S", help=f"{meaning} [{default:g}]"
        )
    runs = command.add_argument_group("runs")
    runs.add_argument(
        "--seeds",
        type=_seeds,
        default=(1,),
        metavar="N,N",
        help="one run for each; prompts follow from it, so take new ones where a server keeps a prefix cache [1]",
    )
    runs.add_argument("--runs", type=int, default=1, metavar="N", help="at least so many runs, further seeds follow on")
    runs.add_argument("--slo", type=_slo, metavar="ttft=S,tpot=S,itl_p99=S,e2e=S", help="what a good request meets")
    _add_outputs(command)
    command.add_argument("--write-prompts", type=Path, metavar="FILE", help="write every prompt there, as JSONL")


def _add_outputs(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", type=Path, metavar="FILE", help="write every request's times there")
    command.add_argument("--html", type=Path, metavar="FILE", help="write a report with plots there")


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("must be more than 0")
    return value


def _seeds(text: str) -> tuple[int, ...]:
    seeds = tuple(int(part) for part in text.split(",") if part.strip())
    if not seeds:
        raise argparse.ArgumentTypeError("expected numbers apart by commas")
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError("each seed once: a server may know its prompts the second time")
    return seeds


def _slo(text: str) -> Slo:
    bounds: dict[str, float] = {}
    for pair in text.split(","):
        name, _, value = pair.partition("=")
        if name.strip() not in _SLO_FIELDS:
            raise argparse.ArgumentTypeError(f"{name.strip()!r} is none of {', '.join(_SLO_FIELDS)}")
        try:
            bounds[_SLO_FIELDS[name.strip()]] = _positive(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{pair.strip()!r}: expected seconds") from None
    return Slo(**bounds)


def workload_of(parsed: argparse.Namespace) -> Workload:
    """Return the workload that was asked for; raises ConfigError for a setting that cannot be."""
    kind = WORKLOADS[parsed.workload]
    if not parsed.scale > 0:
        raise ConfigError("--scale: must be more than 0")
    settings: dict[str, Any] = {setting.name: getattr(parsed, setting.name) for setting in fields(kind)}
    return kind(**settings).scaled(parsed.scale)


@dataclass(frozen=True, slots=True)
class BenchCall:
    """What a call asks for besides its workload.

    Attributes:
        servers: measured in turns, in this order; one has no address yet where it is to be started.
        seeds: one run each.
        slo: None for the workload's own.
    """

    servers: tuple[Server, ...]
    seeds: tuple[int, ...]
    slo: Slo | None
    json: Path | None
    html: Path | None
    prompts: Path | None

    @classmethod
    def of(cls, parsed: argparse.Namespace) -> Self:
        """Check and take over what the command line says; raises ConfigError."""
        if parsed.runs < 1:
            raise ConfigError("--runs: must be at least 1")
        seeds = list(parsed.seeds)
        seeds += range(seeds[-1] + 1, seeds[-1] + 1 + parsed.runs - len(seeds))
        return cls(_servers(parsed), tuple(seeds), parsed.slo, parsed.json, parsed.html, parsed.write_prompts)

    @property
    def needs_server(self) -> bool:
        """Whether a server has to be started."""
        return not all(server.url for server in self.servers)

    def at(self, url: str) -> Self:
        """Return the same call with the address of the server that has been started."""
        return replace(self, servers=tuple(replace(server, url=server.url or url) for server in self.servers))


def _servers(parsed: argparse.Namespace) -> tuple[Server, ...]:
    named = _addresses(parsed)
    labels = [label for label, _ in named]
    budgets = Budgets(parsed.connect_s, parsed.silence_s, parsed.request_s)
    servers = []
    for label, url in named:
        api = _for_label(parsed.api, label, labels) or "completions"
        if api not in get_args(Api):
            raise ConfigError(f"--api: expected one of {', '.join(get_args(Api))}, got {api!r}")
        servers.append(
            Server(
                url=url,
                model=_for_label(parsed.model, label, labels) or "",
                label=label,
                api="chat" if api == "chat" else "completions",
                extra_body=_fields(_for_label(parsed.extra_body, label, labels)),
                budgets=budgets,
                api_key=_for_label(parsed.api_key, label, labels),
            )
        )
    return tuple(servers)


def _addresses(parsed: argparse.Namespace) -> list[tuple[str, str]]:
    """Return (label, address) of each server; no address for the one that is to be started."""
    if parsed.url is not None and parsed.compare is not None:
        raise ConfigError("--url names one server, --compare several: give one of the two")
    if parsed.label is not None and parsed.compare is not None:
        raise ConfigError("--label: --compare names its servers itself")
    if parsed.compare is None:
        if parsed.url is None and parsed.workload != "small":
            raise ConfigError("--url or --compare: which server?")
        if parsed.url is None:
            return [(parsed.label or _OWN_LABEL, "")]
        url = base_url(parsed.url)
        return [(parsed.label or urlsplit(url).netloc, url)]
    found = []
    for pair in parsed.compare:
        label, separator, url = pair.partition("=")
        if not label or not separator:
            raise ConfigError(f"--compare: expected LABEL=URL, got {pair!r}")
        found.append((label, base_url(url)))
    if len(found) < 2 or len({label for label, _ in found}) < len(found):
        raise ConfigError("--compare: expected two or more servers with different labels")
    return found


def _for_label(values: Sequence[str], label: str, labels: Sequence[str]) -> str | None:
    """Return the value given for this label, else the one given for all."""
    for_all, own = None, None
    for value in values:
        named, separator, rest = value.partition("=")
        if separator and named in labels:
            own = rest if named == label else own
        else:
            for_all = value
    return own if own is not None else for_all


def _fields(text: str | None) -> dict[str, Any]:
    try:
        return {} if text is None else msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"--extra-body: not a JSON object ({error})") from error
