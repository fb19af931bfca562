"""The decoder in torch, on any device, through whichever kernels it is given.

One forward, layer by layer:
1. embed the token rows;
2. add what the layer before left, normalise, project to q, k, v (packed);
3. normalise q and k where the model does, rotate, write K and V of every row into their slots, then tell `on_layer`:
   from here that layer's KV may be sent;
4. attend (decode: one row per sequence; prefill: ragged chunks), project;
5. add, normalise, gate and up (packed), SiLU times, down;
6. add, normalise and project to the vocabulary only the rows whose logits are wanted.

The sums of the residual stream are thus taken together with the norm that follows: one kernel instead of two.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference import HeadNorms
from kernels.table import REFERENCE, KernelTable
from model.batch import ForwardBatch
from model.config import ModelConfig
from model.rotary import rotary_tables
from model.weights import DecoderWeights, LayerWeights, LoadSummary


class TorchDecoder:
    """A `model.decoder.Decoder` layer by layer through a `KernelTable`.

    Two forwards may run at once in two threads or on two streams only if neither writes a slot that the other reads or
    writes, and if their kernels share no scratch memory: `with_own_scratch` gives each its own.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        load_summary: LoadSummary,
        max_context_tokens: int,
        reason: str,
        kernels: KernelTable = REFERENCE,
    ) -> None:
        self.config = config
        self.weights = weights
        self.load_summary = load_summary
        self.max_context_tokens = min(max_context_tokens, config.max_context_tokens)
        self.device = weights.embedding.device
        self.dtype = self.kv_dtype = weights.embedding.dtype
        self.arithmetic = weights.arithmetic
        self.backend = f"{kernels.name} operations in {self.arithmetic} ({reason})"
        self.kernels = kernels
        self.rotary = rotary_tables(config, self.max_context_tokens, self.device, weights.rope_factors)
        self._scale = config.head_dim**-0.5
        self._norms = [_head_norms(layer, config.rms_eps) for layer in weights.layers]

    def with_own_scratch(self) -> TorchDecoder:
        """Give a decoder of the same weights whose kernels share no scratch memory with anyone's."""
        other = copy.copy(self)
        other.kernels = self.kernels.fresh()
        return other

    def kv_shape(self, num_blocks: int, block_size: int) -> tuple[int, ...]:
        """Give the shape of a KV cache for this model: one block of all layers is contiguous."""
        c = self.config
        return num_blocks, c.num_layers, 2, c.num_kv_heads, block_size, c.head_dim

    def forward(
        self,
        batch: ForwardBatch,
        kv_cache: Tensor,
        on_layer: Callable[[int], None] | None = None,
        stops: Collection[int] | None = None,
    ) -> Tensor:
        """Run the batch through the model; see `model.decoder.Decoder.forward`.

        The result is an inference tensor: change it in place only under `torch.inference_mode`. With kernels that are
        capturable nothing synchronises; the reference reads slots and lengths on the host.
        """
        with torch.inference_mode():
            normed = self._normed(batch, kv_cache, on_layer, stops)
            linear = self.kernels.decode_linear if batch.is_decode else self.kernels.linear
            return linear(normed, self.weights.lm_head, None).float()

    def forward_states(self, batch: ForwardBatch, kv_cache: Tensor) -> Tensor:
        """Run the batch for its last hidden states; see `model.decoder.Decoder.forward_states`."""
        assert not batch.is_decode
        with torch.inference_mode():
            return self._normed(batch, kv_cache, None, None).float()

    def _normed(
        self,
        batch: ForwardBatch,
        kv_cache: Tensor,
        on_layer: Callable[[int], None] | None,
        stops: Collection[int] | None,
    ) -> Tensor:
        """Return the last hidden states after the final norm, of the wanted rows: in inference mode."""
        eps, kernels = self.config.rms_eps, self.kernels
        residual = F.embedding(batch.token_ids, self.weights.embedding)
        delta: Tensor | None = None
        for index, layer in enumerate(self.weights.layers):
            if delta is None:
                normed = kernels.rms_norm(residual, layer.attention_norm, eps)
            else:
                normed, residual = kernels.add_rms_norm(delta, residual, layer.attention_norm, eps)
            kv_layer = kv_cache[:, index]
            query = self._query_and_store(index, layer, normed, batch, kv_layer)
            if on_layer is not None and (stops is None or index in stops):
                on_layer(index)
            attended = self._attend(query, batch, kv_layer)
            if index == self.config.num_layers - 1 and not batch.is_decode:
                # Nothing after this attention mixes rows: go on with the wanted ones only.
                residual, attended = residual[batch.logits_indices], attended[batch.logits_indices]
            delta, residual = self._finish_layer(layer, residual, attended, batch.is_decode)
        assert delta is not None, "a model has layers"
        normed, _ = kernels.add_rms_norm(delta, residual, self.weights.final_norm, eps)
        return normed

    def _query_and_store(
        self, index: int, layer: LayerWeights, normed: Tensor, batch: ForwardBatch, kv_layer: Tensor
    ) -> Tensor:
        linear = self.kernels.decode_linear if batch.is_decode else self.kernels.linear
        qkv = linear(normed, layer.qkv, layer.qkv_bias)
        return self.kernels.rope_store(
            qkv, batch.positions, self.rotary, kv_layer, batch.slot_mapping, self.config.num_heads, self._norms[index]
        )

    def _attend(self, query: Tensor, batch: ForwardBatch, kv_layer: Tensor) -> Tensor:
        kernels, tables, lengths = self.kernels, batch.block_tables, batch.seq_lens
        if batch.is_decode:
            attended = kernels.paged_decode_attention(query, kv_layer, tables, lengths, self._scale)
        else:
            starts = batch.query_start
            attended = kernels.paged_prefill_attention(query, kv_layer, tables, starts, lengths, self._scale)
        return attended.reshape(query.shape[0], -1)

    def _finish_layer(
        self, layer: LayerWeights, residual: Tensor, attended: Tensor, is_decode: bool
    ) -> tuple[Tensor, Tensor]:
        kernels = self.kernels
        linear = kernels.decode_linear if is_decode else kernels.linear
        linear_silu = kernels.decode_linear_silu if is_decode else kernels.linear_silu
        delta = linear(attended, layer.attention_out, None)
        normed, residual = kernels.add_rms_norm(delta, residual, layer.mlp_norm, self.config.rms_eps)
        return linear(linear_silu(normed, layer.gate_up), layer.down, None), residual


def _head_norms(layer: LayerWeights, eps: float) -> HeadNorms | None:
    if layer.q_norm is None or layer.k_norm is None:
        return None
    return HeadNorms(layer.q_norm, layer.k_norm, eps)
