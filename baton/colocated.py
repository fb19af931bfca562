"""Both roles in one process: one copy of the weights, one compute thread, the hand-off over `inproc`.

The two workers are the ordinary ones. Their steppers share the compute thread, which gives them turns: a decode step,
then one prefill chunk, then a decode step. A chunk is what a running stream waits for, so it is smaller here unless the
user says otherwise. The router sees a prefill and a decode worker that are linked with each other only.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace

from decode.config import DecodeConfig
from decode.worker import DecodeWorker
from engine.compute_loop import ComputeLoop
from engine.loading import load, pin_process
from engine.service import WorkerService, drain_on_signals
from kvtransfer.transports import open_transport
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
            raise ConfigError("colocated: the transport must be inproc")


async def _run_together(*services: WorkerService) -> int:
    """Run all until they end; one that ends takes the others along. Return the worst exit code."""
    running = [asyncio.create_task(service.run()) for service in services]
    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    for service in services:
        service.begin_drain()
    return max(await asyncio.gather(*running))


async def run(config: ColocatedConfig) -> int:
    """Run both workers until SIGTERM has drained them; return the exit code.

    Raises:
        ConfigError: model, device or sizes cannot be used.
    """
    engine = config.prefill.engine
    pin_process(engine.cores)
    model = await asyncio.to_thread(load, engine, log.info, config.prefill.cache_dir, 2)
    transport = open_transport(config.prefill.transfer, config.prefill.service.secret)
    compute = ComputeLoop(engine.num_threads)
    # The decode stepper comes first: when both have work, tokens of running streams go before a prompt's next chunk.
    decode = DecodeWorker(config.decode, model, compute, transport)
    chunk_tokens = GPU_CHUNK_TOKENS if model.device.type == "cuda" else CPU_CHUNK_TOKENS
    chunked = replace(config.prefill, chunk_tokens=config.prefill.chunk_tokens or chunk_tokens)
    prefill = PrefillWorker(chunked, model, compute, transport)
    drain_on_signals(prefill.service, decode.service)
    try:
        await prefill.start()
        compute.start()
        return await _run_together(prefill.service, decode.service)
    finally:
        await decode.close()
        await prefill.close()
        await transport.close()
        await compute.stop()
