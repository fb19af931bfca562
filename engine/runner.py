"""One forward of any sequences, whole prompts or chunks of them, and the tokens that follow or what is read off them.

    launch(items) ─► LaunchedBatch ── is_done() ──► results(), one per item

`Runner` computes in `launch` and samples on the host. `DeviceRunner` only enqueues, samples on the device, and lets a
second batch be launched behind the first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.batch import BatchItem, build_batch
from engine.device_queue import PASSED, DeviceQueue, HostQueue, Mark
from engine.device_sampler import FetchedSamples, sample_on_device
from engine.kv_cache import KVCache
from engine.reading import FetchedReading, FetchedStates, Reading, enqueue_reading, enqueue_states
from engine.sampler import Sampled, SampleInput, sample
from model.batch import ForwardBatch
from model.decoder import Decoder
from model.torch_decoder import TorchDecoder
from protocol.readout import ReadEmbedding
from protocol.request import SamplingParams

OnLayer = Callable[[int], None]


class LaunchedBatch(Protocol):
    """A batch that is being computed."""

    def is_done(self) -> bool:
        """Whether `results` would return at once."""
        ...

    def results(self) -> list[Sampled | Reading | None]:
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
        """Compute the KV of every item, and sample or read where logits are wanted.

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
    found: list[Sampled | Reading | None]

    def is_done(self) -> bool:
        return True

    def results(self) -> list[Sampled | Reading | None]:
        return self.found


