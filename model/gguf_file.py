"""Read the header of a GGUF file without touching its weights: metadata, tensor names, shapes, types, offsets.

The `gguf` package reads every vocabulary entry into numpy objects, which takes seconds for a large vocabulary; this
reader skips long arrays (their length is known, their content is decoded on request), so that a worker starts fast.
Layout: magic, version, counts, key-values, tensor infos, then aligned data (GGUF versions 2 and 3, little endian).
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from model.errors import WeightError

MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_DIMENSIONS = 8

Scalar: TypeAlias = int | float | bool | str


@dataclass(frozen=True, slots=True)
class GgufArray:
    """Where an array value lies: element type code, length, first byte; `GgufFile.array` decodes it."""

    element_type: int
    length: int
    offset: int


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: shape in row-major order (rows first), ggml type code, absolute first byte."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int


class GgufFile:
    """A GGUF file, memory-mapped read-only; the map lives as long as this object or any view of it.

    Raises WeightError where the file is no GGUF file, is cut off, or is of another version or byte order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise WeightError(f"{path.name}: cannot be read ({error})") from error
        self._at = 0
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError, KeyError, IndexError) as error:
            raise WeightError(f"{path.name}: damaged GGUF header near byte {self._at}") from error

    metadata: Mapping[str, Scalar | GgufArray]
    tensors: Mapping[str, GgufTensor]
    data_offset: int

    def array(self, key: str) -> list[Scalar]:
        """Decode one array of the metadata; KeyError where there is none of that name."""
        value = self.metadata[key]
        if not isinstance(value, GgufArray):
            raise KeyError(key)
        self._at = value.offset
        return [self._value(value.element_type) for _ in range(value.length)]  # type: ignore[misc]

    def _read_header(self) -> None:
        if self.data[:4] != MAGIC:
            raise WeightError(f"{self.path.name}: not a GGUF file (it starts with {bytes(self.data[:4])!r})")
        self._at = 4
        version = int(self._scalar("I"))
        if version not in (2, 3):
            raise WeightError(f"{self.path.name}: GGUF version {version:#x} is not supported (2 or 3, little endian)")
        num_tensors, num_values = int(self._scalar("Q")), int(self._scalar("Q"))
        metadata: dict[str, Scalar | GgufArray] = {}
        for _ in range(num_values):
            key = self._string()
            metadata[key] = self._value(int(self._scalar("I")))
        self.metadata = metadata
        found = [self._tensor_info() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise WeightError(f"{self.path.name}: general.alignment is {alignment!r}")
        self.data_offset = -(-self._at // alignment) * alignment
        self.tensors = {
            info.name: GgufTensor(info.name, info.shape, info.ggml_type, info.offset + self.data_offset)
            for info in found
        }

    def _tensor_info(self) -> GgufTensor:
        name = self._string()
        num_dimensions = int(self._scalar("I"))
        if num_dimensions > _MAX_DIMENSIONS:
            raise WeightError(f"{self.path.name}: tensor {name!r} claims {num_dimensions} dimensions")
        innermost_first = [int(self._scalar("Q")) for _ in range(num_dimensions)]
        ggml_type, offset = int(self._scalar("I")), int(self._scalar("Q"))
        return GgufTensor(name, tuple(reversed(innermost_first)), ggml_type, offset)

    def _scalar(self, code: str) -> int | float | bool:
        value: int | float | bool = struct.unpack_from("<" + code, self.data, self._at)[0]
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        length = int(self._scalar("Q"))
        start = self._at
        if start + length > len(self.data):
            raise IndexError(length)
        self._at += length
        return self.data[start : self._at].decode()

    def _value(self, kind: int) -> Scalar | GgufArray:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        element_type, length = int(self._scalar("I")), int(self._scalar("Q"))
        array = GgufArray(element_type, length, self._at)
        if element_type == _STRING:
            self._skip_strings(length)
        else:
            self._at += length * struct.calcsize("<" + _SCALARS[element_type])
        return array

    def _skip_strings(self, count: int) -> None:
        unpack, data, at, end = struct.Struct("<Q").unpack_from, self.data, self._at, len(self.data)
        for _ in range(count):
            at += 8 + unpack(data, at)[0]
            if at > end:
                raise IndexError(at)
        self._at = at
