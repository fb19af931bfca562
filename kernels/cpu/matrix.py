"""A weight matrix as the native library reads it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels.cpu import abi

FORMATS = {"f32": 0, "q8_0": 1, "q4_0": 2, "q4_1": 3}


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A matrix `[rows, cols]` in tiles of sixteen rows (see native/pack.h).

    data: uint8, aligned to 64 bytes; owned here and never changed after packing.
    """

    data: NDArray[np.uint8]
    rows: int
    cols: int
    format: str

    def struct(self) -> abi.Matrix:
        """Describe it for a call; valid while this object lives."""
        return abi.Matrix(self.data.ctypes.data, self.rows, self.cols, FORMATS[self.format], 0)
