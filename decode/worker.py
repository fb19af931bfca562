"""The decode worker: life of one placement.

1. `Reserve` comes from the router: hash the blocks, compile the grammar. When its prompt begins, as the prefill worker
   says (`decode/reservations.py`), ask the compute thread for room.
2. Granted: the transfer opens and GRANT goes to the prefill worker, with the number of leading blocks held already.
   No room: `Declined`, and the router places it elsewhere or later.
3. Pieces land in the granted blocks, on the event loop, beside the running steps.
4. COMMIT and every piece landed: the sequence joins the batch between two steps; tokens emitted before are replayed.
   Colocated with prefill, over one pool: 1. asks at once, for a slot alone, 2. and 3. fall away, and 4. comes from the
   prefill stepper beside this one, as the ids of the prompt's blocks (`engine/local_handoff.py`).
5. Every step sends one message with the new tokens to each router. A sequence ends by EOS, a stop token, its length
   limit or the end of the context; stop strings end it from the router by `Abort`.
"""

from __future__ import annotations

import asyncio
import logging
from typing import assert_never

from decode.config import DecodeConfig
from decode.reservations import Reservations
from decode.scheduler import DecodeScheduler
from decode.stepper import (
    Abandoned,
    DecodeEmission,
    DecodeStepper,
    DropSequence,
    GaveWay,
    Granted,
    JoinBatch,
    NoRoom,
    ReserveBlocks,
    StepRows,
)
from engine.block_pool import BlockPool, PoolWatch
from engine.compute_loop import ComputeLoop
from engine.decode_runner import DecodeRunner
from engine.execution import open_decode_runner, phases_agree, stays_on_device
from engine.grammar import GrammarSettled
from engine.loading import LoadedModel, load, pin_process
from engine.local_handoff import LocalLink, OnePool
from engine.placement import Failure, Placing, refusal_of
from engine.sequence import Sequence
from engine.service import WorkerService, drain_on_signals, new_registration
from kvtransfer.receiving import ReceiveSide
from kvtransfer.stats import TransferStats
from kvtransfer.tombstones import Ending
from kvtransfer.transport import Identity, Transport
from kvtransfer.transports import open_transport
from protocol.wire import (
    Declined,
    Links,
    PeerAddress,
    Preempted,
    Prefill,
    Reserve,
    Role,
    WorkerStats,
)

log = logging.getLogger(__name__)


