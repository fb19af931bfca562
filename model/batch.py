"""What one forward pass works on: token rows of one or more sequences, and where their KV stands."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One forward: T token rows of S sequences, concatenated in order; R of the rows get logits.

    All tensors live on the model's device. A sequence's rows are its tokens at positions
    `seq_len - num_queries .. seq_len - 1`, so that its cached context lies before them in its block table.

    token_ids: `[T]` int64.
    positions: `[T]` int64, the place of each token in its sequence.
    slot_mapping: `[T]` int64, `block_id * block_size + offset` where the token's KV is written; -1 writes nothing.
    query_start: `[S+1]` int32, the first row of each sequence, then T.
    seq_lens: `[S]` int32, cached tokens plus the tokens of this batch.
    block_tables: `[S, max_blocks]` int32, the sequence's block ids in order; entries past its length are ignored.
    logits_indices: `[R]` int64, the rows (of T) whose logits are wanted, in the order wanted.
    is_decode: every sequence has exactly one row, whose logits are wanted (R = T = S, in order).
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    query_start: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    logits_indices: Tensor
    is_decode: bool
