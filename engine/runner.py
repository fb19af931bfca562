"""One step: sequences in, sampled tokens out.

On a CPU `Decoder.forward` is one native call; on a GPU it is eager, and a CUDA graph will take its place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch

from engine.batch import BatchItem, build_batch
from engine.kv_cache import KVCache
from engine.sampler import Sampled, SampleInput, sample
from model.decoder import Decoder


class Runner:
    """Runs batches of one worker on its compute thread.

    Args:
        decoder: the model; may be shared with another runner of the same thread.
        kv_cache: the memory that the sequences' block tables index.
    """

    def __init__(self, decoder: Decoder, kv_cache: KVCache) -> None:
        self._decoder = decoder
        self._kv = kv_cache
        self._block_size = kv_cache.fingerprint.block_size

    def step(
        self,
        items: Sequence[BatchItem],
        on_layer: Callable[[int], None] | None = None,
        stops: Collection[int] | None = None,
    ) -> list[Sampled | None]:
        """Compute the KV of every item and sample where logits are wanted.

        Args:
            items: at least one; every position has a block.
            on_layer: called with a layer's index once its keys and values of all items stand in the KV cache.
            stops: the layers that `on_layer` is called for; None for all.

        Returns:
            One entry per item, None where no logits were wanted. Synchronises the device.
        """
        batch = build_batch(items, self._block_size, self._kv.tensor.device)
        with torch.inference_mode():
            logits = self._decoder.forward(batch, self._kv.tensor, on_layer, stops)
            wanted = [item for item in items if item.wants_logits]
            chosen = iter(sample(logits, [_sample_input(item) for item in wanted]) if wanted else [])
        return [next(chosen) if item.wants_logits else None for item in items]


def _sample_input(item: BatchItem) -> SampleInput:
    seq, end = item.sequence, item.start + item.num_tokens
    return SampleInput(seq.sampling, seq.tokens[: seq.num_prompt_tokens], seq.tokens[seq.num_prompt_tokens : end])
