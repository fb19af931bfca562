"""JSON schemas drawn at random: nested objects and arrays, constants, numbers, strings, optional fields, alternatives,
references, and names that are keywords elsewhere.

Everything that a model could go on with for ever has a bound, so that most answers end by themselves.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Final

Schema = dict[str, Any]

MAX_DEPTH: Final = 3
_NAMES: Final = (
    *("name", "age", "title", "skills", "years", "city", "remote", "salary", "level", "summary", "score", "tags"),
    *("first name", "e-mail", "größe", "notes", "id", "kind", "reason", "evidence"),
    *("const", "enum", "default", "examples", "$ref", "properties", "items"),
)
_WORDS: Final = (
    "junior",
    "senior",
    "yes",
    "no",
    "unknown",
    "Berlin",
    "Zürich",
    'a "quoted" one',
    "back\\slash",
    "1",
    "",
)
_PATTERNS: Final = (
    *("^[A-Z][a-z]{2,8}$", "^[0-9]{2,5}$", "^(alpha|beta|gamma)-[0-9]$", "^[a-z]+@[a-z]+\\.org$"),
    *("^\\d{3}-\\d{4}$", "^\\w{1,8}$", "^\\S{1,5}\\s\\S{1,5}$", "^[\\w-]{2,6}$", "^(yes|no)\\d?$"),
)
_FORMATS: Final = ("date", "time", "date-time", "uuid", "ipv4", "nonsense")
# What stands in a constant is data, and no integer of it may be rounded.
_DATA: Final = ({"properties": {"x": 1}}, {"$ref": "#"}, [1, -2.5, {}], 1 << 60, -9007199254740992, 1e-7)
_SHARED: Final = ("shared", "const", "a/b")


def random_schema(dice: random.Random) -> Schema:
    """Draw the schema of an object."""
    schema = _object(dice, 1)
    schema["$defs"] = {name: _any(dice, MAX_DEPTH + 1) for name in _SHARED}
    if dice.random() < 0.3:
        schema["$id"] = "https://example.com/schema.json"
    return schema


def _object(dice: random.Random, depth: int) -> Schema:
    names = dice.sample(_NAMES, dice.randint(1, 5 if depth == 1 else 3))
    return {
        "type": "object",
        "properties": {name: _any(dice, depth + 1) for name in names},
        "required": [name for name in names if dice.random() < 0.7],
        "additionalProperties": False,
    }


def _array(dice: random.Random, depth: int) -> Schema:
    num_min = dice.randint(0, 2)
    return {
        "type": "array",
        "items": _any(dice, depth + 1),
        "minItems": num_min,
        "maxItems": num_min + dice.randint(0 if num_min else 1, 2),
    }


def _string(dice: random.Random, _: int) -> Schema:
    kind = dice.random()
    if kind < 0.2:
        return {"type": "string", "pattern": dice.choice(_PATTERNS)}
    if kind < 0.35:
        return {"type": "string", "format": dice.choice(_FORMATS)}
    num_min = dice.choice([0, 0, 1, 5])
    return {"type": "string", "minLength": num_min, "maxLength": num_min + dice.randint(1, 30)}


def _integer(dice: random.Random, _: int) -> Schema:
    low = dice.choice([-1000, -5, 0, 1, 18])
    bounds = {"minimum": low, "maximum": low + dice.choice([1, 10, 120, 100_000])}
    if dice.random() < 0.2:
        bounds["multipleOf"] = 7 if bounds["maximum"] - low >= 7 else 1
    return {"type": "integer", **bounds}


def _number(dice: random.Random, _: int) -> Schema:
    low = dice.choice([-10.5, -0.5, 0, 0.25, 3])
    least, most = dice.choice(["minimum", "exclusiveMinimum"]), dice.choice(["maximum", "exclusiveMaximum"])
    bounds = {least: low, most: low + dice.choice([0.5, 1, 99.5])}
    # A quarter is one in binary as well: who checks with doubles agrees.
    return {"type": "number", **bounds, **({"multipleOf": 0.25} if dice.random() < 0.2 else {})}


def _enum(dice: random.Random, _: int) -> Schema:
    if dice.random() < 0.2:
        return {"const": dice.choice([*_WORDS, 7, True, None, *_DATA])}
    values: list[Any] = [*_WORDS, 1, 2.5, None, False, *_DATA]
    return {"enum": dice.sample(values, dice.randint(1, 5))}


def _plain(dice: random.Random, _: int) -> Schema:
    return {"type": dice.choice(["boolean", "null"])}


def _union(dice: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(dice, depth + 1), _integer(dice, depth)]}


def _shared(dice: random.Random, _: int) -> Schema:
    return {"$ref": "#/$defs/" + dice.choice(_SHARED).replace("/", "~1")}


_LEAVES: Final[tuple[Callable[[random.Random, int], Schema], ...]] = (_string, _integer, _number, _enum, _plain)


def _any(dice: random.Random, depth: int) -> Schema:
    if depth <= MAX_DEPTH and dice.random() < 0.1:
        return _shared(dice, depth)
    if depth <= MAX_DEPTH and dice.random() < 0.4:
        return dice.choice((_object, _array, _union))(dice, depth)
    return dice.choice(_LEAVES)(dice, depth)
