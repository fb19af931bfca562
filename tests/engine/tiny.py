"""A tiny model with random weights, for tests that need real arithmetic and no download."""

from __future__ import annotations

import json
from pathlib import Path

from engine.config import EngineConfig
from engine.loading import LoadedModel, load

TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_model(
    folder: Path, *, num_kv_blocks: int = 64, block_size: int = 8, dummy_seed: int = 0, kernels: str = "auto"
) -> LoadedModel:
    """Load the tiny model on the CPU in float32."""
    path = folder / "config.json"
    path.write_text(json.dumps(TINY_LLAMA))
    config = EngineConfig(
        model=f"dummy:{path}",
        device="cpu",
        block_size=block_size,
        num_kv_blocks=num_kv_blocks,
        dummy_seed=dummy_seed,
        kernels=kernels,
    )
    return load(config, lambda line: None, folder)
