"""Tokens as their consumer sees them: a decode worker's compute thread on one side, an event loop on the other.

1. Every sequence is reserved, as if a prefill worker were about to send its prompt.
2. Once all are granted they are committed together: their KV stands there already, noise of the stated length.
3. Each step's `StepRows` arrives on the event loop and gets a timestamp. Steps that lack a stream are not counted.

This is all of the decode worker but its socket: scheduler, compute thread, lanes, graphs, fetching, the hop to the
loop. What it leaves out is the message to the router, detokenising and HTTP.
"""

from __future__ import annotations

import asyncio
import random
import time

from bench.gpu.rig import Rig
from decode.scheduler import DecodeScheduler
from decode.stepper import (
    DecodeEmission,
    DecodeStepper,
    Granted,
    JoinBatch,
    NoRoom,
    ReserveBlocks,
    StepRows,
)
from engine.block_pool import BlockPool
from engine.compute_loop import ComputeLoop
from engine.decode_runner import Compute

BUDGET_S = 120.0
# Streams join within a step or two of each other; those that joined first also end first.
_SLACK_STEPS = 24


class Consumer:
    """Takes a stepper's emissions on the event loop, and drives it through one window.

    Attributes:
        arrivals: when rows came, and of how many streams.
    """

    def __init__(self, batch: int) -> None:
        self.arrivals: list[tuple[float, int]] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.all_granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._batch = batch
        self._num_granted = self._num_ended = 0

    def take(self, emission: DecodeEmission) -> None:
        """Take one emission."""
        now_s = time.perf_counter()
        if isinstance(emission, StepRows):
            self.arrivals.append((now_s, len(emission.rows)))
            self._num_ended += sum(row.finish_reason is not None for _, row in emission.rows)
            if self._num_ended == self._batch and not self.done.done():
                self.done.set_result(None)
        elif isinstance(emission, Granted):
            self._num_granted += 1
            if self._num_granted == self._batch:
                self.all_granted.set_result(None)
        else:
            words = emission.reason if isinstance(emission, NoRoom) else "a stream was preempted"
            self.fail(RuntimeError(words))

    def fail(self, error: BaseException) -> None:
        """End the window with an error."""
        for waiting in (self.all_granted, self.done):
            if not waiting.done():
                waiting.set_exception(error)

    def gaps_s(self, num_warm_steps: int) -> list[float]:
        """Return the gaps between steps in which every stream took part."""
        full = [at_s for at_s, num_rows in self.arrivals if num_rows == self._batch][num_warm_steps:]
        return [b - a for a, b in zip(full, full[1:], strict=False)]


async def client_gaps_s(
    rig: Rig, compute: Compute, batch: int, context_tokens: int, num_steps: int, num_warm_steps: int
) -> list[float]:
    """Return the gaps between tokens of `batch` streams whose context is so long on average over the steps counted."""
    runner, pool = rig.new_runner(compute), shuffled_pool(rig.num_blocks)
    block_size = rig.loaded.fingerprint.block_size
    scheduler = DecodeScheduler(pool, block_size, batch, 0, rig.max_model_len, runner.growth_blocks)
    loop, consumer = ComputeLoop(1), Consumer(batch)
    stepper = DecodeStepper(runner, pool, scheduler, lambda emission: loop.call_back(consumer.take, emission))
    loop.add(stepper, consumer.fail)
    loop.start()
    try:
        num_prompt_tokens = max(1, context_tokens - num_steps // 2 - num_warm_steps)
        max_tokens = 1 + num_warm_steps + num_steps + _SLACK_STEPS
        ids = []
        for _ in range(batch):
            sequence = rig.sequence(num_prompt_tokens, max_tokens)
            ids.append(sequence.transfer_id)
            loop.post(stepper, ReserveBlocks(sequence, "bench"))
        await _within_budget(consumer.all_granted, "granted")
        for transfer_id in ids:
            loop.post(stepper, JoinBatch(transfer_id, 3))
        await _within_budget(consumer.done, "done")
    finally:
        await loop.stop()
    return consumer.gaps_s(num_warm_steps)[:num_steps]


async def _within_budget(waiting: asyncio.Future[None], what: str) -> None:
    try:
        await asyncio.wait_for(waiting, BUDGET_S)
    except TimeoutError as error:
        raise TimeoutError(f"the streams were not {what} within {BUDGET_S:.0f} s") from error


def shuffled_pool(num_blocks: int) -> BlockPool:
    """Give a pool whose blocks come in no order, as they do after hours of service."""
    pool = BlockPool(num_blocks)
    blocks = pool.allocate(num_blocks)
    random.Random(0).shuffle(blocks)
    pool.release(blocks)
    return pool
