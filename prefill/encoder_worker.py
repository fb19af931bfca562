"""A prefill worker whose model is an encoder: life of one text.

1. `Prefill` comes from the router with a `ReadEmbedding`: the text is queued on the compute thread. 2. A step computes
it whole, with others that are due. 3. `Readings` go to the router; nothing is kept. An abort forgets a text that waits.

There is no KV: no pool, no transfer, no decode worker, and no port for one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial

import msgspec

from engine.compute_loop import ComputeLoop
from engine.encoder_loading import LoadedEncoder, load_embedder
from engine.encoder_stepper import AbortText, EncoderStepper, SubmitText, Text, VectorReady, compute_text
from engine.service import WorkerService, drain_on_signals, new_registration
from prefill.config import PrefillConfig
from prefill.self_test import measure
from protocol.readout import ReadEmbedding
from protocol.wire import Declined, PeerAddress, Prefill, Readings, Reserve, Role, WorkerStats

log = logging.getLogger(__name__)

CPU_BATCH_TOKENS = 1024
GPU_BATCH_TOKENS = 32768


class EncoderWorker:
    """One worker on the running event loop; computes on `compute`, not yet started.

    Args:
        tokens_per_s: its own pace, as it was measured; 0 is unknown.
    """

    def __init__(
        self, config: PrefillConfig, model: LoadedEncoder, compute: ComputeLoop, tokens_per_s: float = 0.0
    ) -> None:
        self._model = model
        self._compute = compute
        is_gpu = model.encoder.device.type == "cuda"
        batch_tokens = config.chunk_tokens or (GPU_BATCH_TOKENS if is_gpu else CPU_BATCH_TOKENS)
        self._stepper = EncoderStepper(model.encoder, batch_tokens, lambda v: compute.call_back(self._deliver, v))
        sizes = (0, config.max_num_seqs, model.max_tokens)
        registration = new_registration(
            config.service, Role.PREFILL, model.fingerprint, sizes, model.backend, phases_agree=True
        )
        registration = msgspec.structs.replace(registration, embedding=model.card, prompt_tokens_per_s=tokens_per_s)
        self.service = WorkerService(config.service, registration, self)
        compute.add(self._stepper, self.service.on_dead)

    # --- RoleHandler ---

    def take(self, message: Prefill | Reserve) -> None:
        """Queue a text, or decline it."""
        refusal = self._refusal(message)
        if refusal is not None or not isinstance(message, Prefill) or not isinstance(message.readout, ReadEmbedding):
            self.service.tell(message.transfer_id, Declined(transfer_id=message.transfer_id, reason=refusal or ""))
            self.service.release(message.transfer_id)
            return
        now_s = time.monotonic()
        text = Text(
            message.transfer_id,
            message.prompt,
            message.readout,
            now_s,
            now_s + message.deadline_s,
            message.client,
            message.weight,
            message.rank,
        )
        self._compute.post(self._stepper, SubmitText(text))

    def abort(self, transfer_id: int, reason: str) -> None:
        """Forget a text; idempotent."""
        self._compute.post(self._stepper, AbortText(transfer_id))
        self.service.release(transfer_id)

    def set_members(self, peers: tuple[PeerAddress, ...]) -> None:
        """Nobody is talked to but routers: nothing to do."""

    def stats(self) -> WorkerStats:
        """Return current gauges and counters."""
        stepper = self._stepper
        return WorkerStats(
            num_running=stepper.num_running,
            num_waiting=stepper.num_waiting,
            queued_tokens=stepper.queued_tokens,
            num_steps=stepper.num_steps,
            num_computed_tokens=stepper.num_computed_tokens,
            step_s=stepper.step_s,
        )

    def progress(self) -> int:
        """Return the compute thread's progress."""
        return self._compute.progress

    def has_work(self) -> bool:
        """Whether texts wait to be computed."""
        return self._stepper.queued_tokens > 0

    # --- from compute ---

    def _deliver(self, vectors: list[VectorReady]) -> None:
        for ready in vectors:
            message = Readings(
                transfer_id=ready.transfer_id,
                embedding=ready.vector,
                num_cached_tokens=0,
                queue_s=ready.queue_s,
                prefill_s=ready.compute_s,
            )
            self.service.tell(ready.transfer_id, message)
            self.service.release(ready.transfer_id)

    def _refusal(self, message: Prefill | Reserve) -> str | None:
        if not isinstance(message, Prefill) or not isinstance(message.readout, ReadEmbedding):
            return "this worker only embeds"
        if not 1 <= len(message.prompt) <= self._model.max_tokens:
            return f"{len(message.prompt)} tokens; this worker takes 1 to {self._model.max_tokens}"
        vocab_size = self._model.encoder.config.vocab_size
        if max(message.prompt) >= vocab_size:
            return f"token id {max(message.prompt)} is not in the vocabulary of {vocab_size}"
        if self._stepper.num_running + self._stepper.num_waiting >= self.service.registration.max_num_seqs:
            return "queue full"
        return None


async def run_encoder(config: PrefillConfig) -> int:
    """Run an encoder's worker until SIGTERM has drained it; return the exit code.

    Raises:
        ConfigError: model, device or options cannot be used.
    """
    model = await asyncio.to_thread(load_embedder, config.engine, config.pooling, log.info, config.cache_dir)
    # What torch sets up at first is set up here, and no client waits for it.
    compute_tokens = partial(compute_text, model.encoder)
    pace, _ = await asyncio.to_thread(measure, compute_tokens, min(model.max_tokens, CPU_BATCH_TOKENS))
    compute = ComputeLoop(config.engine.num_threads)
    worker = EncoderWorker(config, model, compute, pace)
    drain_on_signals(worker.service)
    try:
        compute.start()
        return await worker.service.run()
    finally:
        await compute.stop()
