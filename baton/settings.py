"""Merge what the sources say into one set of values: command line over environment over file over defaults."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from baton.option import Option
from baton.options import BY_KEY, OPTIONS, options_of
from baton.values import did_you_mean
from baton.vllm_names import ALIASES, ELSEWHERE
from protocol.errors import ConfigError

OTHER_VARIABLES = ("BATON_MODEL", "BATON_CONFIG")
_PREFIX = "BATON_"
# How like a variable of ours one must be, behind the prefix, to be taken for a slip: those of others are not spoken of.
_SLIP = 0.7


@dataclass(frozen=True, slots=True)
class Settings:
    """The values of one command's options by key, and which of them a source gave.

    Attributes:
        role: the command.
        model: the model reference as given.
        values: value of every option that the command takes.
        given: keys that came from the command line, the environment or the file, and the aliases that they came under.
    """

    role: str
    model: str
    values: Mapping[str, Any]
    given: frozenset[str]

    def __getitem__(self, key: str) -> Any:
        """Give the value of one option."""
        return self.values[key]

    def fill(self, config: type) -> dict[str, Any]:
        """Give the keyword arguments for those fields of a config dataclass that options fill."""
        names = {field.name for field in fields(config)}
        return {
            name: self.values[option.key]
            for option in options_of(self.role)
            for owner, name in option.fills
            if owner is config and name in names
        }


def merge(role: str, arguments: Mapping[str, object], environment: Mapping[str, str], file: Path | None) -> Settings:
    """Merge the sources for one command.

    Args:
        role: the command.
        arguments: what the command line gave, as text by key, ours or vLLM's; `model` among them.
        environment: the process environment.
        file: YAML file, or None.

    Raises ConfigError that names source, option and reason.
    """
    from_file = read_file(file) if file is not None else {}
    for key, value in arguments.items():
        if key in ELSEWHERE:
            ELSEWHERE[key].check(f"--{key.replace('_', '-')}", value)
    values: dict[str, Any] = {}
    given: set[str] = set()
    for option in options_of(role):
        found = _first_source(option, arguments, environment, from_file, file)
        if found is not None:
            value, source, key = found
            values[option.key] = option.read(value, source)
            given |= {option.key, key}
        else:
            values[option.key] = option.default_value()
    model = arguments.get("model") or environment.get("BATON_MODEL") or from_file.get("model")
    if not isinstance(model, str) or not model:
        raise ConfigError(
            "MODEL: name the model to serve: a directory, a .gguf file, a hub id, or smollm2, "
            f"as in: baton {role} smollm2"
        )
    return Settings(role, model, values, frozenset(given))


def variable_of(key: str) -> str:
    """Give the environment variable that sets an option, by its key or an alias of it."""
    return BY_KEY[key].variable if key in BY_KEY else f"{_PREFIX}{key.upper()}"


def variables() -> frozenset[str]:
    """Give every environment variable that is read here."""
    options = (variable_of(option.key) for option in OPTIONS if not option.is_hidden)
    return frozenset((*options, *map(variable_of, ALIASES), *OTHER_VARIABLES))


def misspelt(environment: Iterable[str]) -> list[str]:
    """Give a line for each variable that is none of ours, and very like one."""
    known = variables()
    ours = sorted(name.removeprefix(_PREFIX) for name in known)
    lines = []
    for name in sorted(environment):
        if name.startswith(_PREFIX) and name not in known:
            if (elsewhere := ELSEWHERE.get(name.removeprefix(_PREFIX).lower())) is not None:
                lines.append(f"{name} is not read: {elsewhere.says}")
            elif meant := did_you_mean(name.removeprefix(_PREFIX), ours, _SLIP):
                question = meant.replace("mean ", f"mean {_PREFIX}")
                lines.append(f"{name} is not read: there is no such variable{question}")
    return lines


def _first_source(
    option: Option,
    arguments: Mapping[str, object],
    environment: Mapping[str, str],
    from_file: Mapping[str, object],
    file: Path | None,
) -> tuple[object, str, str] | None:
    """Give (value, name of the source, key used) from the strongest source that sets the option."""
    keys = (option.key, *option.aliases)
    if key := _only([key for key in keys if key in arguments], "--", "-"):
        return arguments[key], f"--{key.replace('_', '-')}", key
    if option.is_hidden:
        return None
    if key := _only([key for key in keys if environment.get(variable_of(key))], _PREFIX, "_"):
        text = environment[variable_of(key)]
        value = [part.strip() for part in text.split(",")] if option.is_list else text
        return value, variable_of(key), key
    if key := _only([key for key in keys if from_file.get(key) is not None], f"{file}: ", "_"):
        return from_file[key], f"{file}: {key}", key
    return None


def _only(found: list[str], before: str, dash: str) -> str:
    """Give the one key under which a source sets an option, or nothing. Raises ConfigError for two."""
    if len(found) > 1:
        first, second = (before + key.replace("_", dash) for key in found[:2])
        raise ConfigError(f"{second}: is the same as {first}; give one of them")
    return found[0] if found else ""


def read_file(path: Path) -> dict[str, object]:
    """Read a YAML file of options; one file may serve every role. Raises ConfigError for an unknown key."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"--config: cannot read {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected options as `name: value`, got {type(content).__name__}")
    found: dict[str, object] = {}
    known = {"model", *ALIASES, *(key for key, option in BY_KEY.items() if not option.is_hidden)}
    for name, value in content.items():
        key = str(name).replace("-", "_")
        if key in ELSEWHERE:
            if value is not None:
                ELSEWHERE[key].check(f"{path}: {name}", value)
            continue
        if key not in known:
            raise ConfigError(f"{path}: unknown option {name!r}{did_you_mean(key, sorted(known))}")
        if key in found:
            raise ConfigError(f"{path}: {key} is set twice")
        found[key] = value
    return found
