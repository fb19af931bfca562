"""Merge what the sources say into one set of values: command line over environment over file over defaults."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from baton.options import BY_KEY, Option, options_of
from protocol.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Settings:
    """The values of one command's options by key, and which of them a source gave.

    Attributes:
        role: the command.
        model: the model reference as given.
        values: value of every option that the command takes.
        given: keys that came from the command line, the environment or the file.
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
        arguments: what the command line gave, as text by key; `model` among them.
        environment: the process environment.
        file: YAML file, or None.

    Raises ConfigError that names source, option and reason.
    """
    from_file = read_file(file) if file is not None else {}
    values: dict[str, Any] = {}
    given: set[str] = set()
    for option in options_of(role):
        found = _first_source(option, arguments, environment, from_file, file)
        if found is not None:
            values[option.key] = option.read(*found)
            given.add(option.key)
        else:
            values[option.key] = option.default_value()
    model = arguments.get("model") or environment.get("BATON_MODEL") or from_file.get("model")
    if not isinstance(model, str) or not model:
        raise ConfigError("MODEL: name the model to serve: a directory, a .gguf file, a hub id, or smollm2")
    return Settings(role, model, values, frozenset(given))


def _first_source(
    option: Option,
    arguments: Mapping[str, object],
    environment: Mapping[str, str],
    from_file: Mapping[str, object],
    file: Path | None,
) -> tuple[object, str] | None:
    """Give (value, name of the source) from the strongest source that sets the option."""
    if option.key in arguments:
        return arguments[option.key], f"--{option.name}"
    if option.is_hidden:
        return None
    if text := environment.get(option.variable):
        value = [part.strip() for part in text.split(",")] if option.is_list else text
        return value, option.variable
    if from_file.get(option.key) is not None:
        return from_file[option.key], f"{file}: {option.key}"
    return None


def read_file(path: Path) -> dict[str, object]:
    """Read a YAML file of options; one file may serve every role. Raises ConfigError for an unknown key."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config: cannot read {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected options as `name: value`, got {type(content).__name__}")
    found: dict[str, object] = {}
    known = {"model", *(key for key, option in BY_KEY.items() if not option.is_hidden)}
    for name, value in content.items():
        key = str(name).replace("-", "_")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(f"{path}: unknown option {name!r}" + (f"; did you mean {close[0]}?" if close else ""))
        if key in found:
            raise ConfigError(f"{path}: {key} is set twice")
        found[key] = value
    return found
