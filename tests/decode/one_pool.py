"""Both steppers over one pool, without threads or sockets, and a small router that places again what gave way."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any, cast

from decode.scheduler import DecodeScheduler
from decode.stepper import Abandoned, DecodeStepper, DropSequence, GaveWay, NoRoom, ReserveBlocks, StepRows
from engine.batch import BatchItem
from engine.block_pool import BlockPool, PoolWatch
from engine.decode_runner import DecodeRunner, HostDecodeRunner, LaneDecodeRunner, LaneStep
from engine.execution import lane_sizes
from engine.kv_cache import KVCache
from engine.lane_state import LaneState
from engine.loading import LoadedModel
from engine.placement import sequence_of
from engine.runner import BatchRunner, DeviceRunner, Runner
from model.torch_decoder import TorchDecoder
from prefill.scheduler import PrefillJob, PrefillScheduler
from prefill.stepper import AbortJob, FirstTokenReady, PrefillStepper, ReadingsReady, Submit, layer_groups
from protocol.readout import ReadLabels
from protocol.request import FinishReason, SamplingParams, TokenRow
from protocol.wire import Prefill, Reserve
from tests.engine.late_queue import LateQueue

RUN_BUDGET_S = 40.0


@dataclass(frozen=True, slots=True)
class Runners:
    """One runner for each role, over the same KV memory; `runs_ahead` where a launch does not compute."""

    prefill: BatchRunner
    decode: DecodeRunner
    runs_ahead: bool


OpenRunners = Callable[[LoadedModel, KVCache, int], Runners]


def host_runners(model: LoadedModel, kv_cache: KVCache, max_num_seqs: int) -> Runners:
    """Give the runners of a CPU: whatever is launched is done."""
    runner = Runner(model.decoder, kv_cache)
    return Runners(runner, HostDecodeRunner(runner), False)


def late_runners(prefill_looks: int, decode_looks: int) -> OpenRunners:
    """Give the runners of a GPU, over CPU queues that tell late, each after so many looks."""

    def open_runners(model: LoadedModel, kv_cache: KVCache, max_num_seqs: int) -> Runners:
        assert isinstance(model.decoder, TorchDecoder)
        queue = LateQueue(decode_looks)
        sizes = replace(lane_sizes(model, max_num_seqs), num_biases=4, num_endings=4)
        state = LaneState(sizes, queue)
        step = LaneStep(model.decoder.with_own_scratch(), kv_cache, state, sizes)
        prefill = DeviceRunner(model.decoder.with_own_scratch(), kv_cache, LateQueue(prefill_looks))
        return Runners(prefill, LaneDecodeRunner(step, state, sizes, queue), True)

    return open_runners


class Watched:
    """A runner that knows which blocks its steps in flight read and write, until their results are taken.

    Attributes:
        other: the runner of the other role; it must not write what this one reads, nor read what this one writes.
    """

    def __init__(self, runner: Any, block_size: int) -> None:
        self._runner = runner
        self._block_size = block_size
        self.depth: int = runner.depth
        self.mark = getattr(runner, "mark", None)
        self.growth_blocks: int = getattr(runner, "growth_blocks", 0)
        self.other: Watched | None = None
        self.flights: list[tuple[set[int], set[int]]] = []

    def launch(self, items: Seq[BatchItem], *args: Any) -> Any:
        """Launch, and check against what the other role has in flight."""
        assert self.other is not None
        flight: tuple[set[int], set[int]] = (set(), set())
        for item in items:
            blocks, size = item.sequence.block_ids, self._block_size
            flight[0].update(blocks[: -(-(item.start + item.num_tokens) // size)])
            flight[1].update(blocks[item.start // size : -(-(item.start + item.num_tokens) // size)])
        self.flights.append(flight)
        for reads, writes in self.other.flights:
            assert not flight[0] & writes, "reads what the other role has not written yet"
            assert not flight[1] & reads, "writes what the other role still reads"
        return _WatchedFlight(self._runner.launch(items, *args), self, flight)

    @property
    def blocks(self) -> set[int]:
        """Blocks of all steps in flight."""
        return {block_id for reads, _ in self.flights for block_id in reads}


@dataclass(slots=True)
class _WatchedFlight:
    launched: Any
    runner: Watched
    flight: tuple[set[int], set[int]]

    def is_done(self) -> bool:
        return bool(self.launched.is_done())

    def results(self) -> Any:
        self.runner.flights.remove(self.flight)
        return self.launched.results()


class WatchedPool(BlockPool):
    """A pool that never gives out a block which a step in flight still touches."""

    runners: tuple[Watched, ...] = ()

    def allocate(self, num_blocks: int) -> list[int]:
        """Allocate and check."""
        blocks = super().allocate(num_blocks)
        for runner in self.runners:
            assert not runner.blocks & set(blocks), "a block came free while a step in flight had it"
        return blocks


@dataclass(slots=True)
class Request:
    """One request and what its client has."""

    request_id: int
    prompt: list[int]
    sampling: SamplingParams
    transfer_id: int | None = None
    tokens: list[int] = field(default_factory=list)
    rows: list[TokenRow] = field(default_factory=list)
    reason: FinishReason | None = None
    num_cached_tokens: int = 0


class OnePoolPair:
    """Prefill and decode over one pool, and every request that was submitted.

    Args:
        model: loaded.
        open_runners: what computes.
        num_blocks: of the pool; None takes the model's.
    """

    def __init__(
        self,
        model: LoadedModel,
        open_runners: OpenRunners = host_runners,
        *,
        num_blocks: int | None = None,
        chunk_tokens: int = 16,
        max_num_seqs: int = 16,
        watermark_blocks: int = 0,
    ) -> None:
        self.model = model
        size, num_blocks = model.fingerprint.block_size, num_blocks or model.num_blocks
        self.kv_cache = KVCache(model.fingerprint, num_blocks, model.device)
        self.pool = WatchedPool(num_blocks)
        watch = PoolWatch(self.pool)
        runners = open_runners(model, self.kv_cache, max_num_seqs)
        self.replays = runners.runs_ahead
        prefill, decode = Watched(runners.prefill, size), Watched(runners.decode, size)
        prefill.other, decode.other, self.pool.runners = decode, prefill, (prefill, decode)
        self.decode_scheduler = DecodeScheduler(
            self.pool, size, max_num_seqs, watermark_blocks, model.max_model_len, decode.growth_blocks,
            has_own_pool=False, hides_generated=runners.runs_ahead,
        )  # fmt: skip
        self.decode = DecodeStepper(decode, self.pool, self.decode_scheduler, self._from_decode, watch)
        self.prefill = PrefillStepper(
            cast(BatchRunner, prefill),
            self.pool,
            PrefillScheduler(self.pool, size, chunk_tokens, self.decode),
            self._from_prefill,
            block_size=size,
            layer_groups=layer_groups(model.fingerprint.num_layers, 2),
            layer_push_min_tokens=8,
            max_model_len=model.max_model_len,
        )
        self.prefill.share_pool(watch, self._between if runners.runs_ahead else None)
        self.requests: dict[int, Request] = {}
        self.waiting: deque[int] = deque()
        self.num_declined = self.num_gave_way = self.num_between = 0
        self.read: dict[int, tuple[float, ...]] = {}
        self._by_transfer: dict[int, Request] = {}
        self._transfer_ids = itertools.count(1)

    # --- the router's part ---

    def submit(self, request_id: int, prompt: list[int], sampling: SamplingParams) -> None:
        """Queue a request and place it as soon as a turn comes."""
        self.requests[request_id] = Request(request_id, prompt, sampling)
        self.waiting.append(request_id)

    def abort(self, request_id: int) -> None:
        """Forget a request wherever it is, decode first or prefill first by its number."""
        request = self.requests.pop(request_id)
        if request_id in self.waiting:
            self.waiting.remove(request_id)
        elif request.transfer_id is not None:
            self._drop(request.transfer_id, decode_first=request_id % 2 == 0)

    def place(self, request: Request, *, decode_first: bool = True) -> None:
        """Send RESERVE and PREFILL."""
        transfer_id = request.transfer_id = next(self._transfer_ids)
        self._by_transfer[transfer_id] = request
        needs_decode = request.sampling.max_tokens > 1
        reserve = Reserve(
            request_id=request.request_id, transfer_id=transfer_id, epoch=transfer_id, prefill_worker_id="p",
            prompt=tuple(request.prompt), emitted=tuple(request.tokens), is_replayed=self.replays,
            sampling=request.sampling,
        )  # fmt: skip
        message = Prefill(
            request_id=request.request_id, transfer_id=transfer_id, epoch=transfer_id, deadline_s=1.0,
            emitted=() if self.replays else tuple(request.tokens),
            decode_worker_id="d" if needs_decode else None, prompt=tuple(request.prompt), sampling=request.sampling,
        )  # fmt: skip
        now_s = time.monotonic()
        job = PrefillJob(sequence_of(message, self.model), message.decode_worker_id, now_s, now_s + 1)
        if needs_decode and decode_first:
            self.decode.handle(ReserveBlocks(sequence_of(reserve, self.model), "p"))
        if self._by_transfer.get(transfer_id) is request:  # not declined at once
            self.prefill.handle(Submit(job))
            if needs_decode and not decode_first:
                self.prefill.step()
                self.decode.handle(ReserveBlocks(sequence_of(reserve, self.model), "p"))

    def ask(self, prompt: list[int], token_ids: tuple[int, ...]) -> int:
        """Submit a readout of labels; they come into `read` under the number that is returned."""
        transfer_id = next(self._transfer_ids)
        message = Prefill(
            request_id=transfer_id, transfer_id=transfer_id, epoch=0, deadline_s=1.0, decode_worker_id=None,
            prompt=tuple(prompt), sampling=SamplingParams(seed=0, max_tokens=1),
            readout=ReadLabels(token_ids=token_ids),
        )  # fmt: skip
        now_s = time.monotonic()
        self.prefill.handle(Submit(PrefillJob(sequence_of(message, self.model), None, now_s, now_s + 1)))
        return transfer_id

    def place_waiting(self) -> None:
        """Place what waits, in order, until one is refused."""
        while self.waiting:
            request = self.requests[self.waiting.popleft()]
            num_declined = self.num_declined
            self.place(request, decode_first=request.request_id % 3 > 0)
            if self.num_declined > num_declined:
                return

    def turn(self) -> bool:
        """Place, then one turn of the compute thread; False when nobody has anything to do."""
        self.place_waiting()
        worked = [self.decode.step(), self.prefill.step()]
        return any(worked) or self.decode.is_waiting or self.prefill.is_waiting or bool(self.waiting)

    def run(self) -> None:
        """Go on until everything has ended."""
        deadline_s = time.monotonic() + RUN_BUDGET_S
        while self.turn():
            assert time.monotonic() < deadline_s, f"no end in sight: {self.waiting} wait, {self.pool.counts()}"
        unfinished = [r.request_id for r in self.requests.values() if r.reason is None]
        assert not unfinished, f"{unfinished} never ended; {self.pool.counts()}"
        self.pool.check(num_expected_leased=0)

    def tokens(self) -> dict[int, list[int]]:
        """Return every request's tokens."""
        return {request_id: request.tokens for request_id, request in self.requests.items()}

    def _drop(self, transfer_id: int, *, decode_first: bool) -> None:
        self._by_transfer.pop(transfer_id, None)
        if decode_first:
            self.decode.handle(DropSequence(transfer_id))
        self.prefill.handle(AbortJob(transfer_id))
        self.decode.handle(DropSequence(transfer_id))

    def _requeue(self, transfer_id: int) -> None:
        request = self._by_transfer.get(transfer_id)
        if request is not None:
            self._drop(transfer_id, decode_first=True)
            request.transfer_id = None
            self.waiting.append(request.request_id)

    # --- what the workers say ---

    def _between(self) -> None:
        self.num_between += 1
        self.decode.step()

    def _from_prefill(self, emission: object) -> None:
        if isinstance(emission, ReadingsReady):
            assert emission.transfer_id not in self.read, "read once"
            self.read[emission.transfer_id] = emission.labels
            return
        assert isinstance(emission, FirstTokenReady), "nothing is sent"
        request = self._by_transfer.get(emission.transfer_id)
        if request is None:
            return
        request.num_cached_tokens = emission.num_cached_tokens
        if not (self.replays and request.tokens):
            self._deliver(request, emission.row)
        if request.sampling.max_tokens == 1:
            assert emission.row.finish_reason is FinishReason.LENGTH

    def _from_decode(self, emission: object) -> None:
        if isinstance(emission, NoRoom):
            self.num_declined += 1
            self._requeue(emission.transfer_id)
        elif isinstance(emission, GaveWay):
            self.num_gave_way += 1
            self._requeue(emission.transfer_id)
        elif isinstance(emission, StepRows):
            for transfer_id, row in emission.rows:
                request = self._by_transfer.get(transfer_id)
                if request is not None:
                    self._deliver(request, row)
        else:
            assert isinstance(emission, Abandoned)

    def _deliver(self, request: Request, row: TokenRow) -> None:
        assert row.index == len(request.tokens), "every token once, in order"
        request.tokens.append(row.token_id)
        request.rows.append(row)
        request.reason = row.finish_reason
