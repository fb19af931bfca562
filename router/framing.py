"""Where a body ends, and what it is packed in: what a request may say about it, so that no two readers differ.

aiohttp's parser (llhttp, strict) refuses what is malformed: bare line feeds, blanks before a colon, folded lines, two
lengths, a length beside chunks. Here is what it takes and a proxy may read in another way, or unpack.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from aiohttp import HttpVersion11
from aiohttp.web_request import BaseRequest

_EXPECTED: Final = "100-continue"


class Refusal(NamedTuple):
    """Why a request is not read: the status of its answer, and the reason in words."""

    status: int
    reason: str


def refusal_of(request: BaseRequest) -> Refusal | None:
    """Return why a request is not read by its head; None if it is. After a refusal nobody knows where its body ends."""
    headers = request.headers
    if "Transfer-Encoding" in headers:
        codings = headers.getall("Transfer-Encoding")
        # Lowered only as ASCII: there are other letters whose lower case is one of these.
        if len(codings) > 1 or not codings[0].isascii() or codings[0].lower() != "chunked":
            return Refusal(400, "Transfer-Encoding: only chunked is taken, once")
        if request.version < HttpVersion11:
            return Refusal(400, "Transfer-Encoding: HTTP/1.0 has none")
    if "Content-Encoding" in headers:
        codings = headers.getall("Content-Encoding")
        if len(codings) > 1 or codings[0].lower() not in ("identity", ""):
            return Refusal(415, "send the body as it is: compressed bodies are not taken")
    if "Expect" in headers and request.version >= HttpVersion11:
        expected = headers.getall("Expect")
        if len(expected) > 1 or expected[0].lower() != _EXPECTED:
            return Refusal(417, f"Expect: only {_EXPECTED} can be met")
    return None
