"""The command line of those commands that take options of the table: ours, and the names that vLLM's users type.

1. `spelled` makes one spelling of every option: `--max_model_len` is `--max-model-len`.
2. `add_options` adds the table's options to a parser, and those of vLLM's, which the help does not list.
3. What a parser leaves over is told in one line, with the name that was likely meant.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any, Final

from baton.option import Option
from baton.options import OPTIONS
from baton.values import did_you_mean, switch
from baton.vllm_names import ALIASES, ELSEWHERE, SHORT
from protocol.errors import ConfigError

_SLIP: Final = 0.75
_NEAR_SLIP: Final = 0.88


def spelled(arguments: Iterable[str]) -> list[str]:
    """Return arguments with `-` for `_` in the names of options."""
    found = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        found.append(name.replace("_", "-") + equals + value if name.startswith("--") else argument)
    return found


def add_options(command: argparse.ArgumentParser, options: Sequence[Option]) -> None:
    """Add options by their groups, then vLLM's names; a name that nobody gave stands nowhere in the result."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in options:
        group = groups.setdefault(option.group, command.add_argument_group(option.group))
        short = [name for name, key in SHORT.items() if key == option.key]
        shown = argparse.SUPPRESS if option.is_hidden else describe(option).replace("%", "%%")
        for flags, key, text in (
            ([*short, f"--{option.name}"], option.key, shown),
            *(([f"--{alias.replace('_', '-')}"], alias, argparse.SUPPRESS) for alias in option.aliases),
        ):
            # A switch needs no value on the command line: naming it turns it on.
            bare: dict[str, Any] = {"nargs": "?", "const": "true"} if option.parse is switch else {}
            action = "append" if option.is_list else "store"
            unit = option.unit.upper() or "VALUE"
            group.add_argument(
                *flags, dest=key, metavar=unit, action=action, help=text, default=argparse.SUPPRESS, **bare
            )
    known = {option.key for option in options}
    for key, elsewhere in ELSEWHERE.items():
        if key in known:
            continue
        name, hidden = key.replace("_", "-"), {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS, "dest": key}
        flags = [*(short for short, meant in SHORT.items() if meant == key), f"--{name}"]
        if elsewhere.is_flag:
            command.add_argument(*flags, action="store_const", const="true", **hidden)  # type: ignore[arg-type]
            command.add_argument(f"--no-{name}", action="store_const", const="false", **hidden)  # type: ignore[arg-type]
        else:
            command.add_argument(*flags, **hidden)  # type: ignore[arg-type]


def unexpected(command: str, options: Sequence[Option], others: Iterable[str], argument: str) -> ConfigError:
    """Say what is wrong with an argument that a parser has left over.

    Args:
        command: whose parser.
        options: that it takes from the table.
        others: further options that it takes, with their dashes.
        argument: what was left over.
    """
    name = argument.partition("=")[0]
    if not name.startswith("-"):
        return ConfigError(f"unexpected {argument!r}: an option that takes several values is repeated for each")
    key = name.removeprefix("--").replace("-", "_")
    for option in OPTIONS:
        if key in (option.key, *option.aliases) and not option.is_hidden:
            roles = ", ".join(sorted(option.roles - {"colocated"}))
            return ConfigError(f"{name}: is not an option of baton {command}, but of {roles}")
    known = [f"--{option.name}" for option in options if not option.is_hidden]
    aliases, elsewhere = ([f"--{alias.replace('_', '-')}" for alias in names] for names in (ALIASES, ELSEWHERE))
    # What does not exist here is meant only by who has all but written it.
    meant = did_you_mean(name, [*known, *others, *aliases], _SLIP) or did_you_mean(name, elsewhere, _NEAR_SLIP)
    return ConfigError(f"{name}: there is no such option{meant}")


def describe(option: Option) -> str:
    """Give an option's help with its choices, default and vLLM's name."""
    choices = f" One of {', '.join(map(str, option.choices))}." if option.choices else ""
    aliases = f" In vLLM: {', '.join('--' + alias.replace('_', '-') for alias in option.aliases)}."
    return f"{option.help}{choices}{aliases if option.aliases else ''} [{describe_default(option)}]"


def describe_default(option: Option) -> str:
    """Give an option's default in words, with its unit."""
    if option.default_text:
        return option.default_text
    value = option.default_value()
    shown = ", ".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)
    return f"{shown} {option.unit}".strip() if value != 1 else shown
