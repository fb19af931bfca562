"""Triton's kernels as a table, with the scratch memory that they share between launches.

A kernel that splits its work leaves partial sums in scratch memory and counts arrivals there. That memory is taken once
and used by one launch after another, so a table belongs to one queue: whoever computes beside it takes a `fresh` one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.gpu import lanes, sampling
from kernels.gpu.decode_attention import DecodeScratch, paged_decode_attention
from kernels.gpu.interpreted import IS_INTERPRETED
from kernels.gpu.linear import LinearScratch, decode_linear, decode_linear_silu, linear, linear_silu
from kernels.gpu.norm import add_rms_norm, rms_norm
from kernels.gpu.prefill_attention import paged_prefill_attention
from kernels.gpu.rope import rope_store
from kernels.reference import Matrix
from kernels.table import KernelTable


def is_interpreted() -> bool:
    """Tell whether the kernels run in Triton's interpreter, and thus on a CPU."""
    return IS_INTERPRETED


def triton_table() -> KernelTable:
    """Give Triton's kernels with scratch memory of their own. None of them synchronises."""
    scratch = _Scratch()
    return KernelTable(
        name="triton",
        is_capturable=True,
        fresh=triton_table,
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        rope_store=rope_store,
        linear=linear,
        linear_silu=linear_silu,
        decode_linear=scratch.decode_linear,
        decode_linear_silu=scratch.decode_linear_silu,
        paged_decode_attention=scratch.paged_decode_attention,
        paged_prefill_attention=paged_prefill_attention,
        choose_tokens=sampling.choose_tokens,
        sample_tokens=sampling.sample_tokens,
        count_tokens=sampling.count_tokens,
        begin_step=lanes.begin_step,
        end_step=lanes.end_step,
    )


class _Scratch:
    """What one table's launches leave for each other; it grows with the largest launch, so graphs are recorded from the
    largest down, after a plain run of each."""

    def __init__(self) -> None:
        self._linear: dict[torch.device, LinearScratch] = {}
        self._decode: dict[tuple[int, ...], DecodeScratch] = {}

    def decode_linear(self, x: Tensor, weight: Matrix, bias: Tensor | None) -> Tensor:
        return decode_linear(x, weight, bias, self._linear_on(x.device))

    def decode_linear_silu(self, x: Tensor, weight: Matrix) -> Tensor:
        return decode_linear_silu(x, weight, self._linear_on(x.device))

    def paged_decode_attention(
        self, q: Tensor, kv_layer: Tensor, block_tables: Tensor, seq_lens: Tensor, scale: float
    ) -> Tensor:
        num_rows, num_heads, head_dim = q.shape
        num_kv_heads, block_size = kv_layer.shape[2], kv_layer.shape[3]
        max_context_tokens = block_tables.shape[1] * block_size
        key = (num_heads, num_kv_heads, head_dim, max_context_tokens)
        scratch = self._decode.get(key)
        if scratch is None or scratch.counters.numel() < num_rows * num_kv_heads:
            scratch = DecodeScratch.for_batch(num_rows, num_heads, num_kv_heads, head_dim, max_context_tokens, q.device)
            self._decode[key] = scratch
        return paged_decode_attention(q, kv_layer, block_tables, seq_lens, scale, scratch)

    def _linear_on(self, device: torch.device) -> LinearScratch:
        if device not in self._linear:
            self._linear[device] = LinearScratch.on(device)
        return self._linear[device]
