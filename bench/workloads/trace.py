"""`trace`: recorded arrivals and lengths played again; see `bench/traces.py` for the formats."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Self

from bench.text import Part
from bench.traces import BLOCK_TOKENS, Arrival, read_trace
from bench.workloads.plan import Ask, OpenLoop, Plan, Workload, option, warmup_asks
from protocol.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Trace(Workload):
    """Open loop with the arrivals of a file. Blocks with equal ids become equal text."""

    name: ClassVar[str] = "trace"
    summary: ClassVar[str] = "replay of recorded arrivals and lengths (Azure CSV, Mooncake JSONL)"

    path: Path = field(metadata={"meaning": "the trace's file", "low": 0.0, "is_length": False})
    limit: int = option(500, "requests, from the start of the file", low=1)
    time_scale: float = option(1.0, "times are multiplied by it: 0.5 is twice as fast", low=1e-6)
    length_scale: float = option(1.0, "lengths are multiplied by it", low=1e-6)
    longest_tokens: int = option(0, "leave out requests that are longer, in and out together, once scaled; 0: none")

    def plans(self, seed: int) -> list[Plan]:
        """Return one open loop."""
        stem = self.stem(seed)
        arrivals = self._arrivals()
        uses = Counter(block for arrival in arrivals for block in arrival.hash_ids)
        repeated = {block for block, num_uses in uses.items() if num_uses > 1}
        return [OpenLoop(tuple(self._ask(stem, i, arrival, repeated) for i, arrival in enumerate(arrivals)))]

    def warmup(self, seed: int) -> tuple[Ask, ...]:
        """Return two requests."""
        return warmup_asks(self.stem(seed), 2, 128, 16)

    def scaled(self, scale: float) -> Self:
        """Return the workload with shorter requests."""
        return replace(self, length_scale=self.length_scale / scale)

    def _arrivals(self) -> list[Arrival]:
        kept = []
        for read in read_trace(self.path, self.limit):
            prompt = max(1, round(read.prompt_tokens * self.length_scale))
            output = max(1, round(read.output_tokens * self.length_scale))
            if not self.longest_tokens or prompt + output <= self.longest_tokens:
                kept.append(Arrival(read.at_s * self.time_scale, prompt, output, read.hash_ids))
        if not kept:
            raise ConfigError(f"{self.path}: no request is within --longest-tokens {self.longest_tokens}")
        return kept

    def _ask(self, stem: str, index: int, arrival: Arrival, repeated: set[int]) -> Ask:
        parts = self._blocks(stem, arrival, repeated) if arrival.hash_ids else ()
        parts = parts or (Part(f"{stem} {index}", arrival.prompt_tokens),)
        return Ask(f"{index}", parts, arrival.output_tokens, due_s=arrival.at_s)

    def _blocks(self, stem: str, arrival: Arrival, repeated: set[int]) -> tuple[Part, ...]:
        """Return one part a block. The last one takes what is left, so that the length is exact after rounding."""
        size, left = max(1, round(BLOCK_TOKENS * self.length_scale)), arrival.prompt_tokens
        parts: list[Part] = []
        for i, block in enumerate(arrival.hash_ids):
            is_last = i == len(arrival.hash_ids) - 1 or left <= size
            length = left if is_last else size
            parts.append(Part(f"{stem} block {block}", length, is_shared=block in repeated and not is_last))
            left -= length
            if is_last:
                break
        return tuple(parts)
