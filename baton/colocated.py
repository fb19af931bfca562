"""Both roles in one process: one copy of the weights, one pool of KV blocks, one compute thread.

1. The model is loaded, its KV memory made once, and a queue opened for each role: on a GPU two streams, on
   multiprocessors of their own if asked (`--prefill-sms`).
2. The two workers are the ordinary ones, but a prompt goes from one to the other as the ids of its blocks
   (`engine/local_handoff.py`). The router sees a prefill and a decode worker that are linked with each other only.
3. Their steppers share the compute thread: a decode step, then one prefill chunk, then a decode step. On a CPU a chunk
   is what running streams wait for, so it is smaller here unless the user says otherwise. On a GPU a chunk is only
   launched, and decode has a turn between any two of its layers.
4. Both drain together: the one that ends takes the other along.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace

from decode.config import DecodeConfig
from decode.worker import DecodeWorker
from engine.compute_loop import ComputeLoop
from engine.loading import LoadedModel, load, pin_process
from engine.local_handoff import OnePool
from engine.service import WorkerService, drain_on_signals
from engine.stream_partition import open_role_queues
from prefill.config import PrefillConfig
from prefill.worker import PrefillWorker
from protocol.errors import ConfigError

log = logging.getLogger(__name__)

CPU_CHUNK_TOKENS = 64
GPU_CHUNK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class ColocatedConfig:
    """A prefill and a decode worker that share a process; their `engine` must be the same."""

    prefill: PrefillConfig
    decode: DecodeConfig

    def __post_init__(self) -> None:
        if self.prefill.engine != self.decode.engine:
            raise ConfigError("colocated: both roles must have the same engine configuration")
        if {self.prefill.transfer.transport, self.decode.transfer.transport} != {"inproc"}:
            raise ConfigError("colocated: the transport must be inproc, since nothing leaves the process")


class ColocatedWorkers:
    """Both workers on the running event loop, over one pool.

    Args:
        config: of both.
        model: loaded; its KV memory is made here, and on a GPU the decode graphs are recorded, which takes seconds.
        compute: the compute thread, not yet started and without steppers.

    Raises:
        ConfigError: the multiprocessors cannot be divided as asked.
    """

    def __init__(self, config: ColocatedConfig, model: LoadedModel, compute: ComputeLoop) -> None:
        queues = open_role_queues(model.device, config.prefill.num_sms)
        log.info("one pool of %d blocks for both roles: %s", model.num_blocks, queues.detail)
        one_pool = OnePool(model, queues)
        # The decode stepper comes first: where both have work, running streams go before a prompt's next chunk.
        self.decode = DecodeWorker(config.decode, model, compute, one_pool)
        chunk_tokens = GPU_CHUNK_TOKENS if model.device.type == "cuda" else CPU_CHUNK_TOKENS
        chunked = replace(config.prefill, chunk_tokens=config.prefill.chunk_tokens or chunk_tokens)
        self.prefill = PrefillWorker(chunked, model, compute, one_pool)

    @property
    def services(self) -> tuple[WorkerService, WorkerService]:
        """Prefill's and decode's."""
        return self.prefill.service, self.decode.service

    async def run(self) -> int:
        """Run both until they end; one that ends takes the other along. Return the worse exit code."""
        running = [asyncio.create_task(service.run()) for service in self.services]
        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for service in self.services:
            service.begin_drain()
        return max(await asyncio.gather(*running))


async def run(config: ColocatedConfig) -> int:
    """Run both workers until SIGTERM has drained them; return the exit code.

    Raises:
        ConfigError: model, device or sizes cannot be used.
    """
    engine = config.prefill.engine
    pin_process(engine.cores)
    model = await asyncio.to_thread(load, engine, log.info, config.prefill.cache_dir)
    compute = ComputeLoop(engine.num_threads)
    workers = ColocatedWorkers(config, model, compute)
    drain_on_signals(*workers.services)
    compute.start()
    try:
        await workers.prefill.measure()
        return await workers.run()
    finally:
        await compute.stop()