class DecodeWorker:
    """One decode worker on the running event loop; computes on `compute`, which may be shared.

    Args:
        compute: the compute thread, not yet started.
        arrival: how KV arrives: over a transport, owned by the caller, or in a pool shared with a prefill worker.
    """

    def __init__(
        self, config: DecodeConfig, model: LoadedModel, compute: ComputeLoop, arrival: Transport | OnePool
    ) -> None:
        self._model = model
        self._compute = compute
        self._open_transfers: set[int] = set()
        self._placing: Placing[Reserve] = Placing(
            model, self._is_held, self._fail, lambda: compute.post(self._stepper, GrammarSettled())
        )
        self._reservations = Reservations(model.fingerprint.block_size, self._reserve)
        self._receiving: ReceiveSide | None = None
        self._link: LocalLink | ReceiveSide
        registration = new_registration(
            config.service,
            Role.DECODE,
            model.fingerprint,
            (model.num_blocks, config.max_num_seqs, model.max_model_len),
            model.backend,
            phases_agree(model),
        )
        if isinstance(arrival, OnePool):
            runner = open_decode_runner(model, arrival.kv_cache, config.max_num_seqs, log.info, arrival.queues.decode)
            self._stepper = arrival.taker = self._new_stepper(config, runner, arrival.pool, arrival.watch)
            self._link = LocalLink(arrival, self._announce_links)
        else:
            kv_cache = model.new_kv_cache()
            runner = open_decode_runner(model, kv_cache, config.max_num_seqs, log.info)
            self._stepper = self._new_stepper(config, runner, BlockPool(model.num_blocks), None)
            self._link = self._receiving = ReceiveSide(
                kv_cache,
                config.transfer,
                arrival,
                Identity(registration.worker_id, registration.instance, model.fingerprint),
                on_complete=self._on_landed,
                on_failed=self._on_transfer_failed,
                on_links=self._announce_links,
                on_broken=lambda error: self.service.on_dead(error),
            )
            self._receiving.on_begin = self._reservations.begins
        self.service = WorkerService(config.service, registration, self)
        compute.add(self._stepper, self.service.on_dead)

    def _new_stepper(
        self, config: DecodeConfig, runner: DecodeRunner, pool: BlockPool, watch: PoolWatch | None
    ) -> DecodeStepper:
        model = self._model
        scheduler = DecodeScheduler(
            pool,
            model.fingerprint.block_size,
            config.max_num_seqs,
            config.watermark_blocks,
            model.max_model_len,
            runner.growth_blocks,
            has_own_pool=watch is None,
            # A device computes prompts and single tokens with different kernels, whose bits may differ.
            hides_generated=stays_on_device(model),
        )
        return DecodeStepper(
            runner, pool, scheduler, lambda emission: self._compute.call_back(self._on_emission, emission), watch
        )

    async def close(self) -> None:
        """Close every link; open transfers are dropped."""
        await self._placing.close()
        if self._receiving is not None:
            await self._receiving.close()

    # --- RoleHandler ---

    def take(self, message: Prefill | Reserve) -> None:
        """Ask for room for a placement."""
        refusal = refusal_of(message, self._model) if isinstance(message, Reserve) else "this is a decode worker"
        if refusal is not None or not isinstance(message, Reserve):
            self._decline(message.transfer_id, refusal or "")
            return
        # In a common pool blocks come with the prompt anyway.
        self._placing.place(message, self._reserve if self._receiving is None else self._reservations.hold)

    def _reserve(self, message: Reserve, sequence: Sequence) -> None:
        self._compute.post(self._stepper, ReserveBlocks(sequence, message.prefill_worker_id))

    def abort(self, transfer_id: int, reason: str) -> None:
        """Forget a placement. Once the transfer is closed nothing writes into its blocks, so they may go."""
        self.service.release(transfer_id)
        self._reservations.drop(transfer_id)
        if self._receiving is not None and transfer_id in self._open_transfers:
            self._open_transfers.discard(transfer_id)
            self._receiving.abort(transfer_id, reason)
        self._compute.post(self._stepper, DropSequence(transfer_id))

    def set_members(self, peers: tuple[PeerAddress, ...]) -> None:
        """Link with exactly these prefill workers."""
        self._link.set_peers(peers)

    def stats(self) -> WorkerStats:
        """Return current gauges and counters."""
        stepper, counters = self._stepper, self._stepper.counters
        received = TransferStats(counters.num_taken) if self._receiving is None else self._receiving.stats
        pool = stepper.pool_counts
        return WorkerStats(
            blocks_free=pool.free,
            blocks_cached=pool.cached,
            blocks_leased=pool.leased,
            blocks_total=pool.total,
            blocks_promised=self._reservations.num_blocks,
            num_running=stepper.num_running,
            num_waiting=stepper.num_waiting,
            num_steps=counters.num_steps,
            num_computed_tokens=counters.num_computed_tokens,
            num_preemptions=stepper.num_preemptions,
            num_replayed_tokens=stepper.num_replayed_tokens,
            num_transfers=received.num_transfers,
            num_transfers_failed=received.num_transfers_failed,
            num_transfers_cancelled=received.num_transfers_cancelled,
            num_bytes_transferred=received.num_bytes,
            num_blocks_transferred=received.num_blocks,
            num_blocks_skipped=received.num_blocks_skipped,
            transfer_s=received.transfer_s,
            step_s=counters.step_s,
        )

    def progress(self) -> int:
        """Return the compute thread's progress."""
        return self._compute.progress

    def has_work(self) -> bool:
        """Whether a sequence is running; one that awaits its KV or its grammar is no work of the compute thread."""
        return self._stepper.num_running > self._stepper.num_behind

    # --- from compute and transfer ---

    def _on_emission(self, emission: DecodeEmission) -> None:
        if isinstance(emission, StepRows):
            self.service.tell_rows(emission.rows)
            for transfer_id, row in emission.rows:
                if row.finish_reason is not None:
                    self.service.release(transfer_id)
        elif isinstance(emission, Granted):
            self._open_transfer(emission)
        elif isinstance(emission, NoRoom):
            self._decline(emission.transfer_id, emission.reason)
        elif isinstance(emission, Abandoned):
            if emission.failure is not None:
                self.service.tell(emission.transfer_id, emission.failure.message(emission.transfer_id))
            self.service.release(emission.transfer_id)
        elif isinstance(emission, GaveWay):
            self.service.tell(emission.transfer_id, Preempted(transfer_id=emission.transfer_id))
            self.service.release(emission.transfer_id)
        else:
            assert_never(emission)

    def _open_transfer(self, granted: Granted) -> None:
        if not self.service.holds(granted.transfer_id):
            return  # aborted between the two threads: DropSequence is on its way to the compute thread
        assert self._receiving is not None, "nothing is granted in a common pool"
        self._open_transfers.add(granted.transfer_id)
        reserved = granted.reserved
        self._receiving.open(granted.transfer_id, granted.sender_id, reserved.block_ids, reserved.num_cached_blocks)

    def _on_landed(self, transfer_id: int, first_token_id: int) -> None:
        self._open_transfers.discard(transfer_id)
        self._compute.post(self._stepper, JoinBatch(transfer_id, first_token_id))

    def _on_transfer_failed(self, transfer_id: int, ending: Ending) -> None:
        self._open_transfers.discard(transfer_id)
        # What was called off its router knows of: the first token was the last, or it has aborted the other side first.
        if ending.is_failure:
            self._fail(transfer_id, Failure(ending.reason))
        else:
            self.service.release(transfer_id)
        self._compute.post(self._stepper, DropSequence(transfer_id))

    def _is_held(self, transfer_id: int) -> bool:
        return self.service.holds(transfer_id)

    def _fail(self, transfer_id: int, failure: Failure) -> None:
        self.service.tell(transfer_id, failure.message(transfer_id))
        self.service.release(transfer_id)

    def _decline(self, transfer_id: int, reason: str) -> None:
        self.service.tell(transfer_id, Declined(transfer_id=transfer_id, reason=reason[:4000]))
        self.service.release(transfer_id)

    def _announce_links(self) -> None:
        self.service.announce(Links(peers=self._link.links))


async def run(config: DecodeConfig) -> int:
    """Run a decode worker until SIGTERM has drained it; return the exit code.

    Raises:
        ConfigError: model, device or sizes cannot be used.
    """
    pin_process(config.engine.cores)
    model = await asyncio.to_thread(load, config.engine, log.info, config.cache_dir)
    transport = open_transport(config.transfer, config.service.secret)
    compute = ComputeLoop(config.engine.num_threads)
    worker = DecodeWorker(config, model, compute, transport)
    drain_on_signals(worker.service)
    compute.start()
    try:
        return await worker.service.run()
    finally:
        await worker.close()
        await transport.close()
        await compute.stop()
