"""Weight matrices as the native library reads them, and packing them from GGUF blocks or floats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels.cpu.huge_pages import huge_bytes
from kernels.cpu.matrix import FORMATS, PackedMatrix
from kernels.cpu.native import NativeLibrary, check
from kernels.quantized import GROUP, QuantizedRows

_CACHE_LINE = 64
_ARENA_BYTES = 32 << 20


class WeightMemory:
    """Memory for packed matrices, side by side on huge pages where the system gives them.

    A step reads every weight once: with pages of 4 KiB the processor's address tables and prefetchers start anew tens
    of thousands of times. Freed when the last matrix in it is.
    """

    def __init__(self) -> None:
        self._rest: NDArray[np.uint8] = np.empty(0, np.uint8)

    def take(self, num_bytes: int) -> NDArray[np.uint8]:
        """Return zeroed bytes that begin on a cache line."""
        rounded = -(-num_bytes // _CACHE_LINE) * _CACHE_LINE
        if rounded > self._rest.nbytes:
            self._rest = huge_bytes(max(rounded, _ARENA_BYTES))
        taken, self._rest = self._rest[:num_bytes], self._rest[rounded:]
        return taken


@dataclass(frozen=True, slots=True)
class FloatRows:
    """Rows to pack: values `[n, cols]` float32, C-contiguous."""

    values: NDArray[np.float32]


def pack(
    library: NativeLibrary,
    parts: Sequence[FloatRows | QuantizedRows],
    format_name: str,
    memory: WeightMemory | None = None,
) -> PackedMatrix:
    """Stack parts of equal width under each other and pack them.

    Args:
        library: does the work.
        parts: quantised rows must be of `format_name` already and are taken over bit by bit; float rows are quantised
            to it where it is not "f32".
        format_name: one of `FORMATS`.
        memory: where it will stand; None for a place of its own.
    """
    cols = _cols(parts[0])
    rows = sum(_num_rows(part) for part in parts)
    if format_name != "f32" and cols % GROUP:
        raise ValueError(f"{format_name}: rows of {cols} weights do not divide into groups of {GROUP}")
    code = FORMATS[format_name]
    functions = library.functions
    data = (memory or WeightMemory()).take(int(functions.baton_packed_bytes(code, rows, cols)))
    first = 0
    for part in parts:
        num_rows = _num_rows(part)
        assert _cols(part) == cols
        if isinstance(part, QuantizedRows):
            assert part.format == format_name, (part.format, format_name)
            order = part.order.ctypes.data if part.order is not None else None
            assert part.blocks.flags.c_contiguous
            source = part.blocks.ctypes.data
            check(functions.baton_pack_blocks(code, source, order, first, num_rows, cols, data.ctypes.data))
        else:
            assert part.values.flags.c_contiguous
            source = part.values.ctypes.data
            check(functions.baton_pack_floats(code, source, None, first, num_rows, cols, data.ctypes.data))
        first += num_rows
    return PackedMatrix(data, rows, cols, format_name)


def _num_rows(part: FloatRows | QuantizedRows) -> int:
    return int(part.values.shape[0]) if isinstance(part, FloatRows) else int(part.blocks.shape[0])


def _cols(part: FloatRows | QuantizedRows) -> int:
    return int(part.values.shape[1]) if isinstance(part, FloatRows) else part.cols
