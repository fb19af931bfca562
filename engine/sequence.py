"""A sequence: the tokens of one placement of a request, and the blocks that hold their KV."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.grammar import GrammarState
from protocol.block_hash import BlockHash
from protocol.readout import Readout
from protocol.request import SamplingParams


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable state of one sequence; owned by the compute thread.

    Attributes:
        tokens: prompt followed by output; `num_prompt_tokens` says where the output starts.
        num_prefill_tokens: leading tokens that a prefill worker computes: the prompt, and the output of earlier
            placements where the phases agree bit by bit. 0 stands for the prompt.
        num_computed_tokens: tokens whose KV stands in the blocks.
        names: hashes of the full blocks known so far, in order, starting from the root of model and tenant.
        grammar: what its next token must obey; stands after the tokens of `output`.
        readout: what the prompt is computed for instead of output, if it is.
    """

    request_id: int
    transfer_id: int
    epoch: int
    tokens: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    root: BlockHash
    names: list[BlockHash]
    grammar: GrammarState | None = None
    num_prefill_tokens: int = 0
    num_computed_tokens: int = 0
    readout: Readout | None = None
    block_ids: list[int] = field(default_factory=list)
    block_table: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, dtype=np.int32))

    def __post_init__(self) -> None:
        self.num_prefill_tokens = self.num_prefill_tokens or self.num_prompt_tokens

    @property
    def output(self) -> list[int]:
        """Output tokens so far."""
        return self.tokens[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        """How many output tokens there are."""
        return len(self.tokens) - self.num_prompt_tokens

    def add_blocks(self, block_ids: list[int]) -> None:
        """Append leased blocks; the table grows by doubling, so that a step copies no list."""
        first, last = len(self.block_ids), len(self.block_ids) + len(block_ids)
        if last > len(self.block_table):
            grown = np.zeros(max(last, 2 * len(self.block_table)), dtype=np.int32)
            grown[:first] = self.block_table[:first]
            self.block_table = grown
        self.block_table[first:last] = block_ids
        self.block_ids.extend(block_ids)

    def take_blocks(self) -> list[int]:
        """Return the blocks and forget them: the caller releases them."""
        block_ids, self.block_ids = self.block_ids, []
        return block_ids


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Return how many blocks hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)
