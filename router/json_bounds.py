"""What a body of JSON may hold, found out in one pass each, before and after anything is made of it.

1. `check_size`, before: decoding is one call that nothing interrupts, so that everybody waits for a million lists.
2. `check_unique`, after: readers differ in which of two values of one name they take, and nobody should have to guess.

Both look at marks and strings only, and come back to the interpreter every so often: a thread that runs them lets
others run. Neither says whether a body is valid.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from protocol.errors import InvalidRequest

# Some 15 ms of decoding, whether it is spent on numbers in lists or on lists and names.
MAX_WEIGHT: Final = 1 << 20
HEAVY: Final = 16
_MARK: Final = re.compile(rb'"([^"\\]{0,1024}+)"(\s*+:)?|["{}]')
# At most so many escapes at once, since one match holds up everybody.
_REST_OF_STRING: Final = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+){0,512}+', re.DOTALL)
_SHORT_STRING: Final = re.compile(rb'"[^"\\]{0,256}+"')
_SHORT_STRINGS: Final = re.compile(rb'(?:[^"]*+"[^"\\]{0,256}+"){1,1024}+')
_COLON: Final = re.compile(rb"\s*+:")
# What Python's own decoder is done with at once; it builds it all to say no more than whether a name stands twice.
_SMALL_BYTES: Final = 4096
# More than Python makes a number of.
_TOO_MANY_DIGITS: Final = b"0" * 4301
_DIGITS_ALIKE: Final = bytes(0x30 if 0x30 <= byte <= 0x39 else byte for byte in range(256))


def check_size(body: bytes) -> None:
    """Raise InvalidRequest if decoding would make too many values: an object, list or name weighs HEAVY items."""
    if _weight(body, 0, len(body)) <= MAX_WEIGHT:
        return
    # Strings may hold any number of marks: they do not count.
    weight = at = 0
    while weight <= MAX_WEIGHT and (start := body.find(b'"', at)) >= 0:
        if (run := _SHORT_STRINGS.match(body, at)) is not None:
            marks, at = _SHORT_STRING.sub(b"", run[0]), run.end()
            weight += _weight(marks, 0, len(marks))
        else:
            weight += _weight(body, at, start)
            at = _end_of_string(body, start + 1)
    weight += _weight(body, at, len(body)) if weight <= MAX_WEIGHT else 0
    if weight > MAX_WEIGHT:
        raise InvalidRequest(
            f"the body has too many values: at most {MAX_WEIGHT} list items, of which every object, list and name "
            f"counts as {HEAVY}"
        )


def check_unique(body: bytes) -> None:
    """Raise InvalidRequest if a name stands twice in one object, or a number has no end; the body must be valid."""
    if len(body) > _SMALL_BYTES or not _is_unique(body):
        _check_unique(body)


def _is_unique(body: bytes) -> bool:
    try:
        _DECODER.decode(body.decode())
    except (ValueError, RecursionError):
        return False
    return True


def _object_of(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name stands twice")


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_object_of)


def _check_unique(body: bytes) -> None:
    objects: list[set[bytes]] = []
    at = 0
    while (found := _MARK.search(body, at)) is not None:
        start = found.start()
        if start - at >= len(_TOO_MANY_DIGITS) and _TOO_MANY_DIGITS in body[at:start].translate(_DIGITS_ALIKE):
            raise InvalidRequest("the body has a number with too many digits")
        at = found.end()
        mark = body[start]
        if mark == 0x7B:
            objects.append(set())
        elif mark == 0x7D:
            objects.pop()
        else:
            name, is_name = found[1], found[2] is not None
            if name is None:
                # Long, or with escapes.
                start, at = at, _end_of_string(body, at)
                name, is_name = body[start : at - 1], _COLON.match(body, at) is not None
            if is_name:
                _note(objects[-1], name)


def _note(names: set[bytes], name: bytes) -> None:
    if b"\\" in name:
        name = json.loads(b'"%b"' % name).encode("utf-8", "surrogatepass")
    if name in names:
        raise InvalidRequest(f"{ascii(name.decode('utf-8', 'replace')[:64])} is there twice in one object")
    names.add(name)


def _end_of_string(body: bytes, at: int) -> int:
    """Return where a string is over that has begun before `at`."""
    while True:
        found = _REST_OF_STRING.match(body, at)
        assert found is not None, "it may be empty"
        end = found.end()
        if end >= len(body) or body[end] == 0x22:
            return min(end + 1, len(body))
        if end == at:
            return len(body)
        at = end


def _weight(body: bytes, start: int, end: int) -> int:
    heavy = body.count(b"[", start, end) + body.count(b"{", start, end) + body.count(b":", start, end)
    return body.count(b",", start, end) + HEAVY * heavy
