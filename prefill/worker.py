"""The prefill worker: life of one placement.

0. Before it registers the worker has measured its own pace, which its registration tells (prefill/self_test.py).
1. `Prefill` comes from the router: hash the prompt's blocks, compile its grammar, queue it on the compute thread.
2. The prompt begins: its blocks are held, the transfer to the decode worker opens, which reserves blocks there now.
3. Chunks are computed, short prompts first; each finished group of layers is pushed while the next computes.
4. The first token is sampled and goes to the router at once; COMMIT follows the last piece to the decode worker.
5. LANDED, a failure or an abort ends the transfer: the blocks become evictable prefix cache. A failed transfer is
   reported, and the router places the request again.
Colocated with decode, over one pool, nothing is sent: with step 4 the decode stepper beside this one holds the prompt's
blocks, and the placement ends here (`engine/local_handoff.py`).
A request that needs no decode worker (`decode_worker_id` is None, or its first token ends it) stops after step 4. So
does a readout, whose `Readings` stand for the first token. Where the model is an encoder: `prefill/encoder_worker.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from functools import partial

import msgspec

from engine.block_pool import BlockPool, PoolCounts
from engine.compute_loop import ComputeLoop
from engine.encoder_loading import is_encoder_model
from engine.execution import open_batch_runner, phases_agree, stays_on_device
from engine.grammar import GrammarSettled
from engine.loading import LoadedModel, load, pin_process
from engine.local_handoff import TRANSPORT as LOCAL
from engine.local_handoff import OnePool, PromptTaker
from engine.placement import Failure, Placing, refusal_of
from engine.runner import BatchRunner
from engine.sequence import Sequence
from engine.service import WorkerService, drain_on_signals, new_registration
from kvtransfer.sending import SendSide
from kvtransfer.stats import TransferStats
from kvtransfer.tombstones import Ending
from kvtransfer.transport import Identity, Listener, Transport
from kvtransfer.transports import open_transport
from prefill.config import PrefillConfig
from prefill.encoder_worker import run_encoder
from prefill.scheduler import PrefillJob, PrefillScheduler
from prefill.self_test import PromptPace
from prefill.stepper import (
    AbortJob,
    CellsReady,
    FirstTokenReady,
    Measure,
    PrefillEmission,
    PrefillStepper,
    PromptFailed,
    ReadingsReady,
    Started,
    Submit,
    TransferEnded,
    layer_groups,
)
from protocol.errors import ConfigError
from protocol.readout import EmbeddingCard, Pooling
from protocol.wire import (
    Declined,
    FirstToken,
    PeerAddress,
    Prefill,
    Readings,
    Reserve,
    Role,
    WorkerStats,
)

log = logging.getLogger(__name__)

CPU_CHUNK_TOKENS = 256
GPU_CHUNK_TOKENS = 2048
MEASURE_BUDGET_S = 5.0


class PrefillWorker:
    """One prefill worker on the running event loop; computes on `compute`, which may be shared.

    Args:
        compute: the compute thread, not yet started.
        departure: how KV leaves: over a transport, owned by the caller, or in a pool shared with a decode worker, which
            has been made and added to `compute` before.
    """

    def __init__(
        self, config: PrefillConfig, model: LoadedModel, compute: ComputeLoop, departure: Transport | OnePool
    ) -> None:
        self._model = model
        self._compute = compute
        self._departure = departure
        self._listener: Listener | None = None
        self._sending: SendSide | None = None
        self._open_transfers: set[int] = set()
        self._is_measured = asyncio.Event()
        self._placing: Placing[Prefill] = Placing(
            model, self._is_held, self._fail, lambda: compute.post(self._stepper, GrammarSettled())
        )
        registration = new_registration(
            config.service,
            Role.PREFILL,
            model.fingerprint,
            (model.num_blocks, config.max_num_seqs, model.max_model_len),
            model.backend,
            phases_agree(model),
        )
        registration = msgspec.structs.replace(registration, embedding=_embedding_card(config, model))
        if isinstance(departure, OnePool):
            address = PeerAddress(worker_id=registration.worker_id, instance=registration.instance, transport=LOCAL)
            departure.address, registration = address, msgspec.structs.replace(registration, address=address)
            self._stepper = self._new_local_stepper(config, departure)
        else:
            kv_cache, pool = model.new_kv_cache(), BlockPool(model.num_blocks)
            self._stepper = self._new_stepper(config, open_batch_runner(model, kv_cache), pool, None)
            self._sending = SendSide(
                kv_cache,
                config.transfer,
                self._on_transfer_ended,
                lambda error: self.service.on_dead(error),
            )
        self.service = WorkerService(config.service, registration, self)
        compute.add(self._stepper, self.service.on_dead)

    def _new_stepper(
        self, config: PrefillConfig, runner: BatchRunner, pool: BlockPool, taker: PromptTaker | None
    ) -> PrefillStepper:
        model = self._model
        chunk_tokens = config.chunk_tokens or (GPU_CHUNK_TOKENS if model.device.type == "cuda" else CPU_CHUNK_TOKENS)
        return PrefillStepper(
            runner,
            pool,
            PrefillScheduler(pool, model.fingerprint.block_size, chunk_tokens, taker),
            lambda emission: self._compute.call_back(self._on_emission, emission),
            block_size=model.fingerprint.block_size,
            layer_groups=layer_groups(model.fingerprint.num_layers, config.num_layer_groups),
            layer_push_min_tokens=config.layer_push_min_tokens,
            max_model_len=model.max_model_len,
        )

    def _new_local_stepper(self, config: PrefillConfig, one_pool: OnePool) -> PrefillStepper:
        assert one_pool.taker is not None, "the decode worker is made first"
        runner = open_batch_runner(self._model, one_pool.kv_cache, one_pool.queues.prefill)
        stepper = self._new_stepper(config, runner, one_pool.pool, one_pool.taker)
        # Where a launch computes, it is over before anybody could have a turn in the middle of it.
        between = partial(self._compute.give_turns, stepper) if stays_on_device(self._model) else None
        stepper.share_pool(one_pool.watch, between)
        return stepper

    async def start(self) -> None:
        """Open the port where decode workers connect, if they do; registration follows with `service.run`."""
        if isinstance(self._departure, OnePool):
            return
        registration = self.service.registration
        identity = Identity(
            registration.worker_id, registration.instance, self._model.fingerprint, self._sender.slot_store
        )
        self._listener = await self._departure.listen(identity, self._sender.serve)
        self.service.registration = msgspec.structs.replace(registration, address=self._listener.address)

    async def measure(self) -> None:
        """Measure how fast prompts are computed here, and let the registration say so; once compute has started."""
        self._compute.post(self._stepper, Measure())
        with suppress(TimeoutError):
            async with asyncio.timeout(MEASURE_BUDGET_S):
                await self._is_measured.wait()

    def _note_pace(self, pace: PromptPace) -> None:
        registration = self.service.registration
        self.service.registration = msgspec.structs.replace(
            registration, prompt_tokens_per_s=pace.tokens_per_s, context_share=pace.context_share
        )
        log.info("computes %.0f prompt tokens a second here, by a test of its own", pace.tokens_per_s)
        self._is_measured.set()

    @property
    def _sender(self) -> SendSide:
        assert self._sending is not None, "nothing is sent in a common pool"
        return self._sending

    async def close(self) -> None:
        """Close the peer port and every connection; open transfers end as failed."""
        await self._placing.close()
        if self._listener is not None:
            await self._listener.close()
        if self._sending is not None:
            await self._sending.close()

    # --- RoleHandler ---

    def take(self, message: Prefill | Reserve) -> None:
        """Queue a placement."""
        refusal = self._refusal(message)
        if refusal is not None or not isinstance(message, Prefill):
            self.service.tell(message.transfer_id, Declined(transfer_id=message.transfer_id, reason=refusal or ""))
            self.service.release(message.transfer_id)
            return
        self._placing.place(message, partial(self._submit, time.monotonic()))

    def _submit(self, arrived_s: float, message: Prefill, sequence: Sequence) -> None:
        job = PrefillJob(
            sequence,
            message.decode_worker_id,
            arrived_s,
            arrived_s + message.deadline_s,
            message.client,
            message.weight,
            message.rank,
        )
        self._compute.post(self._stepper, Submit(job))

    def abort(self, transfer_id: int, reason: str) -> None:
        """Forget a placement; its blocks are freed once no transfer reads them."""
        self._compute.post(self._stepper, AbortJob(transfer_id))
        # Released first, so that the end of its transfer is not reported as a failure.
        self.service.release(transfer_id)
        if transfer_id in self._open_transfers:
            self._sender.abort(transfer_id, reason)

    def set_members(self, peers: tuple[PeerAddress, ...]) -> None:
        """Prefill workers wait to be dialled: nothing to do."""

    def stats(self) -> WorkerStats:
        """Return current gauges and counters."""
        stepper, counters = self._stepper, self._stepper.counters
        # A common pool is the decode worker's to report: whoever adds workers up counts each block once.
        sent, pool = TransferStats(), PoolCounts(0, 0, 0, 0)
        if self._sending is not None:
            sent, pool = self._sending.stats, stepper.pool_counts
        return WorkerStats(
            blocks_free=pool.free,
            blocks_cached=pool.cached,
            blocks_leased=pool.leased,
            blocks_total=pool.total,
            num_running=stepper.num_running,
            num_waiting=stepper.num_waiting,
            queued_tokens=stepper.queued_tokens,
            num_steps=counters.num_steps,
            num_computed_tokens=counters.num_computed_tokens,
            num_cached_tokens=counters.num_cached_tokens,
            num_transfers=sent.num_transfers,
            num_transfers_failed=sent.num_transfers_failed,
            num_transfers_cancelled=sent.num_transfers_cancelled,
            num_bytes_transferred=sent.num_bytes,
            num_blocks_transferred=sent.num_blocks,
            num_blocks_skipped=sent.num_blocks_skipped,
            transfer_s=sent.transfer_s,
            step_s=counters.step_s,
        )

    def progress(self) -> int:
        """Return the compute thread's progress."""
        return self._compute.progress

    def has_work(self) -> bool:
        """Whether prompt tokens wait to be computed; a transfer under way is no work of the compute thread."""
        return self._stepper.queued_tokens > 0

    # --- from compute and transfer ---

    def _on_emission(self, emission: PrefillEmission) -> None:
        if isinstance(emission, Started):
            self._begin_transfer(emission)
        elif isinstance(emission, CellsReady):
            if emission.transfer_id in self._open_transfers:
                self._sender.ready(emission.transfer_id, emission.cells)
        elif isinstance(emission, PromptFailed):
            self._fail(emission.transfer_id, emission.failure)
        elif isinstance(emission, PromptPace):
            self._note_pace(emission)
        elif isinstance(emission, ReadingsReady):
            self._deliver_readings(emission)
        else:
            self._deliver(emission)

    def _begin_transfer(self, started: Started) -> None:
        if started.receiver_id is None:
            return
        if not self.service.holds(started.transfer_id):
            # Aborted between the two threads: the answer that Started asks for.
            self._compute.post(self._stepper, TransferEnded(started.transfer_id))
            return
        self._open_transfers.add(started.transfer_id)
        self._sender.open(started.transfer_id, started.receiver_id, started.block_ids)

    def _deliver(self, first: FirstTokenReady) -> None:
        transfer_id = first.transfer_id
        self.service.tell(
            transfer_id,
            FirstToken(
                transfer_id=transfer_id,
                row=first.row,
                num_cached_tokens=first.num_cached_tokens,
                queue_s=first.queue_s,
                prefill_s=first.prefill_s,
            ),
        )
        is_open = transfer_id in self._open_transfers
        if is_open and first.row.finish_reason is None:
            self._sender.commit(transfer_id, first.row.token_id)
            return
        self.service.release(transfer_id)
        if is_open:
            self._sender.abort(transfer_id, "finished with its first token")

    def _deliver_readings(self, ready: ReadingsReady) -> None:
        message = Readings(
            transfer_id=ready.transfer_id,
            labels=ready.labels,
            prompt=ready.prompt,
            embedding=ready.embedding,
            num_cached_tokens=ready.num_cached_tokens,
            queue_s=ready.queue_s,
            prefill_s=ready.prefill_s,
        )
        self.service.tell(ready.transfer_id, message)
        self.service.release(ready.transfer_id)

    def _on_transfer_ended(self, transfer_id: int, ending: Ending | None) -> None:
        self._open_transfers.discard(transfer_id)
        self._compute.post(self._stepper, TransferEnded(transfer_id))
        if ending is not None and self.service.holds(transfer_id):
            self._compute.post(self._stepper, AbortJob(transfer_id))
            if ending.is_failure:
                self.service.tell(transfer_id, Failure(ending.reason).message(transfer_id))
        self.service.release(transfer_id)

    def _is_held(self, transfer_id: int) -> bool:
        return self.service.holds(transfer_id)

    def _fail(self, transfer_id: int, failure: Failure) -> None:
        self.service.tell(transfer_id, failure.message(transfer_id))
        self.service.release(transfer_id)
        if transfer_id in self._open_transfers:
            self._sender.abort(transfer_id, failure.reason)

    def _refusal(self, message: Prefill | Reserve) -> str | None:
        if not isinstance(message, Prefill):
            return "this is a prefill worker"
        if self._stepper.num_running + self._stepper.num_waiting >= self.service.registration.max_num_seqs:
            return "queue full"
        return refusal_of(message, self._model)


