"""Parse one value of an option: out of text, or out of what YAML made of it. Each raises ValueError with the reason."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


def text(value: object) -> str:
    """Accept a string that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected text, got {value!r}")
    return value


def whole(value: object) -> int:
    """Accept a whole number, also written as text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        return int(text(value))
    except ValueError:
        raise ValueError(f"expected a whole number, got {value!r}") from None


def number(value: object) -> float:
    """Accept a finite number, also written as text."""
    try:
        parsed = float(value if isinstance(value, int | float) and not isinstance(value, bool) else text(value))
    except ValueError:
        raise ValueError(f"expected a number, got {value!r}") from None
    if not math.isfinite(parsed):
        raise ValueError(f"expected a finite number, got {value!r}")
    return parsed


def switch(value: object) -> bool:
    """Accept true or false, also written as text."""
    if isinstance(value, bool):
        return value
    word = text(value).lower() if isinstance(value, str) else ""
    if word not in ("true", "false"):
        raise ValueError(f"expected true or false, got {value!r}")
    return word == "true"


def type_name(value: object) -> str:
    """Accept the name of a floating-point type, also torch's short ones, and torch's types themselves."""
    name = text(str(value) if str(value).startswith("torch.") else value).removeprefix("torch.")
    return {"half": "float16", "float": "float32"}.get(name, name)


def core_set(value: object) -> tuple[int, ...]:
    """Accept CPU cores: a whole number, a list of them, or text like "0,2-5"; sorted, without repeats."""
    if isinstance(value, list | tuple):
        return tuple(sorted({core for item in value for core in core_set(item)}))
    if isinstance(value, int) and not isinstance(value, bool):
        return core_set(str(value))
    cores: set[int] = set()
    for part in text(value).split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"expected cores like 0,2-5, got {value!r}")
        low, high = int(first), int(last or first)
        if high < low or high > 65535:
            raise ValueError(f"expected cores like 0,2-5, got {value!r}")
        cores.update(range(low, high + 1))
    return tuple(sorted(cores))


def did_you_mean(given: object, known: Iterable[object], cutoff: float = 0.6) -> str:
    """Return a question about the known name that is likest to a given one; nothing where none is like it."""
    close = difflib.get_close_matches(str(given), [str(name) for name in known], n=1, cutoff=cutoff)
    return f"; did you mean {close[0]}?" if close else ""
