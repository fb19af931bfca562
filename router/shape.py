"""What a stream's writer asks of whoever shapes an answer: chat and completions in one way, responses in another."""

from __future__ import annotations

from typing import Protocol

from protocol.errors import RequestFailed
from router.text import Piece


class Shape(Protocol):
    """Shapes everything that is said about one request.

    Attributes:
        answer_id: what the answer is called.
        num_cached_tokens: prompt tokens whose KV was there already; set before an answer is closed.
    """

    answer_id: str
    num_cached_tokens: int

    @property
    def num_output_tokens(self) -> int:
        """Tokens so far, of all choices."""
        ...

    def chunk(self, index: int, piece: Piece) -> bytes:
        """Return the events for a piece of a choice; empty while there is nothing to show for it."""
        ...

    def closing(self) -> bytes:
        """Return the last events of a stream."""
        ...

    def failure(self, error: RequestFailed) -> bytes:
        """Return the event that ends a stream which has begun and cannot go on."""
        ...

    def answer(self, pieces: list[Piece]) -> bytes:
        """Return the whole answer; `pieces` holds each choice whole."""
        ...
