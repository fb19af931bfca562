"""What a prompt is computed for besides generation, and what is read off it. Readouts never reach a decode worker.

    ReadLabels     the probabilities of some tokens after the prompt          Readings.labels
    ReadPrompt     the probability of every prompt token after those before   Readings.prompt
    ReadEmbedding  one vector for the whole prompt                            Readings.embedding

All of them are idempotent: what is lost with a worker is read again elsewhere, with the same result.
Probabilities are of the model's own distribution over its whole vocabulary, as natural logarithms. Arrays are
little-endian: float32 and int32.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Annotated, Any, Final

import msgspec

from protocol.request import MAX_LOGPROBS, TokenId, TokenLogprobs

MAX_LABELS: Final = 1024
MAX_EMBEDDING_FLOATS: Final = 1 << 14
# Of the values of one prompt, each a float32 and an int32: 2 MiB, a quarter of a message.
MAX_PROMPT_VALUES: Final = 1 << 18
_PIECE_BYTES: Final = 1 << 15

PieceBytes = Annotated[bytes, msgspec.Meta(max_length=_PIECE_BYTES)]
Pieces = Annotated[tuple[PieceBytes, ...], msgspec.Meta(max_length=4 * MAX_PROMPT_VALUES // _PIECE_BYTES)]


class Pooling(StrEnum):
    """How the vectors of a prompt's tokens become one."""

    MEAN = "mean"
    LAST = "last"
    CLS = "cls"


class ReadLabels(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="labels"):
    """The log probabilities of these tokens after the last one of the prompt, which may come from the prefix cache."""

    token_ids: Annotated[tuple[TokenId, ...], msgspec.Meta(min_length=1, max_length=MAX_LABELS)]


class ReadPrompt(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="prompt"):
    """The log probability of each prompt token but the first, after those before it, and the likeliest ones there.

    Every row of the prompt is computed: a cached block holds no logits.
    """

    num_top: Annotated[int, msgspec.Meta(ge=0, le=MAX_LOGPROBS)] = 0


class ReadEmbedding(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="embedding"):
    """One vector: the mean over all tokens' last hidden states, the last or the first token's; of length 1 if asked.

    The first one's ("cls") means something in encoders alone, where it has seen the whole text.
    """

    pooling: Pooling
    normalize: bool = True


class EmbeddingCard(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says of the vectors it gives.

    Attributes:
        size: floats of a vector.
        pooling, normalize: what its model was trained for, or its user chose.
        is_encoder: it does nothing else: no decode worker stands beside it, and no token can be had.
    """

    size: Annotated[int, msgspec.Meta(ge=1, le=MAX_EMBEDDING_FLOATS)]
    pooling: Pooling
    normalize: bool = True
    is_encoder: bool = False


Readout = ReadLabels | ReadPrompt | ReadEmbedding


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """What `ReadPrompt` found, a row for each token but the first; pieces only bound what is allocated at once.

    Attributes:
        num_top: of the likeliest tokens of each row, at most as many as were asked for.
        values: float32, row by row: the token's log probability, then those of the likeliest, descending.
        integers: int32, row by row: the token's rank (1 is the likeliest), then the ids of the likeliest.
    """

    num_top: Annotated[int, msgspec.Meta(ge=0, le=MAX_LOGPROBS)]
    values: Pieces
    integers: Pieces

    @classmethod
    def of(cls, num_top: int, values: bytes, integers: bytes) -> PromptLogprobs:
        """Cut whole arrays, of at most MAX_PROMPT_VALUES each, into pieces."""
        return cls(num_top, _cut(values), _cut(integers))

    def rows(self) -> list[TokenLogprobs]:
        """Return the rows; raises ValueError where the arrays do not fit each other."""
        return list(self.each_row())

    def each_row(self) -> Iterator[TokenLogprobs]:
        """Give one row after the other, each made when it is asked for; raises as `rows`."""
        width = 1 + self.num_top
        values, integers = _array("f", b"".join(self.values)), _array("i", b"".join(self.integers))
        if len(values) != len(integers) or len(values) % width:
            raise ValueError(f"{len(values)} values and {len(integers)} integers in rows of {width}")
        for at in range(0, len(values), width):
            end = at + width
            top = tuple(zip(integers[at + 1 : end], values[at + 1 : end], strict=True))
            yield TokenLogprobs(values[at], top, integers[at])

    @property
    def num_rows(self) -> int:
        """How many rows there are, if the arrays fit each other."""
        return sum(map(len, self.values)) // (4 * (1 + self.num_top))


def does_answer(
    readout: Readout,
    num_prompt_tokens: int,
    labels: Sequence[float],
    prompt: PromptLogprobs | None,
    embedding: bytes,
) -> bool:
    """Tell whether what a worker sent is what was asked for, in number and kind."""
    if isinstance(readout, ReadLabels):
        return len(labels) == len(readout.token_ids) and not any(map(math.isnan, labels))
    if isinstance(readout, ReadPrompt):
        return prompt is not None and prompt.num_rows == num_prompt_tokens - 1 and _fits(prompt)
    return len(embedding) > 0 and len(embedding) % 4 == 0


def reads_cache(readout: Readout | None) -> bool:
    """Tell whether leading blocks of a prompt may come from the prefix cache: they hold no logits and no states."""
    if isinstance(readout, ReadEmbedding):
        return readout.pooling is Pooling.LAST
    return not isinstance(readout, ReadPrompt)


def floats_of(data: bytes) -> list[float]:
    """Return little-endian float32 as numbers."""
    return _array("f", data).tolist()


def _array(kind: str, data: bytes) -> array[Any]:
    found = array(kind, data)
    if sys.byteorder == "big":
        found.byteswap()
    return found


def _fits(prompt: PromptLogprobs) -> bool:
    sizes = [sum(map(len, pieces)) for pieces in (prompt.values, prompt.integers)]
    return sizes[0] == sizes[1] == 4 * (1 + prompt.num_top) * prompt.num_rows


def _cut(data: bytes) -> tuple[bytes, ...]:
    return tuple(data[at : at + _PIECE_BYTES] for at in range(0, len(data), _PIECE_BYTES))
