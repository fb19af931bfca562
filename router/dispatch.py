"""The life of a request across placements. Pure: events in, instructions out, the clock is an argument.

                ┌──────── declined · preempted · transfer failed · worker lost · gap ────────┐
                ▼                                                                            │
    submit ► QUEUED ── a pair has room ──► PLACED(epoch k) ── first token ──► STREAMING ─────┤
                │                              │                                 │           │
                └─ waited too long ► Fail      └── cancel ► Cancelled            └─ finish reason, stop ► Finish

1. RESERVE and PREFILL leave together. What ends with its first token needs no decode worker.
2. Tokens are delivered once and in order, by (epoch, index). First token and later ones come from two workers, so the
   later ones may overtake it: they are kept until it is here. Any other gap fails the placement.
3. A lost placement begins a new epoch with the tokens that the client has; nothing of an older one counts any more.
   Where the phases agree bit by bit, prefill computes these as well and samples the one after them, so that nobody's
   fault holds up another stream; elsewhere decode replays them, step by step.
4. Clients take turns (router/fairness.py). A refusal costs a pause, on that worker only; nobody else is placed while
   the request whose turn it is waits for room. Who has waited for long gets the place of the latest stream of whichever
   client has most of them on decode workers, by two at least; that stream goes on when its own turn comes.
5. A stream whose client does not read is paused: it gives its placement up, and gets another when the client reads on.
6. The streams of a draining decode worker are moved to another one with room, a few at a time; it goes on with those
   that would be finished sooner than moved, and with what nobody else has room for, until its own budget is over.
7. A readout needs a prefill worker alone and ends with its Readings; lost with its worker, it is read again elsewhere.
8. A grammar that failed fails wherever it is tried: its request ends at once, and is not placed again.
9. Every accepted request ends with exactly one of Finish, Fail, Cancelled, and an Abort to whoever holds some of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Final

from protocol.block_hash import BlockHash, block_hashes, root_hash
from protocol.errors import AnswerImpossible, NotReady, RequestFailed
from protocol.kv_layout import KVFingerprint
from protocol.readout import does_answer, reads_cache
from protocol.request import FinishReason, TokenRow
from protocol.wire import Abort, Declined, FirstToken, GrammarFailed, Preempted, Readings, TransferFailed
from router.fairness import FairQueue, Shares
from router.instructions import (
    Cancelled,
    Deliver,
    Fail,
    Finish,
    IdSource,
    Instruction,
    Placed,
    Read,
    Send,
    Submission,
    Terminal,
)
from router.load import Demand, Loads, num_blocks_for
from router.members import Registry, WorkerKey
from router.placement import PrefixMemory
from router.request_state import Need, Placement, RequestState

FIRST_BACKOFF_S: Final = 0.05
MAX_BACKOFF_S: Final = 1.0
MAX_MOVING: Final = 2
YIELD_AFTER_S: Final = 1.0
MAX_YIELDING: Final = 8
FUTILE_S: Final = 10.0
NUM_TOKEN_IDS: Final = 1 << 31


class Dispatch:
    """All unfinished requests of one router.

    Args:
        registry: the workers, kept up to date by the caller.
        max_placements: failed placements after which a request fails.
        placement_wait_s: how long a request may wait for a pair of workers.
        ids: makes transfer ids.

    Attributes:
        num_stale_tokens: tokens that counted for nothing, since their placement is history.
    """

    def __init__(self, registry: Registry, max_placements: int, placement_wait_s: float, ids: IdSource) -> None:
        self._registry = registry
        self._max_placements = max_placements
        self._placement_wait_s = placement_wait_s
        self._ids = ids
        self.loads = Loads(registry)
        self._requests: dict[int, RequestState] = {}
        self._by_transfer: dict[int, RequestState] = {}
        self._queue = FairQueue()
        self._resting: set[RequestState] = set()
        self._streams = Shares()
        self._yield_s = 0.0
        self._prefixes: PrefixMemory | None = None
        self._order = itertools.count()
        self._has_freed = False
        self.num_stale_tokens = 0

    @property
    def num_waiting(self) -> int:
        """Requests without workers."""
        return len(self._queue)

    @property
    def num_running(self) -> int:
        """Requests with workers."""
        return len(self._by_transfer)

    # --- events from clients and the clock ---

    def submit(self, submission: Submission, now_s: float) -> list[Instruction]:
        """Take a request."""
        assert submission.request_id not in self._requests
        request = RequestState(submission, next(self._order), now_s)
        self._requests[submission.request_id] = request
        request.cost = self._cost(request)
        demand = None if len(self._queue) else self._demand(request)
        pair = None if demand is None else self.loads.choose(demand, ())
        if demand is not None and pair is not None:
            # Where nobody waits there are no turns to be taken.
            request.is_charged = True
            return self._place(request, demand, pair.prefill_id, pair.decode_id, now_s)
        self._queue.add(request)
        return self._place_waiting(now_s)

    def cost_of(self, request_id: int) -> int:
        """Return how many tokens are probably computed for the prompt of a request that has just been submitted."""
        return self._requests[request_id].cost

    def cancel(self, request_id: int, now_s: float) -> list[Instruction]:
        """Forget a request whose client is gone; unknown ones have ended."""
        request = self._requests.get(request_id)
        if request is None:
            return []
        return self._end(request, Cancelled(request_id), "client gone") + self._place_waiting(now_s)

    def stop(self, request_id: int, now_s: float) -> list[Instruction]:
        """Finish a request whose text has reached a stop string; unknown ones have ended."""
        request = self._requests.get(request_id)
        if request is None:
            return []
        out = self._end(request, Finish(request_id, FinishReason.STOP), "stop string")
        return out + self._place_waiting(now_s)

    def pause(self, request_id: int, now_s: float) -> list[Instruction]:
        """Let a request hold nothing until `go_on`; its tokens so far count as delivered. Idempotent."""
        request = self._requests.get(request_id)
        if request is None or request.is_paused:
            return []
        request.is_paused = True
        self._queue.remove(request)
        return self._release(request, "its client does not read") + self._place_waiting(now_s)

    def go_on(self, request_id: int, now_s: float) -> list[Instruction]:
        """Place a paused request again; idempotent."""
        request = self._requests.get(request_id)
        if request is None or not request.is_paused:
            return []
        request.is_paused = False
        return self._requeue(request, "", now_s) + self._place_waiting(now_s)

    def tick(self, now_s: float) -> list[Instruction]:
        """Place what waits, move what drains, give up on what waited too long.

        Call it when members change, and every so often.
        """
        out = self._place_waiting(now_s)
        out += self._move_streams(now_s)
        out += self._make_way(now_s)
        for request in [r for r in self._queue if now_s - r.waiting_since_s > self._placement_wait_s]:
            # A stream that gave way to others waits for room as long as there are workers at all.
            if (request.tokens or request.has_yielded) and self._registry.is_ready:
                continue
            missing = ", ".join(self._registry.missing()) or "all workers are full"
            error = NotReady(f"no workers could take the request within {self._placement_wait_s:g} s: {missing}")
            out += self._end(request, Fail(request.request_id, error), "waited too long")
        return out

    def request_of(self, transfer_id: int) -> int | None:
        """Return whose present placement this is; None if it is history."""
        request = self._by_transfer.get(transfer_id)
        return None if request is None else request.request_id

    # --- events from workers ---

    def first_token(self, key: WorkerKey, message: FirstToken, now_s: float) -> list[Instruction]:
        """Take the token that the prefill worker of a placement has sampled."""
        request = self._current(message.transfer_id)
        if request is None or request.placement is None or request.placement.prefill != key:
            return []
        placement, row = request.placement, message.row
        expected = (request.request_id, request.epoch, placement.first_index)
        is_ours = (row.request_id, row.epoch, row.index) == expected and request.submission.readout is None
        if not is_ours or not _is_token(row):
            return self._replace(request, f"{key.worker_id} sent a first token that is not ours", now_s)
        self.loads.computed(placement.transfer_id, placement.prefill)
        if placement.decode is None or row.finish_reason is not None:
            placement.prefill_holds = False
        out: list[Instruction] = []
        is_known = row.index < len(request.tokens)
        if is_known and row.finish_reason is not None:
            # The prefill worker takes it for complete and sends no KV; the client has seen it go on.
            return self._replace(request, "the prompt, computed again, ended otherwise", now_s)
        if not is_known:
            if placement.decode is None and row.finish_reason is None:
                row = _ended(row, FinishReason.LENGTH)
            rows = [row, *placement.early]
            placement.early = []
            out = self._deliver(request, rows, message)
        return out + self._place_freed(now_s)

    def readings(self, key: WorkerKey, message: Readings, now_s: float) -> list[Instruction]:
        """Take what a prefill worker has read off the prompt of a placement: the request is complete."""
        request = self._left(key, message.transfer_id)
        if request is None:
            return []
        submission = request.submission
        found = (message.labels, message.prompt, message.embedding)
        if submission.readout is None or not does_answer(submission.readout, len(submission.prompt), *found):
            return self._replace(request, f"{key.worker_id} sent readings that were not asked for", now_s)
        out: list[Instruction] = [Read(request.request_id, message)]
        out += self._end(request, Finish(request.request_id, FinishReason.STOP), "finished")
        return out + self._place_freed(now_s)

    def tokens(self, key: WorkerKey, rows: Iterable[TokenRow], now_s: float) -> list[Instruction]:
        """Take the rows of one decode step."""
        out: list[Instruction] = []
        for row in rows:
            request = self._requests.get(row.request_id)
            if request is None:
                continue
            placement = request.placement
            is_ours = placement is not None and (placement.decode is key or placement.decode == key)
            if placement is None or not is_ours or row.epoch != request.epoch:
                self.num_stale_tokens += 1
                continue
            tokens, is_more = request.tokens, placement.is_steady and row.finish_reason is None
            if is_more and row.index == len(tokens) and 0 <= row.token_id < NUM_TOKEN_IDS:
                # What nearly every row is: `_row` would do the same, but works three times as long.
                tokens.append(row.token_id)
                out.append(Deliver(row.request_id, row))
                if len(tokens) > placement.num_covered_tokens:
                    self._grow(request, placement)
            else:
                out += self._row(request, placement, row, now_s)
        return out + self._place_freed(now_s)

    def declined(self, key: WorkerKey, message: Declined, now_s: float) -> list[Instruction]:
        """Take a refusal: nothing was done there."""
        request = self._left(key, message.transfer_id)
        if request is None:
            return []
        backoff_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** min(request.num_declines, 10))
        request.num_declines += 1
        # The wait goes on where it began: refusals do not prolong it.
        out = self._requeue(request, f"declined: {message.reason}", request.waiting_since_s)
        request.retry_s[key.worker_id] = now_s + backoff_s
        self._resting.add(request)
        return out + self._place_waiting(now_s)

    def preempted(self, key: WorkerKey, message: Preempted, now_s: float) -> list[Instruction]:
        """Take the news that a sequence gave way to older ones; next time it waits for more room."""
        request = self._left(key, message.transfer_id)
        if request is None:
            return []
        request.num_preemptions += 1
        return self._requeue(request, "preempted", now_s) + self._place_waiting(now_s)

    def transfer_failed(self, key: WorkerKey, message: TransferFailed, now_s: float) -> list[Instruction]:
        """Take the news that a hand-off broke."""
        request = self._left(key, message.transfer_id)
        return [] if request is None else self._replace(request, message.reason, now_s)

    def grammar_failed(self, key: WorkerKey, message: GrammarFailed, now_s: float) -> list[Instruction]:
        """Take the news that what a request's output must obey cannot be gone on with, here or anywhere."""
        request = self._left(key, message.transfer_id)
        if request is None:
            return []
        error = AnswerImpossible(message.reason)
        return self._end(request, Fail(request.request_id, error), message.reason) + self._place_waiting(now_s)

    def worker_lost(self, key: WorkerKey, now_s: float) -> list[Instruction]:
        """Place again whatever this instance held; it is out of the registry already."""
        out: list[Instruction] = []
        for request in list(self._by_transfer.values()):
            placement = request.placement
            assert placement is not None
            on_prefill, on_decode = placement.prefill == key, placement.decode == key
            if (on_prefill and placement.prefill_holds) or on_decode:
                placement.prefill_holds &= not on_prefill
                placement.decode_holds &= not on_decode
                out += self._replace(request, f"worker {key.worker_id} was lost", now_s, place=False)
        self.loads.forget(key)
        self._prefixes = None
        return out + self._place_waiting(now_s)

    # --- tokens ---

    def _grow(self, request: RequestState, placement: Placement) -> None:
        """Count the blocks that a placement has reached on its decode worker."""
        if placement.decode is not None and self._registry.fingerprint is not None:
            block_size, num_prompt_tokens = self._registry.fingerprint.block_size, len(request.submission.prompt)
            num_blocks = num_blocks_for(num_prompt_tokens + len(request.tokens), block_size)
            self.loads.grown(placement.transfer_id, placement.decode, num_blocks)
            placement.num_covered_tokens = num_blocks * block_size - num_prompt_tokens

    def _row(self, request: RequestState, placement: Placement, row: TokenRow, now_s: float) -> list[Instruction]:
        """Deliver, keep or drop one row of the current epoch."""
        num_delivered, first = len(request.tokens), placement.first_index
        if row.index < num_delivered or first < row.index <= first + len(placement.early):
            return []
        if not _is_token(row):
            return self._replace(request, f"token id {row.token_id} is none", now_s)
        if placement.prefill_holds:
            # Decode computes only what has landed: the prefill worker is done, unless its token is still on the way.
            self.loads.ended(placement.transfer_id, placement.prefill)
            self._has_freed = True
            placement.prefill_holds = num_delivered == first
        if row.index == num_delivered:
            return self._deliver(request, [row], None)
        if num_delivered == first and row.index == first + len(placement.early) + 1:
            placement.early.append(row)
            return []
        return self._replace(request, f"token {row.index} came instead of {num_delivered}", now_s)

    def _deliver(self, request: RequestState, rows: list[TokenRow], first: FirstToken | None) -> list[Instruction]:
        """Deliver consecutive rows, and finish where one says so."""
        out: list[Instruction] = []
        placement = request.placement
        assert placement is not None
        request.num_declines = 0
        for row in rows:
            request.tokens.append(row.token_id)
            out.append(Deliver(request.request_id, row, first if row.index == 0 else None))
            if row.finish_reason is not None:
                if row.index > placement.first_index:
                    placement.prefill_holds = placement.decode_holds = False
                return out + self._end(request, Finish(request.request_id, row.finish_reason), "finished")
        placement.is_steady = rows[-1].index > placement.first_index
        if placement.is_steady:
            placement.prefill_holds = False
        self._grow(request, placement)
        request.is_moving &= not placement.is_steady
        if placement.is_steady:
            request.num_failures = 0  # a stream that gets on is never given up
        return out

    # --- placing ---

    def _place_freed(self, now_s: float) -> list[Instruction]:
        """Try again only when a worker was freed of something: most tokens free nothing."""
        return self._place_waiting(now_s) if self._has_freed and self._queue else []

    def _place_waiting(self, now_s: float) -> list[Instruction]:
        """Place what can be placed, turn by turn, until for each need somebody waits for room."""
        out: list[Instruction] = []
        aside: list[RequestState] = []
        open_needs, self._has_freed = set(Need), False
        while (request := self._queue.first(open_needs)) is not None:
            demand = self._demand(request)
            if demand is None:
                break
            resting = {worker_id for worker_id, until_s in request.retry_s.items() if until_s > now_s}
            pair = self.loads.choose(demand, resting)
            if pair is not None:
                self._queue.take(request)
                out += self._place(request, demand, pair.prefill_id, pair.decode_id, now_s)
            elif resting:
                # One that rests after a refusal lets others pass; one that waits for room does not.
                self._queue.remove(request)
                aside.append(request)
            else:
                open_needs.discard(request.need)
        for request in aside:
            self._queue.add(request)
        return out

    def _make_way(self, now_s: float) -> list[Instruction]:
        """Place a request that has waited for room for long enough, in place of streams of a client with more."""
        late = [r for r in self._queue.heads(Need.PAIR) if now_s - r.waiting_since_s >= YIELD_AFTER_S]
        waiting = min(late, key=lambda r: (r.rank, self._streams.load(r.submission.client), r.order), default=None)
        demand = None if waiting is None else self._demand(waiting)
        if waiting is None or demand is None or now_s < self._yield_s or not self.loads.lacks_room(demand):
            return []
        out: list[Instruction] = []
        for _ in range(MAX_YIELDING):
            if (richer := self._richest(waiting)) is None:
                break
            out += self._requeue(richer, "it gives its place to another client", now_s, yields=True)
            if (pair := self.loads.choose(demand, ())) is not None:
                self._queue.take(waiting)
                return out + self._place(waiting, demand, pair.prefill_id, pair.decode_id, now_s)
        if out:
            # That was no use: it asks for more than others may be made to give up.
            self._yield_s = now_s + FUTILE_S
        return out + self._place_waiting(now_s)

    def _richest(self, waiting: RequestState) -> RequestState | None:
        """Return the latest stream of the client that has most, if it is left with no fewer than who waits has then."""
        client = waiting.submission.client
        richest = self._streams.heaviest(client)
        if richest is None or self._streams.load(richest, -1) < self._streams.load(client, +1):
            return None
        for request in reversed(self._by_transfer.values()):
            is_stream = request.placement is not None and request.placement.decode is not None
            if is_stream and request.submission.client.name == richest.name and request.rank >= waiting.rank:
                return request
        return None

    def _demand(self, request: RequestState) -> Demand | None:
        fingerprint = self._registry.fingerprint
        if fingerprint is None:
            return None
        submission = request.submission
        num_tokens = len(submission.prompt) + len(request.tokens) + 1
        # Who gave way before comes back with room for more, so that it does not give way again at once.
        room_tokens = max(0, submission.sampling.max_tokens - len(request.tokens) - 1)
        num_tokens += min(room_tokens, request.num_preemptions * fingerprint.block_size)
        num_prefill_tokens = len(submission.prompt) + (len(request.tokens) if self._registry.phases_agree else 0)
        return Demand(
            num_prompt_tokens=num_prefill_tokens,
            names=self._names(request, fingerprint),
            num_blocks=num_blocks_for(num_tokens, fingerprint.block_size),
            needs_decode=request.needs_decode,
            is_readout=submission.readout is not None,
            reads_cache=reads_cache(submission.readout),
        )

    def _place(
        self, request: RequestState, demand: Demand, prefill_id: str, decode_id: str | None, now_s: float
    ) -> list[Instruction]:
        prefill, decode = self._key(prefill_id), None if decode_id is None else self._key(decode_id)
        transfer_id = self._ids.next()
        request.epoch += 1
        emitted = tuple(request.tokens)
        for_prefill = emitted if self._registry.phases_agree else ()
        request.placement = Placement(transfer_id, prefill, decode, len(for_prefill), decode_holds=decode is not None)
        self._by_transfer[transfer_id] = request
        if decode is not None:
            self._streams.take(request.submission.client)
        self.loads.placed(transfer_id, demand, prefill, decode)
        submission, epoch = request.submission, request.epoch
        out: list[Instruction] = []
        if decode is not None:
            is_replayed = len(for_prefill) < len(emitted)
            out.append(Send(decode, submission.reserve(transfer_id, epoch, prefill_id, emitted, is_replayed)))
        out.append(Send(prefill, submission.prefill(transfer_id, epoch, decode_id, for_prefill, now_s)))
        return [*out, Placed(submission.request_id, epoch, transfer_id, prefill_id, decode_id)]

    def _cost(self, request: RequestState) -> int:
        """Return how many tokens of a prompt no prompt before it has had, and remember them."""
        submission, num_tokens = request.submission, len(request.submission.prompt)
        fingerprint = self._registry.fingerprint
        if fingerprint is None or not reads_cache(submission.readout):
            return num_tokens
        if self._prefixes is None:
            self._prefixes = PrefixMemory(sum(worker.registration.num_blocks for worker in self._registry))
        names = self._names(request, fingerprint)
        num_held = self._prefixes.num_held(names) * fingerprint.block_size
        self._prefixes.note(names)
        return max(1, num_tokens - num_held)

    def _names(self, request: RequestState, fingerprint: KVFingerprint) -> tuple[BlockHash, ...]:
        if request.named_for is not fingerprint:
            submission = request.submission
            root = root_hash(fingerprint.model_hash, submission.cache_salt)
            request.names = tuple(block_hashes(submission.prompt, fingerprint.block_size, root))
            request.named_for = fingerprint
        return request.names

    def _key(self, worker_id: str) -> WorkerKey:
        worker = self._registry.get(worker_id)
        assert worker is not None, "chosen among those present"
        return worker.key

    def _move_streams(self, now_s: float) -> list[Instruction]:
        """Give streams of draining decode workers another pair, few at a time: each is computed again there."""
        draining = {worker.key for worker in self._registry.decodes if worker.is_draining}
        if not draining:
            return []
        out: list[Instruction] = []
        num_moving = sum(request.is_moving for request in self._by_transfer.values())
        for request in list(self._by_transfer.values()):
            placement = request.placement
            assert placement is not None
            if num_moving >= MAX_MOVING:
                break
            if placement.decode not in draining or not placement.is_steady or not request.is_worth_moving:
                continue
            demand = self._demand(request)
            pair = None if demand is None else self.loads.choose(demand, ())
            if demand is None or pair is None:
                break
            out += self._release(request, "its decode worker is draining")
            out += self._place(request, demand, pair.prefill_id, pair.decode_id, now_s)
            request.is_moving = True
            num_moving += 1
        return out

    # --- leaving workers ---

    def _current(self, transfer_id: int) -> RequestState | None:
        """Return the request whose present placement this is; others are history."""
        return self._by_transfer.get(transfer_id)

    def _left(self, key: WorkerKey, transfer_id: int) -> RequestState | None:
        """Note that a worker holds nothing of a present placement any more; None if the placement is history."""
        request = self._current(transfer_id)
        placement = None if request is None else request.placement
        if placement is None or key not in (placement.prefill, placement.decode):
            return None
        placement.prefill_holds &= placement.prefill != key
        placement.decode_holds &= placement.decode != key
        return request

    def _replace(self, request: RequestState, reason: str, now_s: float, place: bool = True) -> list[Instruction]:
        """Give up a placement that failed: queue the request again, or fail it when that happened too often."""
        request.num_failures += 1
        if request.num_failures < self._max_placements:
            out = self._requeue(request, reason, now_s)
            return out + (self._place_waiting(now_s) if place else [])
        error = RequestFailed(f"gave up after {request.num_failures} failed placements; the last: {reason}")
        return self._end(request, Fail(request.request_id, error), reason)

    def _requeue(
        self, request: RequestState, reason: str, waiting_since_s: float, yields: bool = False
    ) -> list[Instruction]:
        """Let a request wait again: before all that never had workers, unless it yields to one of these."""
        out = self._release(request, reason)
        request.waiting_since_s = waiting_since_s
        request.has_yielded |= yields
        request.is_charged &= not yields
        request.is_resumed = request.is_charged
        self._queue.add(request)
        return out

    def _end(self, request: RequestState, terminal: Terminal, reason: str) -> list[Instruction]:
        out = self._release(request, reason)
        self._queue.remove(request)
        self._resting.discard(request)
        del self._requests[request.request_id]
        return [*out, terminal]

    def _release(self, request: RequestState, reason: str) -> list[Instruction]:
        """End the present placement: abort it wherever it is held."""
        placement, request.placement = request.placement, None
        if placement is None:
            return []
        self._has_freed = True
        del self._by_transfer[placement.transfer_id]
        if placement.decode is not None:
            self._streams.give(request.submission.client)
        out: list[Instruction] = []
        sides = ((placement.prefill, placement.prefill_holds), (placement.decode, placement.decode_holds))
        for key, holds in sides:
            if key is None:
                continue
            self.loads.ended(placement.transfer_id, key)
            if holds:
                out.append(Send(key, Abort(transfer_id=placement.transfer_id, reason=reason[:4000])))
            for resting in self._resting:
                if resting in self._queue:
                    resting.retry_s.pop(key.worker_id, None)
        return out


def _is_token(row: TokenRow) -> bool:
    return 0 <= row.token_id < NUM_TOKEN_IDS


def _ended(row: TokenRow, reason: FinishReason) -> TokenRow:
    return TokenRow(row.request_id, row.epoch, row.index, row.token_id, reason, row.logprobs)
