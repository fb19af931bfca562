"""From configuration to a loaded encoder, and what its worker registers as."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.loading import device_of, load_options
from model.encoder import Encoder, load_encoder
from model.encoder_config import is_encoder, read_embedding_settings
from model.errors import ModelError
from model.identity import model_hash
from model.source import resolve
from protocol.errors import ConfigError
from protocol.kv_layout import KVFingerprint
from protocol.readout import EmbeddingCard, Pooling


@dataclass(frozen=True, slots=True)
class LoadedEncoder:
    """An encoder ready to run.

    Attributes:
        fingerprint: of the model; it has no KV, the block size only names its layout.
        max_tokens: of a text, its frame included.
    """

    encoder: Encoder
    fingerprint: KVFingerprint
    card: EmbeddingCard
    max_tokens: int
    backend: str


def is_encoder_model(config: EngineConfig, cache_dir: Path) -> bool:
    """Tell whether a model only embeds; raises ConfigError where it cannot be found or read."""
    try:
        return is_encoder(resolve(config.model, cache_dir, lambda _: None))
    except ModelError as error:
        raise ConfigError(str(error)) from error


def load_embedder(config: EngineConfig, pooling: str, say: Callable[[str], None], cache_dir: Path) -> LoadedEncoder:
    """Load an encoder.

    Args:
        config: what to load and where.
        pooling: "auto" for what the model's files say, or a `Pooling`.
        say: takes one progress line.
        cache_dir: where downloads are kept.

    Raises:
        ConfigError: model, device or options cannot be used.
    """
    torch.set_num_threads(config.num_threads)
    device = device_of(config.device)
    try:
        files = resolve(config.model, cache_dir, say)
        encoder = load_encoder(files, load_options(config, str(device)))
        settings = read_embedding_settings(files, encoder.config.max_position, "mean")
        name = model_hash(files, config.dummy_seed)
    except ModelError as error:
        raise ConfigError(str(error)) from error
    if config.max_model_len is not None and config.max_model_len > encoder.config.max_position:
        raise ConfigError(
            f"max_model_len: {config.max_model_len} tokens exceed the model's {encoder.config.max_position} positions"
        )
    say(f"loaded {encoder.load_summary}; {encoder.backend}")
    shape = encoder.config
    fingerprint = KVFingerprint(
        model_hash=name,
        dtype=encoder.arithmetic,
        block_size=config.block_size,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_heads,
        head_dim=shape.head_dim,
        arithmetic=encoder.arithmetic,
        device=device.type,
    )
    chosen = Pooling(settings.pooling if pooling == "auto" else pooling)
    card = EmbeddingCard(size=shape.hidden_size, pooling=chosen, normalize=settings.is_normalized, is_encoder=True)
    max_tokens = config.max_model_len or settings.max_tokens
    return LoadedEncoder(encoder, fingerprint, card, max_tokens, f"{device}: {encoder.backend}")
