"""The decoder in plain torch operations, on any device.

One forward, layer by layer:
1. embed the token rows;
2. normalise, project to q, k, v (packed), normalise q and k where the model does, rotate;
3. write K and V of every row into their slots, then tell `on_layer`: from here that layer's KV may be sent;
4. attend (decode: one row per sequence; prefill: ragged chunks), project, add;
5. normalise, gate and up (packed), SiLU times, down, add;
6. normalise and project to the vocabulary only the rows whose logits are wanted.
"""

from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import ops
from model.batch import ForwardBatch
from model.config import ModelConfig
from model.rotary import rotary_tables
from model.weights import DecoderWeights, LayerWeights, LoadSummary


class TorchDecoder:
    """A `model.decoder.Decoder` layer by layer through `kernels.ops`.

    Two forwards may run at once in two threads only if neither writes a slot that the other reads or writes.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        load_summary: LoadSummary,
        max_context_tokens: int,
        reason: str,
    ) -> None:
        self.config = config
        self.weights = weights
        self.load_summary = load_summary
        self.max_context_tokens = min(max_context_tokens, config.max_context_tokens)
        self.device = weights.embedding.device
        self.dtype = self.kv_dtype = weights.embedding.dtype
        self.arithmetic = str(self.dtype).removeprefix("torch.")
        self.backend = f"torch operations in {self.arithmetic} ({reason})"
        tables = rotary_tables(config, self.max_context_tokens, self.device, weights.rope_factors)
        self._cos, self._sin = tables
        self._scale = config.head_dim**-0.5

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

        The result is an inference tensor: change it in place only under `torch.inference_mode`. On a GPU the
        reference kernels read slots and lengths on the host, so that each layer synchronises.
        """
        with torch.inference_mode():
            hidden = F.embedding(batch.token_ids, self.weights.embedding)
            for index, layer in enumerate(self.weights.layers):
                kv_layer = kv_cache[:, index]
                query = self._query_and_store(layer, hidden, batch, kv_layer)
                if on_layer is not None and (stops is None or index in stops):
                    on_layer(index)
                attended = self._attend(query, batch, kv_layer)
                if index == self.config.num_layers - 1:
                    # Nothing after this attention mixes rows: go on with the wanted ones only.
                    hidden, attended = hidden[batch.logits_indices], attended[batch.logits_indices]
                hidden = self._finish_layer(layer, hidden, attended)
            hidden = ops.rms_norm(hidden, self.weights.final_norm, self.config.rms_eps)
            return F.linear(hidden, self.weights.lm_head).float()

    def _query_and_store(self, layer: LayerWeights, hidden: Tensor, batch: ForwardBatch, kv_layer: Tensor) -> Tensor:
        c = self.config
        normed = ops.rms_norm(hidden, layer.attention_norm, c.rms_eps)
        qkv = F.linear(normed, layer.qkv, layer.qkv_bias).view(hidden.shape[0], -1, c.head_dim)
        query, key, value = torch.split(qkv, [c.num_heads, c.num_kv_heads, c.num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            query = ops.rms_norm(query, layer.q_norm, c.rms_eps)
            key = ops.rms_norm(key, layer.k_norm, c.rms_eps)
        query, key = ops.rope(query, key, batch.positions, self._cos, self._sin)
        ops.store_kv(key, value, kv_layer, batch.slot_mapping)
        return query

    def _attend(self, query: Tensor, batch: ForwardBatch, kv_layer: Tensor) -> Tensor:
        tables, lengths = batch.block_tables, batch.seq_lens
        if batch.is_decode:
            attended = ops.paged_decode_attention(query, kv_layer, tables, lengths, self._scale)
        else:
            attended = ops.paged_prefill_attention(query, kv_layer, tables, batch.query_start, lengths, self._scale)
        return attended.reshape(query.shape[0], -1)

    def _finish_layer(self, layer: LayerWeights, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + F.linear(attended, layer.attention_out)
        normed = ops.rms_norm(hidden, layer.mlp_norm, self.config.rms_eps)
        return hidden + F.linear(ops.silu_mul(F.linear(normed, layer.gate_up)), layer.down)
