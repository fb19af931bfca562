"""Numbers of a schema as llguidance holds exactly to them; what it would not, is refused by the keyword's name.

Its ranges are right, within limits that are met here, so that what comes out always obeys:

1. It knows numbers as doubles, and reads some decimals as the double beside the nearest: each number is spelt so that
   it is read as meant, a bound that is no double becomes the next double within, and such a constant is refused.
2. Integers are 64 bits wide: bounds of integers become closed, and are drawn in where they lie beyond.
3. An open bound at an integer, with the other bound less than 1 away, would admit the integer: it is drawn in a little.
4. `0.3` is left out between 0.25 and 0.35, as is every beginning of a bound's digits: these are added.
5. `multipleOf` between bounds is settled by doubles: a few multiples are written out.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any, Final

from protocol.errors import GrammarError

Node = dict[str, Any]
Number = int | Decimal

KEYWORDS: Final = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf")
MAX_LISTED_MULTIPLES: Final = 64
_OTHER_TYPES: Final = ("string", "array", "object", "boolean", "null")
_EXACT: Final = 1 << 53
_LARGEST: Final = (1 << 63) - 1024  # the greatest double that 64 bits hold
_LARGEST_INTEGER: Final = (1 << 63) - 1
_WIDEST: Final = 10**18
_FINEST: Final = 10**60  # each digit after the point nests its expressions once more
_MAX_COEFFICIENT: Final = (1 << 32) - 1
_GREATEST_DOUBLE: Final = Fraction(sys.float_info.max)
_MARGIN_DIGITS: Final = 9
_NUM_TRIES: Final = 8


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers between two bounds, each open or closed or not there, that are multiples of `step`."""

    low: Fraction | None = None
    high: Fraction | None = None
    is_low_open: bool = False
    is_high_open: bool = False
    step: Fraction | None = None

    def has(self, value: Fraction) -> bool:
        """Whether a number is in it."""
        if self.low is not None and (value < self.low or (self.is_low_open and value == self.low)):
            return False
        if self.high is not None and (value > self.high or (self.is_high_open and value == self.high)):
            return False
        return self.step is None or (value / self.step).denominator == 1

    def of_integers(self) -> Range:
        """Return its integers, between closed bounds."""
        low, high = self.low, self.high
        if low is not None:
            low = Fraction(math.floor(low) + 1 if self.is_low_open else math.ceil(low))
        if high is not None:
            high = Fraction(math.ceil(high) - 1 if self.is_high_open else math.floor(high))
        return Range(low, high, step=None if self.step is None else Fraction(self.step.numerator))

    @property
    def is_empty(self) -> bool:
        """Whether nothing is in it."""
        if self.low is None or self.high is None:
            return False
        is_open = self.is_low_open or self.is_high_open
        return self.low > self.high or (self.low == self.high and is_open) or self.multiples() == []

    def multiples(self) -> list[Fraction] | None:
        """Return the multiples in it if there are few, and two bounds; else None."""
        if self.low is None or self.high is None or self.step is None:
            return None
        first, last = math.ceil(self.low / self.step), math.floor(self.high / self.step)
        if last - first >= MAX_LISTED_MULTIPLES:
            return None
        return [found for i in range(first, last + 1) if self.has(found := i * self.step)]


