"""Recorded arrivals and lengths, read from files that the user names. They hold no text.

| format | looks like | fields |
|---|---|---|
| Azure Public Dataset, LLM inference 2023 and 2024 | CSV with a header | TIMESTAMP, ContextTokens, GeneratedTokens |
| Mooncake, FAST '25 | one JSON object a line | timestamp (ms), input_length, output_length, hash_ids |

A file is recognised by its first line.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Final, TextIO

import msgspec

from protocol.errors import ConfigError

# Mooncake: one id for each 512 tokens of the prompt; equal ids are equal text.
BLOCK_TOKENS: Final = 512
_AZURE_FIELDS: Final = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"}


@dataclass(frozen=True, slots=True)
class Arrival:
    """One recorded request.

    Attributes:
        at_s: seconds since the first one.
        hash_ids: an id for each block of the prompt, the last block cut off at its length; empty where not recorded.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()


class _Line(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def read_trace(path: Path, limit: int | None = None) -> list[Arrival]:
    """Return the first `limit` requests of a trace in order of arrival.

    Raises:
        ConfigError: no such file, neither of the two formats, or a damaged line, which is named.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            if first.lstrip().startswith("{"):
                found = list(islice(_mooncake(file, path), limit))
            elif _AZURE_FIELDS <= set(first.strip().split(",")):
                found = list(islice(_azure(file, path), limit))
            else:
                raise ConfigError(f"{path}: neither an Azure CSV nor a Mooncake JSONL trace")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the trace {path}: {error}") from error
    if not found:
        raise ConfigError(f"{path}: no requests in it")
    begin_s = min(arrival.at_s for arrival in found)
    moved = [Arrival(a.at_s - begin_s, a.prompt_tokens, a.output_tokens, a.hash_ids) for a in found]
    return sorted(moved, key=lambda arrival: arrival.at_s)


def _azure(file: TextIO, path: Path) -> Iterator[Arrival]:
    for number, row in enumerate(csv.DictReader(file), start=2):
        try:
            at = datetime.fromisoformat(row["TIMESTAMP"])
            yield Arrival(_seconds(at), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error


def _seconds(at: datetime) -> float:
    """Return a time as seconds; without a zone it is taken as it stands, whatever the zone of this machine."""
    return (at.replace(tzinfo=None) - datetime(2020, 1, 1)).total_seconds()


def _mooncake(file: TextIO, path: Path) -> Iterator[Arrival]:
    decoder = msgspec.json.Decoder(_Line)
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            read = decoder.decode(line)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
        yield Arrival(read.timestamp / 1e3, read.input_length, read.output_length, read.hash_ids)
