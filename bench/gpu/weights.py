"""Random weights made where they are used: sixteen gigabytes in a second or two, where a CPU would take minutes."""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import ModelConfig
from model.weights import DecoderWeights, LayerWeights


def make_weights(config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int = 0) -> DecoderWeights:
    """Draw every tensor of a model on the device: matrices normal(0, 1/fan_in), norms near 1."""
    maker = _Maker(config, dtype, device, seed)
    embedding = maker.matrix(config.vocab_size, config.hidden_size)
    lm_head = embedding if config.tie_embeddings else maker.matrix(config.vocab_size, config.hidden_size)
    layers = tuple(maker.layer() for _ in range(config.num_layers))
    return DecoderWeights(embedding, layers, maker.norm(config.hidden_size), lm_head, None)


class _Maker:
    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self._config, self._dtype, self._device = config, dtype, device
        self._generator = torch.Generator(device).manual_seed(seed)

    def matrix(self, outputs: int, inputs: int) -> Tensor:
        return self._empty(outputs, inputs).normal_(0.0, inputs**-0.5, generator=self._generator)

    def norm(self, size: int) -> Tensor:
        return self._empty(size).normal_(1.0, 0.02, generator=self._generator)

    def layer(self) -> LayerWeights:
        c = self._config
        query_rows, kv_rows = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        return LayerWeights(
            attention_norm=self.norm(c.hidden_size),
            qkv=self.matrix(query_rows + 2 * kv_rows, c.hidden_size),
            qkv_bias=self.norm(query_rows + 2 * kv_rows) if c.qkv_bias else None,
            q_norm=self.norm(c.head_dim) if c.qk_norm else None,
            k_norm=self.norm(c.head_dim) if c.qk_norm else None,
            attention_out=self.matrix(c.hidden_size, query_rows),
            mlp_norm=self.norm(c.hidden_size),
            gate_up=self.matrix(2 * c.intermediate_size, c.hidden_size),
            down=self.matrix(c.hidden_size, c.intermediate_size),
        )

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=self._dtype, device=self._device)
