"""Configuration of a decode worker."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.config import EngineConfig, ServiceConfig
from kvtransfer.config import TransferConfig
from protocol.errors import ConfigError


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """One decode worker.

    Attributes:
        cache_dir: where downloaded models are kept.
        max_num_seqs: sequences held at once, running or awaiting their KV.
        watermark_blocks: blocks kept back from new sequences so that running ones can grow before any is preempted.
    """

    engine: EngineConfig
    service: ServiceConfig
    transfer: TransferConfig
    cache_dir: Path
    max_num_seqs: int = 64
    watermark_blocks: int = 8

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1 or self.watermark_blocks < 0:
            raise ConfigError("decode max_num_seqs must be at least 1 and watermark_blocks not negative")
