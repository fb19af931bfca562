"""One forward of any sequences, whole prompts or chunks of them, and the tokens that follow.

    launch(items) ─► LaunchedBatch ── is_done() ──► results(), one per item

`Runner` computes in `launch` and samples on the host. `DeviceRunner` only enqueues, samples on the device, and lets a
second batch be launched behind the first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.batch import BatchItem, build_batch
from engine.device_queue import PASSED, DeviceQueue, Mark
from engine.device_sampler import FetchedSamples, sample_on_device
from engine.kv_cache import KVCache
from engine.sampler import Sampled, SampleInput, sample
from model.decoder import Decoder
from model.torch_decoder import TorchDecoder

OnLayer = Callable[[int], None]


class LaunchedBatch(Protocol):
    """A batch that is being computed."""

    def is_done(self) -> bool:
        """Whether `results` would return at once."""
        ...

    def results(self) -> list[Sampled | None]:
        """Wait for the batch and return one entry per item, None where no logits were wanted."""
        ...


class BatchRunner(Protocol):
    """Runs batches of one worker on its compute thread.

    Attributes:
        depth: batches that may be launched and not done.
    """

    depth: int

    def launch(
        self, items: Sequence[BatchItem], on_layer: OnLayer | None = None, stops: Collection[int] | None = None
    ) -> LaunchedBatch:
        """Compute the KV of every item and sample where logits are wanted.

        Args:
            items: at least one; every position has a block.
            on_layer: called, before this returns, with a layer's index once its keys and values of all items stand in
                the KV cache, or are enqueued: `mark` then tells when they stand there.
            stops: the layers that `on_layer` is called for; None for all.
        """
        ...

    def mark(self) -> Mark:
        """Mark the end of what is launched so far, within `on_layer` too."""
        ...


@dataclass(frozen=True, slots=True)
class _Done:
    samples: list[Sampled | None]

    def is_done(self) -> bool:
        return True

    def results(self) -> list[Sampled | None]:
        return self.samples


class Runner:
    """A `BatchRunner` that computes at once; `step` does the same and returns the samples.

    Args:
        decoder: the model; may be shared with another runner of the same thread.
        kv_cache: the memory that the sequences' block tables index.
    """

    depth = 1

    def __init__(self, decoder: Decoder, kv_cache: KVCache) -> None:
        self._decoder = decoder
        self._kv = kv_cache
        self._block_size = kv_cache.fingerprint.block_size

    def launch(
        self, items: Sequence[BatchItem], on_layer: OnLayer | None = None, stops: Collection[int] | None = None
    ) -> LaunchedBatch:
        """Compute; see `BatchRunner.launch`."""
        return _Done(self.step(items, on_layer, stops))

    def mark(self) -> Mark:
        """Return a mark that is passed: everything is done when a call returns."""
        return PASSED

    def step(
        self, items: Sequence[BatchItem], on_layer: OnLayer | None = None, stops: Collection[int] | None = None
    ) -> list[Sampled | None]:
        """Compute and return one entry per item; see `BatchRunner.launch`. Synchronises the device."""
        batch = build_batch(items, self._block_size, lambda array: torch.from_numpy(array).to(self._kv.tensor.device))
        with torch.inference_mode():
            logits = self._decoder.forward(batch, self._kv.tensor, on_layer, stops)
            wanted = [item for item in items if item.wants_logits]
            chosen = iter(sample(logits, [_sample_input(item) for item in wanted]) if wanted else [])
        return [next(chosen) if item.wants_logits else None for item in items]


class DeviceRunner:
    """A `BatchRunner` whose batches run behind the host, in the order of a queue.

    Args:
        decoder: its kernels must not be in use on another queue.
        queue: where batches run.
    """

    depth = 2

    def __init__(self, decoder: TorchDecoder, kv_cache: KVCache, queue: DeviceQueue) -> None:
        self._decoder = decoder
        self._kv = kv_cache
        self._block_size = kv_cache.fingerprint.block_size
        self._queue = queue

    def launch(
        self, items: Sequence[BatchItem], on_layer: OnLayer | None = None, stops: Collection[int] | None = None
    ) -> LaunchedBatch:
        """Enqueue; see `BatchRunner.launch`. Does not wait for the device."""
        # Never as a decode batch, however short the chunks: a row's bits must not depend on its company.
        batch = build_batch(items, self._block_size, self._queue.upload, may_decode=False)
        wanted = [_sample_input(item) for item in items if item.wants_logits]
        with self._queue.active(), torch.inference_mode():
            logits = self._decoder.forward(batch, self._kv.tensor, on_layer and _outside_inference(on_layer), stops)
        samples = sample_on_device(logits, wanted, self._decoder.kernels, self._queue) if wanted else None
        return _Enqueued([item.wants_logits for item in items], samples, self._queue.mark())

    def mark(self) -> Mark:
        """Mark the end of what is enqueued so far."""
        return self._queue.mark()


@dataclass(frozen=True, slots=True)
class _Enqueued:
    wants: list[bool]
    samples: FetchedSamples | None
    mark: Mark

    def is_done(self) -> bool:
        return self.mark.is_passed() and (self.samples is None or self.samples.is_done())

    def results(self) -> list[Sampled | None]:
        self.mark.wait()
        chosen = iter([] if self.samples is None else self.samples.results())
        return [next(chosen) if wants else None for wants in self.wants]


def _outside_inference(on_layer: OnLayer) -> OnLayer:
    """Let what runs between two layers make ordinary tensors: decode may launch a step there, and update them later."""

    def outside(layer: int) -> None:
        with torch.inference_mode(False):
            on_layer(layer)

    return outside


def _sample_input(item: BatchItem) -> SampleInput:
    seq, end = item.sequence, item.start + item.num_tokens
    grammar = seq.grammar if end == len(seq.tokens) else None  # of a token that is replayed the next one is known
    output = seq.tokens[seq.num_prompt_tokens : end]
    return SampleInput(seq.sampling, seq.tokens[: seq.num_prompt_tokens], output, grammar)