def hold_numbers(node: Node, is_merged: bool) -> None:
    """Rewrite what a schema says of numbers, in place.

    Args:
        node: a schema.
        is_merged: whether schemas of the document are combined, so that bounds of several may meet.

    Raises:
        GrammarError: it cannot be held exactly; names the keyword.
    """
    for key in ("const", "enum"):
        if key in node:
            node[key] = held_data(node[key], key)
    if not any(key in node for key in KEYWORDS):
        return
    asked = _range_of(node)
    if asked is None:
        return  # the library says what is wrong
    if "const" in node or "enum" in node:
        _filter(node, asked)
        return
    named = node.get("type", ["number", *_OTHER_TYPES])
    types = [named] if isinstance(named, str) else named
    if not isinstance(types, list):
        return
    pieces: list[Any] = []
    if "number" in types:
        pieces = _numbers(asked, is_merged)
    elif "integer" in types:
        pieces = _integers(asked.of_integers())
    for key in KEYWORDS:
        node.pop(key, None)
    if len(pieces) == 1 and "enum" not in pieces[0]:
        # The keywords mean nothing for other types.
        node.update({key: value for key, value in pieces[0].items() if key != "type"})
        return
    others = [name for name in types if name not in ("number", "integer")]
    if len(others) == len(types):
        return  # numbers are no matter here
    _add_any(node, [*pieces, *([{"type": others}] if others else ())])


def held_data(value: Any, keyword: str) -> Any:
    """Return a constant whose numbers are read as they are meant. Raises GrammarError for one that cannot be."""
    if isinstance(value, dict):
        return {name: held_data(item, keyword) for name, item in value.items()}
    if isinstance(value, list):
        return [held_data(item, keyword) for item in value]
    if not _is_number(value):
        return value
    constant = _constant(Fraction(value))
    if constant is None:
        raise GrammarError(f"{keyword}: {str(value)[:80]} cannot be held exactly: no double is this number")
    return constant


def check_merged_multiples(steps: Iterator[Any]) -> None:
    """Raise GrammarError where the library could not find a common multiple of some that may meet in 32 bits."""
    found = {Fraction(step) for step in steps if _is_number(step)}
    scale = math.lcm(*(step.denominator for step in found))
    if len(found) > 1 and math.prod(step * scale for step in found) > _MAX_COEFFICIENT:
        raise GrammarError("multipleOf: several that are combined have too many digits")


def _numbers(asked: Range, is_merged: bool) -> list[Any]:
    """Return schemas for the numbers of a range, any of which may hold."""
    if asked.is_empty:
        return [_nothing(asked)]
    if (listed := asked.multiples()) is not None:
        return [_multiples(listed)]
    node: Node = {"type": "number"}
    left_out: set[Fraction] = set()
    low, high = asked.low, asked.high
    least = most = None
    if low is not None:
        least = _drawn_in(low, high, asked.is_low_open, is_merged, "minimum")
        node["exclusiveMinimum" if least.is_open else "minimum"] = least.told
        left_out |= {-value for value in _beginnings(-least.shown)}
    if high is not None:
        most = _drawn_in(-high, None if low is None else -low, asked.is_high_open, is_merged, "maximum")
        node["exclusiveMaximum" if most.is_open else "maximum"] = -most.told
        left_out |= set(_beginnings(-most.shown))
    if least is not None and most is not None and least.shown >= -most.shown and (least.is_open or most.is_open):
        raise GrammarError("minimum, maximum: no double lies within these bounds")
    if asked.step is not None:
        node["multipleOf"] = _coefficient(asked.step)
    added = [told for value in sorted(left_out) if asked.has(value) and (told := _constant(value)) is not None]
    return [node, *([{"enum": added}] if added else ())]


def _integers(asked: Range) -> list[Any]:
    """Return schemas for the integers of a range between closed bounds, any of which may hold."""
    if asked.is_empty:
        return [_nothing(asked)]
    if (listed := asked.multiples()) is not None:
        return [_multiples(listed)]
    node: Node = {"type": "integer"}
    low = None if asked.low is None else _integer_at_least(int(asked.low), "minimum")
    if asked.high is None or asked.high >= _LARGEST_INTEGER:
        # As a double it is one more, which the library takes for the largest that it has.
        high = None if asked.high is None else _LARGEST_INTEGER
    else:
        high = -_integer_at_least(-int(asked.high), "maximum")
    if low is not None and low >= _WIDEST and high is None:
        high = _LARGEST
    if high is not None and high <= -_WIDEST and low is None:
        low = -_LARGEST
    if low is not None and high is not None and low > high:
        raise GrammarError("minimum, maximum: integers beyond 2^53 are held between doubles, and none lies within")
    node |= {} if low is None else {"minimum": low}
    node |= {} if high is None else {"maximum": high}
    if asked.step is not None and asked.step != 1:
        node["multipleOf"] = _coefficient(asked.step)
    return [node]


