"""Read the key-value header of a GGUF file: what matters here are vocabulary, merges and chat template.

1. Map the file, check magic and version (2 or 3, little endian).
2. Walk the key-value pairs once, decoding every one; tensor infos and weights behind them are never touched.

The `gguf` package makes numpy objects of each vocabulary entry, which takes seconds; this takes a tenth of one.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from protocol.errors import ConfigError

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_U64 = struct.Struct("<Q")


def read_metadata(path: Path) -> dict[str, Any]:
    """Return all key-value pairs of a GGUF file.

    Raises:
        ConfigError: the file cannot be read, is no GGUF file, or is damaged.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data, path.name).pairs()
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {path.name}: cannot be read ({error})") from error
    except (struct.error, KeyError, IndexError) as error:
        raise ConfigError(f"model {path.name}: damaged GGUF header ({error!r})") from error


class _Reader:
    def __init__(self, data: mmap.mmap, name: str) -> None:
        self._data, self._name, self._at = data, name, 0

    def pairs(self) -> dict[str, Any]:
        if self._data[:4] != b"GGUF":
            raise ConfigError(f"model {self._name}: not a GGUF file")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise ConfigError(f"model {self._name}: GGUF version {version} is not supported (2 or 3, little endian)")
        self._at += 8  # number of tensors
        found: dict[str, Any] = {}
        for _ in range(self._scalar("Q")):
            key = self._string().decode()
            found[key] = self._value(self._scalar("I"))
        return found

    def _scalar(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self._data, self._at)[0]
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> bytes:
        start = self._at + 8
        self._at = start + _U64.unpack_from(self._data, self._at)[0]
        if self._at > len(self._data):
            raise IndexError(self._at)
        return self._data[start : self._at]

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string().decode()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        element, length = self._scalar("I"), self._scalar("Q")
        if length > len(self._data):
            raise IndexError(length)
        if element == _STRING:
            return self._strings(length)
        code = f"<{length}{_SCALARS[element]}"
        values = list(struct.unpack_from(code, self._data, self._at))
        self._at += struct.calcsize(code)
        return values

    def _strings(self, length: int) -> list[str]:
        data, at, unpack, end = self._data, self._at, _U64.unpack_from, len(self._data)
        found = []
        for _ in range(length):
            start = at + 8
            at = start + unpack(data, at)[0]
            if at > end:
                raise IndexError(at)
            # Old conversions cut tokens inside a character; such a token is never met in text.
            found.append(data[start:at].decode("utf-8", "replace"))
        self._at = at
        return found
