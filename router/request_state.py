"""What dispatch knows of one unfinished request, and of the workers that it is with."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from protocol.block_hash import BlockHash
from protocol.kv_layout import KVFingerprint
from protocol.request import TokenRow
from router.instructions import Submission
from router.members import WorkerKey


class Need(Enum):
    """What a request waits for: a pair of workers, or a prefill worker for its one token or for what is read off it."""

    PAIR = "pair"
    FIRST_TOKEN = "first token"
    READINGS = "readings"


@dataclass(slots=True)
class Placement:
    """Where a request is.

    Attributes:
        first_index: of the token that the prefill worker samples.
        prefill_holds, decode_holds: whether that worker has something of it.
        is_steady: the stream has reached the decode worker: rows that follow only add to it.
        num_covered_tokens: output tokens that the blocks told to the loads hold.
        early: rows that came before the one that the prefill worker samples.
    """

    transfer_id: int
    prefill: WorkerKey
    decode: WorkerKey | None
    first_index: int = 0
    prefill_holds: bool = True
    decode_holds: bool = True
    is_steady: bool = False
    num_covered_tokens: int = 0
    early: list[TokenRow] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class RequestState:
    """An unfinished request.

    Attributes:
        order: of submission.
        waiting_since_s: when it last began to wait for workers.
        tokens: what its client has, or will have: delivered once and in order.
        names, named_for: of its prompt's full blocks, and the layout that they were made for.
        retry_s: workers that refused it, and until when they are left alone.
        is_paused: its client does not read; it has no workers and waits for none.
        is_moving: it was moved off a draining worker and has had no token since.
        cost: prompt tokens that are probably computed for it.
        is_charged: its client has had that already.
        is_resumed: it had workers and lost them: it goes before what never had any.
        has_yielded: it gave its place to another client, and waits for its own client's turn again.
    """

    submission: Submission
    order: int
    waiting_since_s: float
    epoch: int = -1
    tokens: list[int] = field(default_factory=list)
    placement: Placement | None = None
    names: tuple[BlockHash, ...] = ()
    named_for: KVFingerprint | None = None
    num_failures: int = 0
    num_preemptions: int = 0
    num_declines: int = 0
    retry_s: dict[str, float] = field(default_factory=dict)
    is_paused: bool = False
    is_moving: bool = False
    cost: int = 1
    is_charged: bool = False
    is_resumed: bool = False
    has_yielded: bool = False

    @property
    def request_id(self) -> int:
        return self.submission.request_id

    @property
    def rank(self) -> int:
        """Its priority, as far as that counts between clients."""
        return self.submission.client.rank(self.submission.priority)

    @property
    def need(self) -> Need:
        """What it waits for."""
        if self.submission.readout is not None:
            return Need.READINGS
        return Need.PAIR if self.needs_decode else Need.FIRST_TOKEN

    @property
    def needs_decode(self) -> bool:
        return self.submission.needs_decode

    @property
    def is_worth_moving(self) -> bool:
        """Whether more is to come than would be computed again elsewhere; else it is done sooner where it is."""
        num_left = self.submission.sampling.max_tokens - len(self.tokens)
        return num_left > len(self.tokens)