def _embedding_card(config: PrefillConfig, model: LoadedModel) -> EmbeddingCard | None:
    """Return what vectors this worker gives; raises ConfigError for a pooling that decoders lack."""
    if config.pooling == Pooling.CLS:
        raise ConfigError("pooling: cls is for encoders; the first token of a decoder has seen nothing")
    if model.embedding is None or config.pooling == "auto":
        return model.embedding
    return msgspec.structs.replace(model.embedding, pooling=Pooling(config.pooling))


async def run(config: PrefillConfig) -> int:
    """Run a prefill worker until SIGTERM has drained it; return the exit code.

    Raises:
        ConfigError: model, device or sizes cannot be used.
    """
    pin_process(config.engine.cores)
    if await asyncio.to_thread(is_encoder_model, config.engine, config.cache_dir):
        return await run_encoder(config)
    model = await asyncio.to_thread(load, config.engine, log.info, config.cache_dir)
    transport = open_transport(config.transfer, config.service.secret)
    compute = ComputeLoop(config.engine.num_threads)
    worker = PrefillWorker(config, model, compute, transport)
    drain_on_signals(worker.service)
    try:
        await worker.start()
        compute.start()
        await worker.measure()
        return await worker.service.run()
    finally:
        await worker.close()
        await transport.close()
        await compute.stop()
