"""What dispatch is given and what it asks for, and the ids it puts on the wire.

Of the three terminal instructions every accepted request gets exactly one.
"""

from __future__ import annotations

import itertools
import secrets
from dataclasses import dataclass

import msgspec

from protocol.errors import RequestFailed
from protocol.readout import Readout
from protocol.request import FinishReason, SamplingParams, TokenRow
from protocol.wire import FirstToken, Message, Prefill, Readings, Reserve
from router.access import NOBODY, Client
from router.members import WorkerKey


@dataclass(frozen=True, slots=True)
class Submission:
    """An accepted request; of those of its client a lower `priority` is placed earlier, of all as far as it may say so.

    `first_token_due_s` is on the clock of the events; of a `readout` it is its readings'.
    """

    request_id: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    first_token_due_s: float
    cache_salt: str = ""
    readout: Readout | None = None
    priority: int = 0
    client: Client = NOBODY

    @property
    def needs_decode(self) -> bool:
        """Whether more than a prefill worker is needed."""
        return self.readout is None and self.sampling.max_tokens > 1

    def reserve(
        self, transfer_id: int, epoch: int, prefill_id: str, emitted: tuple[int, ...], is_replayed: bool
    ) -> Reserve:
        """Return what a decode worker is told.

        Args:
            transfer_id: of the placement.
            epoch: of the placement.
            prefill_id: where the KV comes from.
            emitted: the tokens that the client has.
            is_replayed: whether decode computes these itself.
        """
        return Reserve(
            request_id=self.request_id,
            transfer_id=transfer_id,
            epoch=epoch,
            prefill_worker_id=prefill_id,
            prompt=self.prompt,
            emitted=emitted,
            is_replayed=is_replayed,
            sampling=self.sampling,
            cache_salt=self.cache_salt,
        )

    def prefill(
        self, transfer_id: int, epoch: int, decode_id: str | None, emitted: tuple[int, ...], now_s: float
    ) -> Prefill:
        """Return what a prefill worker is told; it computes `emitted` after the prompt."""
        return Prefill(
            request_id=self.request_id,
            transfer_id=transfer_id,
            epoch=epoch,
            decode_worker_id=decode_id,
            prompt=self.prompt,
            emitted=emitted,
            sampling=self.sampling,
            deadline_s=self.first_token_due_s - now_s,
            cache_salt=self.cache_salt,
            readout=self.readout,
            client=self.client.name,
            weight=self.client.weight,
            rank=self.client.rank(self.priority),
        )


@dataclass(frozen=True, slots=True)
class Send:
    """Instruction: send a message to this instance of a worker."""

    key: WorkerKey
    message: Message


@dataclass(frozen=True, slots=True)
class Placed:
    """Instruction: note which workers were chosen."""

    request_id: int
    epoch: int
    transfer_id: int
    prefill_id: str
    decode_id: str | None


class Deliver(msgspec.Struct, frozen=True):
    """Instruction: give a token to the client; `first` tells about its prefill where it came with one.

    There is one for every token: a Struct is made in a fifth of the time that a frozen dataclass takes.
    """

    request_id: int
    row: TokenRow
    first: FirstToken | None = None


@dataclass(frozen=True, slots=True)
class Read:
    """Instruction: give a client what was read off its prompt; Finish follows."""

    request_id: int
    readings: Readings


@dataclass(frozen=True, slots=True)
class Finish:
    """Terminal instruction: the request is complete."""

    request_id: int
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Fail:
    """Terminal instruction: the request cannot be completed."""

    request_id: int
    error: RequestFailed


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Terminal instruction: the client is gone."""

    request_id: int


Terminal = Finish | Fail | Cancelled
Instruction = Send | Placed | Deliver | Read | Terminal


class IdSource:
    """Ids that no other router, and no earlier run of this one, is likely to use: 31 random bits, then a counter."""

    def __init__(self, prefix: int | None = None) -> None:
        self._prefix = (secrets.randbits(31) if prefix is None else prefix) << 32
        self._counter = itertools.count(1)

    def next(self) -> int:
        """Return a fresh id below 2**63."""
        return self._prefix | (next(self._counter) & 0xFFFFFFFF)