class Runner:
    """A `BatchRunner` that computes at once; `step` does the same for what is sampled, and returns the samples.

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
        return _Done(self._compute(items, on_layer, stops))

    def mark(self) -> Mark:
        """Return a mark that is passed; where torch has only enqueued its operations on a GPU, wait for them first."""
        if self._kv.tensor.device.type == "cuda":
            torch.cuda.current_stream(self._kv.tensor.device).synchronize()
        return PASSED

    def step(
        self, items: Sequence[BatchItem], on_layer: OnLayer | None = None, stops: Collection[int] | None = None
    ) -> list[Sampled | None]:
        """Compute items that are no readouts and return one entry per item; see `BatchRunner.launch`."""
        found = self._compute(items, on_layer, stops)
        return [entry if isinstance(entry, Sampled) else None for entry in found]

    def _compute(
        self, items: Sequence[BatchItem], on_layer: OnLayer | None, stops: Collection[int] | None
    ) -> list[Sampled | Reading | None]:
        embedded, others = _divide(items)
        if embedded:
            found: list[Sampled | Reading | None] = [None] * len(items)
            for at, states in self._states([items[at] for at in embedded], embedded).items():
                found[at] = states.result()
            rest = self._compute([items[at] for at in others], on_layer, stops) if others else []
            for at, entry in zip(others, rest, strict=True):
                found[at] = entry
            return found
        return self._compute_logits(items, on_layer, stops)

    def _states(self, items: Sequence[BatchItem], places: Sequence[int]) -> dict[int, FetchedStates]:
        device = self._kv.tensor.device
        batch = build_batch(items, self._block_size, lambda array: torch.from_numpy(array).to(device), may_decode=False)
        states = self._decoder.forward_states(batch, self._kv.tensor)
        return _fetch_states(states, items, places, HostQueue(device))

    def _compute_logits(
        self, items: Sequence[BatchItem], on_layer: OnLayer | None, stops: Collection[int] | None
    ) -> list[Sampled | Reading | None]:
        device = self._kv.tensor.device
        batch = build_batch(items, self._block_size, lambda array: torch.from_numpy(array).to(device))
        with torch.inference_mode():
            logits = self._decoder.forward(batch, self._kv.tensor, on_layer, stops)
            parts = _LogitRows(items)
            wanted = [_sample_input(items[at]) for at in parts.sampled]
            samples = sample(parts.of_samples(logits), wanted) if wanted else []
        found: list[Sampled | Reading | None] = [None] * len(items)
        for at, chosen in zip(parts.sampled, samples, strict=True):
            found[at] = chosen
        queue = HostQueue(device)
        for at, rows in parts.read.items():
            found[at] = enqueue_reading(logits[rows], items[at], queue).result()
        return found


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
        embedded, others = _divide(items)
        if not embedded:
            return self._launch_logits(items, on_layer, stops)
        # First, so that whoever is told of a layer of the others finds these blocks computed as well.
        chosen = [items[at] for at in embedded]
        batch = build_batch(chosen, self._block_size, self._queue.upload, may_decode=False)
        with self._queue.active():
            states = self._decoder.forward_states(batch, self._kv.tensor)
        fetched = _fetch_states(states, chosen, embedded, self._queue)
        rest = self._launch_logits([items[at] for at in others], on_layer, stops) if others else None
        return _Divided(len(items), fetched, others, rest, self._queue.mark())

    def _launch_logits(
        self, items: Sequence[BatchItem], on_layer: OnLayer | None, stops: Collection[int] | None
    ) -> LaunchedBatch:
        # Never as a decode batch, however short the chunks: a row's bits must not depend on its company.
        batch = build_batch(items, self._block_size, self._queue.upload, may_decode=False)
        parts = _LogitRows(items)
        wanted = [_sample_input(items[at]) for at in parts.sampled]
        with self._queue.active(), torch.inference_mode():
            logits = self._decoder.forward(batch, self._kv.tensor, on_layer and _outside_inference(on_layer), stops)
            to_sample = parts.of_samples(logits)
        samples = sample_on_device(to_sample, wanted, self._decoder.kernels, self._queue) if wanted else None
        read = {at: enqueue_reading(logits[rows], items[at], self._queue) for at, rows in parts.read.items()}
        return _Enqueued(len(items), parts.sampled, samples, read, self._queue.mark())

    def mark(self) -> Mark:
        """Mark the end of what is enqueued so far."""
        return self._queue.mark()

    def rehearse(self) -> None:
        """Run a prompt of two tokens that writes nothing, and sample from it both ways; waits for the device.

        Kernels are compiled when they are first launched: better now than while a prompt waits and this seems to hang.
        """
        ints, longs = np.zeros(2, np.int32), np.array([0, 1], np.int64)
        upload = self._queue.upload
        batch = ForwardBatch(
            token_ids=upload(longs),
            positions=upload(longs),
            slot_mapping=upload(np.full(2, -1, np.int64)),
            query_start=upload(np.array([0, 2], np.int32)),
            seq_lens=upload(ints[:1] + 2),
            block_tables=upload(ints[:1].reshape(1, 1)),
            logits_indices=upload(longs[1:]),
            is_decode=False,
        )
        with self._queue.active(), torch.inference_mode():
            logits = self._decoder.forward(batch, self._kv.tensor)
        for min_tokens in (0, 1):
            params = SamplingParams(seed=0, max_tokens=1, min_tokens=min_tokens)
            rows = [SampleInput(params, [0], [])]
            sample_on_device(logits, rows, self._decoder.kernels, self._queue).results()


@dataclass(frozen=True, slots=True)
class _Enqueued:
    num_items: int
    sampled: list[int]
    samples: FetchedSamples | None
    read: dict[int, FetchedReading]
    mark: Mark

    def is_done(self) -> bool:
        if not self.mark.is_passed() or not (self.samples is None or self.samples.is_done()):
            return False
        return all(reading.is_done() for reading in self.read.values())

    def results(self) -> list[Sampled | Reading | None]:
        self.mark.wait()
        found: list[Sampled | Reading | None] = [None] * self.num_items
        if self.samples is not None:
            for at, sample_of_item in zip(self.sampled, self.samples.results(), strict=True):
                found[at] = sample_of_item
        for at, reading in self.read.items():
            found[at] = reading.result()
        return found


@dataclass(frozen=True, slots=True)
class _Divided:
    """A batch some of whose items are read as states, at their places; the others run behind them, if there are any."""

    num_items: int
    fetched: dict[int, FetchedStates]
    others: list[int]
    rest: LaunchedBatch | None
    mark: Mark

    def is_done(self) -> bool:
        is_rest_done = self.rest is None or self.rest.is_done()
        return is_rest_done and self.mark.is_passed() and all(states.is_done() for states in self.fetched.values())

    def results(self) -> list[Sampled | Reading | None]:
        self.mark.wait()
        found: list[Sampled | Reading | None] = [None] * self.num_items
        for at, states in self.fetched.items():
            found[at] = states.result()
        if self.rest is not None:
            for at, entry in zip(self.others, self.rest.results(), strict=True):
                found[at] = entry
        return found


def _divide(items: Sequence[BatchItem]) -> tuple[list[int], list[int]]:
    """Return the places of the items whose states are read, and those of the others."""
    embedded = [at for at, item in enumerate(items) if isinstance(item.sequence.readout, ReadEmbedding)]
    others = [at for at, item in enumerate(items) if not isinstance(item.sequence.readout, ReadEmbedding)]
    return embedded, others


def _fetch_states(
    states: Tensor, items: Sequence[BatchItem], places: Sequence[int], queue: DeviceQueue
) -> dict[int, FetchedStates]:
    fetched, row = {}, 0
    for place, item in zip(places, items, strict=True):
        num_rows = item.num_logit_rows
        if num_rows:
            fetched[place] = enqueue_states(states[row : row + num_rows], queue)
        row += num_rows
    return fetched


class _LogitRows:
    """Which rows of a batch's logits belong to whom: items are named by their place in the batch.

    Attributes:
        sampled: items whose one row is sampled from.
        read: rows of the items that are read.
    """

    def __init__(self, items: Sequence[BatchItem]) -> None:
        self.sampled: list[int] = []
        self.read: dict[int, slice] = {}
        self._sampled_rows: list[int] = []
        row = 0
        for at, item in enumerate(items):
            num_rows = item.num_logit_rows
            if num_rows and item.sequence.readout is not None:
                self.read[at] = slice(row, row + num_rows)
            elif num_rows:
                self.sampled.append(at)
                self._sampled_rows.append(row)
            row += num_rows

    def of_samples(self, logits: Tensor) -> Tensor:
        """Return the rows that are sampled from: all of them, uncopied, where nothing is read."""
        if not self.read or not self.sampled:
            return logits
        return torch.cat([logits[row : row + 1] for row in self._sampled_rows])


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
