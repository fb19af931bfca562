"""What a stream's writer asks of whoever shapes an answer: chat and completions in one way, responses in another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from protocol.errors import RequestFailed
from router.text import Piece


class Shape(Protocol):
    """Shapes everything that is said about one request.

    Attributes:
        answer_id: what the answer is called.
        num_cached_tokens: prompt tokens whose KV was there already; set before an answer is closed.
        num_output_tokens: tokens so far, of all choices.
    """

    answer_id: str
    num_cached_tokens: int
    num_output_tokens: int

    def prepare(self) -> Iterator[None]:
        """Shape what the answer begins with, if that is much, step by step; before anything else."""
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

    def parts(self, pieces: list[Piece]) -> Iterator[bytes]:
        """Give the whole answer part by part; a part may be empty, and none takes long."""
        ...