def _multiples(values: list[Fraction]) -> Node:
    """Return a schema for some numbers. Raises GrammarError if one cannot be held exactly."""
    constants = [_constant(value) for value in values]
    if None in constants:
        raise GrammarError("multipleOf: multiples within these bounds cannot be held exactly: they are no doubles")
    return {"enum": constants}


@dataclass(frozen=True, slots=True)
class _Bound:
    """A lower bound: the number that the library is told, the one that it then holds to, and whether it is open."""

    told: Number
    shown: Fraction
    is_open: bool


def _drawn_in(low: Fraction, high: Fraction | None, is_open: bool, is_merged: bool, keyword: str) -> _Bound:
    """Return a lower bound that the library holds exactly to; of an upper one, if everything is mirrored."""
    if low >= _WIDEST:
        raise GrammarError(f"{keyword}: numbers beyond 10^18 are not supported as this bound")
    if low < -_LARGEST:
        return _Bound(-_LARGEST, Fraction(-_LARGEST), is_open=False)
    if (cut := Fraction(math.ceil(low * _FINEST), _FINEST)) != low:
        low, is_open = cut, False
    is_near = low >= 0 and (is_merged or (high is not None and high < low + 1))
    if is_open and low.denominator == 1 and (is_near or abs(low) >= _EXACT):
        digits = _MARGIN_DIGITS
        while high is not None and low + Fraction(1, 10**digits) >= high:
            digits += 3
        low, is_open = low + Fraction(1, 10**digits), False
    double = float(low)
    for _ in range(_NUM_TRIES):
        shown, told = _shown(double), _told(double)
        if abs(double) >= _EXACT:
            shown = min(shown, Fraction(double))  # by which it goes where integers are asked for elsewhere
        if shown >= low and told is not None and (high is None or shown <= high):
            return _Bound(told, shown, is_open and shown == low)
        double = math.nextafter(double, math.inf)
    raise GrammarError(f"{keyword}: no double lies within these bounds")


def _integer_at_least(low: int, keyword: str) -> int:
    """Return the least integer from a bound on that is a double and fits 64 bits."""
    if low > _LARGEST:
        raise GrammarError(f"{keyword}: integers of more than 64 bits are not supported as this bound")
    low = max(low, -_LARGEST)
    double = float(low)
    return int(double) if int(double) >= low else int(math.nextafter(double, math.inf))


def _nothing(asked: Range) -> Node:
    """Return a schema that no number obeys, with the bounds that were asked for if the library sees it by them."""
    low, high = asked.low, asked.high
    assert low is not None and high is not None
    is_plain = low > high and all(bound.denominator == 1 and abs(bound) < _EXACT for bound in (low, high))
    return {"type": "number", "minimum": int(low) if is_plain else 1, "maximum": int(high) if is_plain else 0}


def _beginnings(high: Fraction) -> Iterator[Fraction]:
    """Yield the numbers that an upper bound's digits begin with, after its point."""
    if high <= 0 or high.denominator == 1:
        return
    digits = 10
    while (cut := Fraction(math.floor(high * digits), digits)) != high:
        yield cut
        digits *= 10


def _constant(value: Fraction) -> Number | None:
    """Return a number as the library is to read it; None where it would hold to another one."""
    if abs(value) > _LARGEST_INTEGER:
        return None  # where integers are asked for as well, it would take the largest that it has
    if value.denominator == 1:
        return int(value) if int(float(value)) == value else None
    double = float(value)
    return _told(double) if _shown(double) == value else None


