"""What the engine runs: a decoder that takes a batch and returns logits, whichever kernels compute it.

`TorchDecoder` runs anywhere torch does; `NativeDecoder` makes one native call per forward on a CPU.
`model.loader.load_model` chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

import torch
from torch import Tensor

from model.batch import ForwardBatch
from model.config import ModelConfig
from model.weights import LoadSummary


class Decoder(Protocol):
    """A decoder-only transformer over a paged KV cache; holds weights and rotary tables, no sequence state.

    Attributes:
        max_context_tokens: positions below this may be asked for.
        kv_dtype: what its KV cache is made of unless the configuration says otherwise.
        arithmetic: names the numbers it computes with; two decoders whose names are equal give the same tokens.
        backend: one line saying which kernels run and why.
    """

    config: ModelConfig
    load_summary: LoadSummary
    max_context_tokens: int
    device: torch.device
    kv_dtype: torch.dtype
    arithmetic: str
    backend: str

    def kv_shape(self, num_blocks: int, block_size: int) -> tuple[int, ...]:
        """Give the shape of a KV cache for this model: one block of all layers is contiguous."""
        ...

    def forward(
        self,
        batch: ForwardBatch,
        kv_cache: Tensor,
        on_layer: Callable[[int], None] | None = None,
        stops: Collection[int] | None = None,
    ) -> Tensor:
        """Run the batch through the model: writes its KV into `kv_cache`, returns logits `[R, vocab_size]` float32.

        kv_cache has `kv_shape`, on the decoder's device, in any float type of 16 or 32 bits. `on_layer(l)` is called
        in order, from this thread, as soon as layer l's K and V of the whole batch stand in the cache (on a GPU: are
        enqueued on the current stream), for the layers in `stops`, or for all. Row i of the result belongs to row
        `logits_indices[i]` of the batch. Two threads may call it where neither writes a slot that the other reads
        or writes.
        """
        ...

    def forward_states(self, batch: ForwardBatch, kv_cache: Tensor) -> Tensor:
        """Do what `forward` does, but return the last hidden states after the final norm, before the vocabulary.

        `[R, hidden_size]` float32, one row for each of `logits_indices`. The batch is no decode step.
        """
        ...
