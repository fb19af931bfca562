"""What a client may call its request: one check for every way in.

A header, a field of a body, a field or the metadata of gRPC: the name comes back in headers, in metadata, in ids of
answers and in lines of the log, and must be fit for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from protocol.errors import InvalidRequest

MAX_REQUEST_ID_CHARS: Final = 128
HEADER: Final = "X-Request-ID"


def is_fit(request_id: str) -> bool:
    """Whether it may name a request."""
    return 0 < len(request_id) <= MAX_REQUEST_ID_CHARS and request_id.isascii() and request_id.isprintable()


def named_in(headers: Mapping[str, str]) -> str | None:
    """Return the name in the headers of a request; one that is not fit counts as none, for proxies add them."""
    given = headers.get(HEADER, "")
    return given if is_fit(given) else None


def check(request_id: str | None) -> str | None:
    """Return the name in the body of a request.

    Raises:
        InvalidRequest: it is not fit.
    """
    if request_id is None or is_fit(request_id):
        return request_id
    raise InvalidRequest(f"request_id: must be 1 to {MAX_REQUEST_ID_CHARS} printable ASCII characters", "request_id")
