"""The parallel lists of a completion's log probabilities as JSON, made a few tokens at a time.

Large answers are shaped in slices (router/slices.py): of a hundred thousand values no one call may make all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Final, TypeVar

import msgspec

# Each with as many as MAX_LOGPROBS beside it: some 0.3 ms.
STEP_TOKENS: Final = 16
# In the order of `CompletionLogprobs`.
_NAMES: Final = ("text_offset", "token_logprobs", "tokens", "top_logprobs")
_encode: Final = msgspec.json.Encoder().encode

Item = TypeVar("Item")


class LogprobLists:
    """Grows by some tokens at a time; `raw` is the JSON of the whole."""

    def __init__(self) -> None:
        self._lists: tuple[list[bytes], ...] = tuple([] for _ in _NAMES)

    def add(
        self,
        offsets: Sequence[int],
        logprobs: Sequence[float | None],
        tokens: Sequence[str],
        top: Sequence[Mapping[str, float] | None],
    ) -> None:
        """Append tokens: parallel lists, none of them empty."""
        for found, values in zip(self._lists, (offsets, logprobs, tokens, top), strict=True):
            found.append(_encode(values)[1:-1])

    def raw(self, *before: LogprobLists) -> msgspec.Raw:
        """Return the object with all lists, behind those of what comes before."""
        out: list[bytes] = []
        for place, name in enumerate(_NAMES):
            inner = [values for one in (*before, self) for values in one._lists[place]]
            out += [b',"' if place else b'{"', name.encode(), b'":[', b",".join(inner), b"]"]
        return msgspec.Raw(b"".join([*out, b"}"]))


def batches(items: Iterable[Item], size: int = STEP_TOKENS) -> Iterator[list[Item]]:
    """Cut items into lists of at most so many."""
    left = iter(items)
    while found := list(islice(left, size)):
        yield found


def raw_list(parts: Sequence[bytes]) -> msgspec.Raw:
    """Return a JSON list of what has been encoded: each part is a list without its brackets."""
    return msgspec.Raw(b"[" + b",".join(parts) + b"]")


def raw_items(items: Sequence[object]) -> bytes:
    """Return items as a JSON list without its brackets."""
    return _encode(items)[1:-1]
