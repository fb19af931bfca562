"""Small models with random weights for a GPU, and both steppers over the runners that a GPU gets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from decode.scheduler import DecodeScheduler
from decode.stepper import DecodeStepper
from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.execution import open_batch_runner, open_decode_runner
from engine.kv_cache import KVCache
from engine.loading import LoadedModel, load
from prefill.scheduler import PrefillScheduler
from prefill.stepper import PrefillStepper, layer_groups
from tests.decode.pair import Pair

BLOCK = 16
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 5003,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN3: dict[str, Any] = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "num_attention_heads": 4}


def gpu_model(folder: Path, shape: dict[str, Any], **options: Any) -> LoadedModel:
    """Load a model with random weights onto the GPU."""
    path = folder / "config.json"
    path.write_text(json.dumps(shape))
    given: dict[str, Any] = {"num_kv_blocks": 2000, "block_size": BLOCK, "device": "cuda"} | options
    return load(EngineConfig(model=f"dummy:{path}", **given), lambda line: None, folder)


class DevicePair(Pair):
    """Prefill and decode steppers as the two workers of a GPU have them, each with a KV cache of its own.

    Args:
        prefill_model: what prompts are computed with where that is not the GPU: the KV goes through the host.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        eager: bool = False,
        max_lanes: int = 64,
        prefill_model: LoadedModel | None = None,
    ) -> None:
        super().__init__(model)
        self.said: list[str] = []
        size = model.fingerprint.block_size
        self.decode_pool = BlockPool(model.num_blocks)
        self.decode_kv = KVCache(model.fingerprint, model.num_blocks, model.device)
        chosen = replace(model, enforce_eager=eager)
        self.runner = open_decode_runner(chosen, self.decode_kv, max_lanes, self.said.append)
        scheduler = DecodeScheduler(
            self.decode_pool, size, max_lanes, 0, model.max_model_len, self.runner.growth_blocks
        )
        self.decode = DecodeStepper(self.runner, self.decode_pool, scheduler, self.from_decode.append)
        computing = prefill_model or model
        computing.fingerprint.require_equal(model.fingerprint, "the prefill side")
        self.prefill_kv = KVCache(computing.fingerprint, computing.num_blocks, computing.device)
        pool = BlockPool(computing.num_blocks)
        self.prefill = PrefillStepper(
            open_batch_runner(computing, self.prefill_kv),
            pool,
            PrefillScheduler(pool, size, 512),
            self.from_prefill.append,
            block_size=size,
            layer_groups=layer_groups(model.fingerprint.num_layers, 2),
            layer_push_min_tokens=64,
            max_model_len=model.max_model_len,
        )
