"""How fast prompts are computed here: measured once, before the first of them, so that a router can refuse in time.

1. Chunks of zeros are computed for a moment, each four times as long as the one before, until they are long enough to
   be timed. The fastest counts.
2. A short one is computed once more behind a long context: what attention adds to a token.

The blocks that it writes are leased for it, and have no names: nobody finds what stands in them, and whatever is in use
stays as it is, whenever it comes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from engine.batch import BatchItem
from engine.block_pool import BlockPool
from engine.runner import BatchRunner
from engine.sequence import Sequence, num_blocks_for
from protocol.block_hash import root_hash
from protocol.request import SamplingParams

ENOUGH_S: Final = 0.03
BUDGET_S: Final = 0.12
TOO_LONG_S: Final = 1.0
MIN_PASSES: Final = 3
FIRST_TOKENS: Final = 16
CONTEXT_TOKENS: Final = 1024


@dataclass(frozen=True, slots=True)
class PromptPace:
    """What was measured.

    Attributes:
        tokens_per_s: of short prompts.
        context_share: what each token of context adds to the time of a prompt token, as a share of it.
    """

    tokens_per_s: float
    context_share: float = 0.0


def measure_prompts(
    runner: BatchRunner, pool: BlockPool, block_size: int, max_tokens: int, chunk_tokens: int
) -> PromptPace:
    """Return the pace of a prefill worker; on its compute thread. A pace of 0 is not known: no block is free.

    Args:
        runner: of the worker.
        pool: lends the blocks.
        block_size: tokens per block.
        max_tokens: that a prompt may have.
        chunk_tokens: most tokens of one step.
    """
    max_tokens = min(max_tokens, CONTEXT_TOKENS + chunk_tokens, pool.counts().free * block_size)
    if max_tokens == 0:
        return PromptPace(0.0)
    block_ids = pool.allocate(num_blocks_for(max_tokens, block_size))
    try:
        return _measured(runner, block_ids, max_tokens, chunk_tokens)
    finally:
        pool.release(block_ids)


def _measured(runner: BatchRunner, block_ids: list[int], max_tokens: int, chunk_tokens: int) -> PromptPace:
    sequence = Sequence(
        request_id=0,
        transfer_id=0,
        epoch=0,
        tokens=[0] * max_tokens,
        num_prompt_tokens=max_tokens,
        sampling=SamplingParams(seed=0),
        root=root_hash(""),
        names=[],
    )
    sequence.add_blocks(block_ids)

    def compute(start: int, num_tokens: int) -> None:
        runner.launch([BatchItem(sequence, start, num_tokens, wants_logits=False)]).results()

    pace, num_tokens = measure(lambda count: compute(0, count), min(chunk_tokens, max_tokens))
    context = min(CONTEXT_TOKENS, max_tokens - num_tokens)
    if context < CONTEXT_TOKENS // 8 or FIRST_TOKENS / pace > BUDGET_S:
        return PromptPace(pace)
    few = max(1, num_tokens // 4)
    pairs = [(_timed(compute, 0, few), _timed(compute, context, few)) for _ in range(2)]
    alone_s, behind_s = (min(found) for found in zip(*pairs, strict=True))
    return PromptPace(pace, max(0.0, behind_s / alone_s - 1.0) / context)


def measure(compute: Callable[[int], None], max_tokens: int) -> tuple[float, int]:
    """Return how many tokens a second are computed at best, and by how many at once that was measured last.

    Args:
        compute: computes so many tokens, and waits for them.
        max_tokens: at once.
    """
    num_tokens = min(FIRST_TOKENS, max_tokens)
    # The first time sets up what stays, and is no measure unless it takes too long to be done again.
    cold_s = _timed(compute, num_tokens)
    if cold_s > TOO_LONG_S:
        return num_tokens / cold_s, num_tokens
    best, spent_s, num_passes = 0.0, 0.0, 0
    while spent_s < BUDGET_S or num_passes < MIN_PASSES:
        took_s = _timed(compute, num_tokens)
        # Whatever else the machine is at while it starts only makes it look slower.
        best = max(best, num_tokens / max(took_s, 1e-9))
        spent_s, num_passes = spent_s + took_s, num_passes + 1
        if took_s < ENOUGH_S:
            num_tokens = min(4 * num_tokens, max_tokens)
    return best, num_tokens


def _timed(work: Callable[..., None], *arguments: int) -> float:
    begin_s = time.monotonic()
    work(*arguments)
    return time.monotonic() - begin_s
