"""Configuration of a prefill worker."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.config import EngineConfig, ServiceConfig
from kvtransfer.config import TransferConfig
from protocol.errors import ConfigError
from protocol.readout import Pooling

POOLINGS = ("auto", *(str(pooling) for pooling in Pooling))


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """One prefill worker.

    Attributes:
        cache_dir: where downloaded models are kept.
        chunk_tokens: most prompt tokens computed in one step, or None for 256 on a CPU and 2048 on a GPU
            (colocated: 64 and 512).
        max_num_seqs: prompts held at once, computing or waiting for their KV to land.
        num_layer_groups: pushes that the layers of a large chunk are split into, so that sending overlaps computing.
        layer_push_min_tokens: smaller chunks are pushed whole: splitting them costs more than it hides.
        num_sms: multiprocessors of a GPU that prefill is confined to beside the decode worker of the same process,
            which then has all others to itself; 0 does not divide them.
        pooling: of embeddings: "auto" for what the model's files say, else mean, last or cls (encoders only).
    """

    engine: EngineConfig
    service: ServiceConfig
    transfer: TransferConfig
    cache_dir: Path
    chunk_tokens: int | None = None
    max_num_seqs: int = 256
    num_layer_groups: int = 3
    layer_push_min_tokens: int = 128
    num_sms: int = 0
    pooling: str = "auto"

    def __post_init__(self) -> None:
        for name in ("chunk_tokens", "max_num_seqs", "num_layer_groups", "layer_push_min_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"prefill {name} must be at least 1, got {value}")
        if self.pooling not in POOLINGS:
            raise ConfigError(f"pooling must be one of {', '.join(POOLINGS)}; got {self.pooling!r}")
        if self.num_sms < 0:
            raise ConfigError(f"prefill num_sms must not be negative, got {self.num_sms}")
