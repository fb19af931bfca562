"""The compute-thread half of an encoder's worker: one batch of texts per step.

1. `SubmitText` queues a text. 2. A step takes texts up to a budget of tokens and computes them whole: clients take
turns, each with what is due first. 3. `VectorsReady` tells their vectors. An encoder keeps nothing of a text: there are
no chunks and no blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from engine.pooling import Pool
from model.encoder import Encoder
from protocol.readout import ReadEmbedding
from protocol.turns import Turns

_MAX_BATCH_TEXTS = 256


@dataclass(frozen=True, slots=True)
class Text:
    """One text placed here; times are on the monotonic clock."""

    transfer_id: int
    token_ids: tuple[int, ...]
    readout: ReadEmbedding
    arrived_s: float
    deadline_s: float
    client: str = ""
    weight: int = 1
    rank: int = 0


@dataclass(frozen=True, slots=True)
class SubmitText:
    """Event: a text was placed here."""

    text: Text


@dataclass(frozen=True, slots=True)
class AbortText:
    """Event: forget a text."""

    transfer_id: int


@dataclass(frozen=True, slots=True)
class VectorReady:
    """Emission: the vector of a text. Times are durations in seconds."""

    transfer_id: int
    vector: bytes
    queue_s: float
    compute_s: float


class EncoderStepper:
    """Queue and computation of one encoder's worker.

    Args:
        encoder: the model.
        batch_tokens: most tokens of one step; a longer text has a step of its own.
        emit: takes the vectors of a step; called on the compute thread.
    """

    is_waiting = False

    def __init__(self, encoder: Encoder, batch_tokens: int, emit: Callable[[list[VectorReady]], None]) -> None:
        self._encoder = encoder
        self._batch_tokens = batch_tokens
        self._emit = emit
        self._waiting: dict[int, Text] = {}
        self._turns = Turns()
        self.queued_tokens = self.num_waiting = self.num_running = 0
        self.num_steps = self.num_computed_tokens = 0
        self.step_s = 0.0

    def handle(self, event: SubmitText | AbortText) -> None:
        """Take one event."""
        if isinstance(event, SubmitText):
            self._waiting[event.text.transfer_id] = event.text
            self._turns.want(event.text.client)
        elif (text := self._waiting.pop(event.transfer_id, None)) is not None:
            self._turns.rest(text.client)
        self._publish(())

    def step(self) -> bool:
        """Compute the texts whose turn it is."""
        texts = self._choose()
        if not texts:
            return False
        begin_s = time.monotonic()
        for text in texts:
            del self._waiting[text.transfer_id]
            self._turns.charge(text.client, len(text.token_ids), text.weight)
            self._turns.rest(text.client)
        self._publish(texts)
        vectors = self._compute(texts)
        took_s = time.monotonic() - begin_s
        self.num_steps += 1
        self.num_computed_tokens += sum(len(text.token_ids) for text in texts)
        self.step_s += took_s
        self._publish(())
        self._emit(
            [
                VectorReady(text.transfer_id, vector, begin_s - text.arrived_s, took_s)
                for text, vector in zip(texts, vectors, strict=True)
            ]
        )
        return True

    def _choose(self) -> list[Text]:
        chosen: list[Text] = []
        num_tokens = 0
        for text in self._turns.order(self._waiting.values(), lambda t: len(t.token_ids)):
            num_tokens += len(text.token_ids)
            if chosen and (num_tokens > self._batch_tokens or len(chosen) == _MAX_BATCH_TEXTS):
                break
            chosen.append(text)
        return chosen

    def _compute(self, texts: list[Text]) -> list[bytes]:
        with torch.inference_mode():
            states = self._encoder.forward([text.token_ids for text in texts])
            # One copy from the device for all of them.
            rows = torch.cat(states).float().cpu().numpy()
        found, first = [], 0
        for text in texts:
            pool = Pool(text.readout)
            pool.add(rows[first : first + len(text.token_ids)])
            found.append(pool.vector())
            first += len(text.token_ids)
        return found

    def _publish(self, running: list[Text] | tuple[()]) -> None:
        self.num_running, self.num_waiting = len(running), len(self._waiting)
        self.queued_tokens = sum(len(text.token_ids) for text in (*self._waiting.values(), *running))


def compute_text(encoder: Encoder, num_tokens: int) -> None:
    """Compute a text of so many tokens, and wait for it."""
    with torch.inference_mode():
        np.asarray(encoder.forward([[0] * num_tokens])[0].float().cpu())
