"""What other front ends say, written as the body that HTTP would have brought, so that one set of types checks it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from protocol.errors import InvalidRequest
from router.responses import encode_json


def body_of_fields(fields: Mapping[str, Any]) -> bytes:
    """Return fields as a body of JSON.

    Raises:
        InvalidRequest: a value has no form in JSON: not finite, too large, not text, of another type; names the field.
    """
    for name, value in fields.items():
        numbers = value.values() if isinstance(value, Mapping) else (value,)
        # JSON would say null, and null is the default.
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise InvalidRequest(f"{name}: must be finite", name)
    try:
        return encode_json(fields)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        bad = next((name for name, value in fields.items() if not _is_json(value)), None)
        raise InvalidRequest(f"{bad}: {error}", bad) from error


def _is_json(value: Any) -> bool:
    try:
        encode_json(value)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return False
    return True