def _coefficient(step: Fraction) -> Number:
    """Return a `multipleOf` that the library takes for this very decimal. Raises GrammarError if none is there."""
    double = float(step)
    for _ in range(_NUM_TRIES):
        double = math.nextafter(double, 0.0)
    for _ in range(2 * _NUM_TRIES):
        double = math.nextafter(double, math.inf)
        if _as_decimal(double) == step and (told := _told(double)) is not None:
            return told
    raise GrammarError("multipleOf: a number with so many digits is not supported")


def _as_decimal(double: float) -> Fraction | None:
    """Return what the library makes of a double: it shifts the point, in doubles, until no fraction is left."""
    digits = 0
    while double % 1.0 != 0.0:
        double, digits = double * 10.0, digits + 1
    return Fraction(int(double), 10**digits) if double <= _MAX_COEFFICIENT else None


def _shown(double: float) -> Fraction:
    """Return the decimal that the library writes for a double: the shortest that reads as it."""
    return Fraction(Decimal(repr(double)))


def _told(double: float) -> Number | None:
    """Return a number that the library reads as a double, however often it writes and reads it; None if it would not.

    Its parser makes of digits a double near what they say, not always the nearest.
    """
    if double.is_integer() and abs(double) < _EXACT:
        return int(double)
    told = Decimal(repr(double))
    # Between two decimals equally near, it may write the other one.
    is_tie = abs(Fraction(double) - Fraction(told)) * 2 == Fraction(10) ** int(told.as_tuple().exponent)
    return told if _read(told) == double and not is_tie else None


def _read(number: Decimal) -> float:
    """Return what the library's parser makes of a number's digits."""
    sign, digits, exponent = number.as_tuple()
    assert isinstance(exponent, int)
    double = float(int("".join(map(str, digits))))
    while exponent < -308:
        double, exponent = double / 1e308, exponent + 308
    double = double * float(f"1e{exponent}") if exponent >= 0 else double / float(f"1e{-exponent}")
    return -double if sign else double


def _range_of(node: Node) -> Range | None:
    """Return what the keywords of a schema say together; None where they are no numbers."""
    values: dict[str, Any] = {key: node[key] for key in KEYWORDS if key in node}
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        # So did draft 4 say it.
        if isinstance(values.get(exclusive), bool):
            if values.pop(exclusive) and bound in values:
                values[exclusive] = values.pop(bound)
    if not all(_is_number(value) for value in values.values()):
        return None
    found = {key: Fraction(value) for key, value in values.items()}
    if any(abs(value) > _GREATEST_DOUBLE for value in found.values()):
        raise GrammarError(f"{next(iter(values))}: the number is out of range")
    step = found.get("multipleOf")
    if step is not None and step <= 0:
        raise GrammarError("multipleOf: must be greater than 0")
    low, is_low_open = _tighter(found.get("minimum"), found.get("exclusiveMinimum"), 1)
    high, is_high_open = _tighter(found.get("maximum"), found.get("exclusiveMaximum"), -1)
    return Range(low, high, is_low_open, is_high_open, step)


def _tighter(closed: Fraction | None, opened: Fraction | None, sign: int) -> tuple[Fraction | None, bool]:
    if closed is None or opened is None:
        return (closed, False) if opened is None else (opened, True)
    return (opened, True) if opened * sign >= closed * sign else (closed, False)


def _filter(node: Node, asked: Range) -> None:
    """Leave of the constants of a schema those in a range."""
    for key in KEYWORDS:
        node.pop(key, None)
    values = [node["const"]] if "const" in node else node["enum"]
    if isinstance(values, list):
        kept = [value for value in values if not _is_number(value) or asked.has(Fraction(value))]
        if "const" not in node:
            node["enum"] = kept
        elif not kept:
            del node["const"]
            node["enum"] = []


def _add_any(node: Node, options: list[Any]) -> None:
    if "anyOf" not in node:
        node["anyOf"] = options
    elif isinstance(node.setdefault("allOf", []), list):
        node["allOf"].append({"anyOf": options})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | Decimal | float) and not isinstance(value, bool)
