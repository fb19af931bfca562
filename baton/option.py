"""One option: its name, who takes it, what it fills, and how a value that a source gave is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any

from baton.values import did_you_mean
from baton.vllm_names import ALIASES
from protocol.errors import ConfigError
from router.config import RELOADED, RouterConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option.

    Attributes:
        name: as on the command line, without the two dashes; `_` for `-` in files, BATON_ and upper case in variables.
        group: heading in the help.
        roles: the commands that take it.
        parse: makes a value out of text, or out of what YAML gave; raises ValueError.
        help: one sentence.
        unit: of the value; empty where there is none.
        fills: (config dataclass, field) pairs that receive the value.
        default: where no dataclass has one.
        default_text: what the help says where the default depends on the machine or the command.
        choices: the values allowed, or empty. The dataclass that an option fills may narrow them.
        bounds: smallest and largest value allowed; None leaves that side open or to the dataclass.
        is_list: may be repeated; in a variable the values are separated by commas.
        is_hidden: for the supervisor's own use; absent from help, docs, environment and file.
    """

    name: str
    group: str
    roles: frozenset[str]
    parse: Callable[[object], Any]
    help: str
    unit: str = ""
    fills: tuple[tuple[type, str], ...] = ()
    default: Any = None
    default_text: str = ""
    choices: tuple[Any, ...] = ()
    bounds: tuple[float | None, float | None] = (None, None)
    is_list: bool = False
    is_hidden: bool = False

    @property
    def key(self) -> str:
        """Give the name as files and Python spell it."""
        return self.name.replace("-", "_")

    @property
    def aliases(self) -> tuple[str, ...]:
        """Give the keys under which vLLM knows it, where these are others than ours."""
        return tuple(alias for alias, key in ALIASES.items() if key == self.key)

    @property
    def reloads(self) -> bool:
        """Tell whether SIGHUP changes it while a server runs."""
        return self.name == "log-level" or any(of is RouterConfig and name in RELOADED for of, name in self.fills)

    @property
    def variable(self) -> str:
        """Give the environment variable that sets it."""
        return "BATON_CACHE" if self.name == "cache-dir" else f"BATON_{self.key.upper()}"

    def default_value(self) -> Any:
        """Give the default: that of the first field it fills, else its own."""
        for owner, name in self.fills:
            for field in fields(owner):
                if field.name == name and field.default is not MISSING:
                    return field.default
        return self.default

    def read(self, value: object, source: str) -> Any:
        """Turn what a source gave into a checked value; raise ConfigError that names source and reason."""
        try:
            if self.is_list:
                items = [part for given in _several(value) for part in _listed(given)]
                if not items:
                    raise ValueError("expected at least one value")
                return tuple(self._read_one(item) for item in items)
            return self._read_one(value)
        except ValueError as error:
            hint = ""
            if isinstance(value, str) and value.startswith("tcp://") and source == self.variable:
                hint = " (Kubernetes sets this for a service called baton: set enableServiceLinks: false)"
            raise ConfigError(f"{source}: {error}{hint}") from None

    def _read_one(self, value: object) -> Any:
        parsed = self.parse(value)
        if self.choices and parsed not in self.choices:
            shown = ", ".join(map(str, self.choices))
            raise ValueError(f"expected one of {shown}; got {parsed!r}{did_you_mean(parsed, self.choices)}")
        low, high = self.bounds
        if low is not None and parsed < low:
            raise ValueError(f"must be at least {low:g}, got {parsed}")
        if high is not None and parsed > high:
            raise ValueError(f"must be at most {high:g}, got {parsed}")
        return parsed


def _several(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _listed(value: object) -> list[object]:
    """Return the values of one occurrence of a list's option: also of a list of texts that is written as JSON."""
    if not isinstance(value, str) or not value.startswith("["):
        return [value]
    try:
        found = json.loads(value)
    except ValueError:
        return [value]
    return found if isinstance(found, list) and all(isinstance(part, str) for part in found) else [value]
