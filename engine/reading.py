"""Read off logits what a readout asks for, on the device that holds them.

1. A batch item of a readout names rows whose logits are wanted: the last one for labels, all but the prompt's last one
for its own tokens. 2. `enqueue_reading` takes these rows, `[n, vocab_size]`, to the few numbers that are wanted.
3. They come down behind the batch; `result` packs them. A prompt's chunks are joined by `join`.
Of embeddings the last hidden states are wanted: `enqueue_states` fetches them, `engine/pooling.py` joins them.

Rows are bounded by the scheduler, so that no more than a chunk of a prompt has its logits in memory at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import BatchItem
from engine.device_queue import DeviceQueue, Mark
from kernels.sampling import token_logprobs
from protocol.readout import PromptLogprobs, ReadLabels, ReadPrompt


@dataclass(frozen=True, slots=True)
class Reading:
    """What one batch item gave: log probabilities of labels, or rows of a prompt as `PromptLogprobs` lays them out.

    Or `states` of tokens `[n, hidden_size]`, which stand for `num_tokens` where they were added up on the device.
    """

    labels: tuple[float, ...] = ()
    num_top: int = 0
    values: bytes = b""
    integers: bytes = b""
    states: NDArray[np.float32] | None = None
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class FetchedStates:
    """Last hidden states of one batch item, on the host once marked."""

    values: Tensor
    mark: Mark
    num_tokens: int

    def is_done(self) -> bool:
        """Whether everything has arrived."""
        return self.mark.is_passed()

    def result(self) -> Reading:
        """Wait, then return the reading."""
        self.mark.wait()
        return Reading(states=self.values.numpy(), num_tokens=self.num_tokens)


@dataclass(frozen=True, slots=True)
class FetchedReading:
    """Numbers of one batch item, on the host once marked: values `[n, k]` float32, integers `[n, k]` or nothing."""

    values: Tensor
    mark: Mark
    integers: Tensor | None = None
    integers_mark: Mark | None = None

    def is_done(self) -> bool:
        """Whether everything has arrived."""
        return self.mark.is_passed() and (self.integers_mark is None or self.integers_mark.is_passed())

    def result(self) -> Reading:
        """Wait, then return the reading."""
        self.mark.wait()
        if self.integers is None or self.integers_mark is None:
            return Reading(labels=tuple(self.values[0].tolist()))
        self.integers_mark.wait()
        values = self.values.numpy().astype("<f4", copy=False).tobytes()
        integers = self.integers.numpy().astype("<i4", copy=False).tobytes()
        return Reading((), self.values.shape[1] - 1, values, integers)


def enqueue_reading(logits: Tensor, item: BatchItem, queue: DeviceQueue) -> FetchedReading:
    """Enqueue what a readout's item asks of its rows of logits `[n, vocab_size]`; does not wait for the device."""
    readout = item.sequence.readout
    if isinstance(readout, ReadLabels):
        token_ids = queue.upload(np.array(readout.token_ids, np.int64))
        with queue.active(), torch.inference_mode():
            row = logits[-1].float()
            values = (row[token_ids] - torch.logsumexp(row, dim=0)).unsqueeze(0)
        return FetchedReading(*queue.fetch(values))
    assert isinstance(readout, ReadPrompt), "the scheduler asks for logits where they are read"
    first = item.start + 1
    targets = queue.upload(np.array(item.sequence.tokens[first : first + logits.shape[0]], np.int64))
    with queue.active(), torch.inference_mode():
        chosen, rank, top_ids, top_values = token_logprobs(logits, targets, readout.num_top)
        values = torch.cat((chosen.unsqueeze(1), top_values), dim=1)
        integers = torch.cat((rank.unsqueeze(1), top_ids), dim=1).to(torch.int32)
    return FetchedReading(*queue.fetch(values), *queue.fetch(integers))


def enqueue_states(states: Tensor, queue: DeviceQueue) -> FetchedStates:
    """Enqueue that states `[n, hidden_size]` come down; those of a GPU are added up there."""
    num_tokens = states.shape[0]
    if states.device.type != "cpu" and num_tokens > 1:
        with queue.active(), torch.inference_mode():
            states = states.double().sum(0, keepdim=True).float()
    return FetchedStates(*queue.fetch(states), num_tokens)


def join(readings: Sequence[Reading]) -> PromptLogprobs:
    """Return the rows of a prompt that was read chunk by chunk; none where it has one token."""
    num_top = readings[0].num_top if readings else 0
    values, integers = b"".join(r.values for r in readings), b"".join(r.integers for r in readings)
    return PromptLogprobs.of(num_top, values, integers)
