"""From the last hidden states of a text's tokens to its one vector.

1. `Pool.add` takes the states chunk by chunk, in order. 2. `Pool.vector` gives the vector: float32, little-endian.

Sums are taken in float64, token after token: a vector has the same bits however its text was cut into chunks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from protocol.readout import Pooling, ReadEmbedding


class Pool:
    """The vector of one text in the making."""

    def __init__(self, readout: ReadEmbedding) -> None:
        self._readout = readout
        self._sum: NDArray[np.float64] | None = None
        self._num_tokens = 0

    def add(self, states: NDArray[np.float32], num_tokens: int | None = None) -> None:
        """Take the states of the next tokens, `[n, hidden_size]`, n > 0.

        `num_tokens` says how many tokens they stand for, where they have been added up before.
        """
        pooling = self._readout.pooling
        if pooling is Pooling.MEAN:
            total = np.zeros(states.shape[1]) if self._sum is None else self._sum
            # One row after another: numpy would add the rows of one call in this order, but not those of two.
            for row in states:
                total = total + row
            self._sum = total
            self._num_tokens += len(states) if num_tokens is None else num_tokens
        elif pooling is Pooling.LAST:
            self._sum, self._num_tokens = states[-1].astype(np.float64), 1
        elif self._sum is None:
            self._sum, self._num_tokens = states[0].astype(np.float64), 1

    def vector(self) -> bytes:
        """Return the vector; states have been added."""
        assert self._sum is not None, "a text has tokens"
        vector = self._sum / self._num_tokens
        if self._readout.normalize and (length := float(np.sqrt(vector @ vector))) > 0:
            vector = vector / length
        return vector.astype("<f4").tobytes()
