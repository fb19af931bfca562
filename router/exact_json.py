"""JSON whose numbers stay what was written: a schema's `0.1` is a tenth, not the double next to it.

Whatever is decoded as plain data (schemas, parameters of functions) holds `Decimal` where the text has a fraction or an
exponent, and integers of any length. `encode` writes them as they were; `as_doubles` is for who knows only floats.
"""

from __future__ import annotations

import threading
from decimal import Decimal, InvalidOperation
from functools import cache
from typing import Any, Final

import msgspec

# Beyond it no double holds a number, or holds nothing but zero.
_MAX_EXPONENT: Final = 308
_MIN_EXPONENT: Final = -324
_encoder: Final = msgspec.json.Encoder(decimal_format="number")
_MAKING: Final = threading.Lock()


@cache
def decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    """Return a decoder for a type, made once; it raises as msgspec's do, and for numbers that no double holds."""
    # msgspec keeps what it knows of a struct on its class before it knows all of it: a second thread would read NULL.
    with _MAKING:
        return msgspec.json.Decoder(kind, float_hook=_number)


def encode(value: Any) -> bytes:
    """Return a value as JSON."""
    return _encoder.encode(value)


def as_doubles(value: Any) -> Any:
    """Return JSON with floats in place of what `decoder` made of them; nesting has a bound."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, dict):
        return {key: as_doubles(item) for key, item in value.items()}
    return [as_doubles(item) for item in value] if isinstance(value, list) else value


def _number(text: str) -> Decimal:
    try:
        value = Decimal(text)
    except InvalidOperation:
        raise ValueError("Number out of range") from None
    if (
        value
        and not _MIN_EXPONENT <= value.adjusted() <= _MAX_EXPONENT
        or float(value) in (float("inf"), -float("inf"))
    ):
        raise ValueError("Number out of range")
    return value
