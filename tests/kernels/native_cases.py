"""Inputs for tests of the native kernels: a paged KV case, quantised rows, a tiny model in the native step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.cpu import native
from kernels.cpu.matrix import PackedMatrix
from kernels.cpu.native import NativeKernels, NativeUnavailableError
from kernels.cpu.packed import FloatRows, pack
from kernels.cpu.step import NativeStep, StepInput, StepLayer, StepModel

INSTRUCTION_SETS = ("portable", "avx2", "avx512")
BLOCK = 16


def kernels_for(instruction_set: str | None = None, num_threads: int = 1) -> NativeKernels:
    """Open the installed library, or skip where it is not built or the processor lacks the instructions."""
    if native.find_library() is None:
        pytest.skip("the native library is not built here")
    try:
        return NativeKernels(native.load(), num_threads, instruction_set)
    except NativeUnavailableError as error:
        pytest.skip(str(error))


class KvCase:
    """Sequences over paged KV; every slot that no sequence owns is NaN, every unused table entry -1."""

    def __init__(
        self,
        seq_lens: list[int],
        num_heads: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        num_queries: list[int] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        queries = num_queries or [1] * len(seq_lens)
        counts = [-(-length // block_size) for length in seq_lens]
        order = torch.randperm(sum(counts) + 2).int()
        kv_cache = torch.full((sum(counts) + 2, 3, 2, num_kv_heads, block_size, head_dim), math.nan, dtype=dtype)
        self.kv_layer = kv_cache[:, 1]
        self.q = torch.randn(sum(queries), num_heads, head_dim) * 3
        self.query_start = torch.tensor([0, *np.cumsum(queries).tolist()], dtype=torch.int32)
        self.tables = torch.full((len(seq_lens), max([*counts, 0]) + 1), -1, dtype=torch.int32)
        self.seq_lens = torch.tensor(seq_lens, dtype=torch.int32)
        used = 0
        for row, (length, count) in enumerate(zip(seq_lens, counts, strict=True)):
            self.tables[row, :count] = order[used : used + count]
            used += count
            for place in range(0, length, block_size):
                size = min(block_size, length - place)
                block = self.kv_layer[int(self.tables[row, place // block_size])]
                block[:, :, :size] = torch.randn(2, num_kv_heads, size, head_dim).to(dtype)


@dataclass(frozen=True, slots=True)
class TinySize:
    """Shape of a model for tests."""

    hidden: int = 64
    intermediate: int = 96
    num_layers: int = 3
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 32
    vocab: int = 83
    has_bias: bool = True
    has_norms: bool = True


def tiny_step(
    size: TinySize,
    format_name: str,
    kernels: NativeKernels,
    seed: int = 0,
) -> NativeStep:
    """Build a step with random weights in one format."""
    generator = torch.Generator().manual_seed(seed)

    def vector(count: int, around: float = 1.0) -> Tensor:
        return torch.randn(count, generator=generator) * 0.1 + around

    def matrix(rows: int, cols: int) -> PackedMatrix:
        values = torch.randn(rows, cols, generator=generator) * cols**-0.5
        return pack(kernels.library, [FloatRows(values.numpy())], format_name)

    heads, kv_heads = size.num_heads * size.head_dim, size.num_kv_heads * size.head_dim
    layers = tuple(
        StepLayer(
            attention_norm=vector(size.hidden),
            qkv_bias=vector(heads + 2 * kv_heads, 0.0) if size.has_bias else None,
            q_norm=vector(size.head_dim) if size.has_norms else None,
            k_norm=vector(size.head_dim) if size.has_norms else None,
            mlp_norm=vector(size.hidden),
            qkv=matrix(heads + 2 * kv_heads, size.hidden),
            attention_out=matrix(size.hidden, heads),
            gate_up=matrix(2 * size.intermediate, size.hidden),
            down=matrix(size.hidden, size.intermediate),
        )
        for _ in range(size.num_layers)
    )
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, size.head_dim, 2) / size.head_dim)
    angles = torch.outer(torch.arange(256).float(), frequencies)
    model = StepModel(
        layers=layers,
        embedding=matrix(size.vocab, size.hidden),
        lm_head=matrix(size.vocab, size.hidden),
        final_norm=vector(size.hidden),
        cos=angles.cos(),
        sin=angles.sin(),
        num_heads=size.num_heads,
        num_kv_heads=size.num_kv_heads,
        head_dim=size.head_dim,
        eps=1e-5,
    )
    return NativeStep(kernels, model)


def tiny_cache(size: TinySize, num_blocks: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make a zeroed KV cache for a tiny step."""
    return torch.zeros(num_blocks, size.num_layers, 2, size.num_kv_heads, BLOCK, size.head_dim, dtype=dtype)


def step_input(pieces: list[tuple[int, list[int]]], tables: Tensor, *, all_rows: bool = False) -> StepInput:
    """Build a batch out of (first position, tokens) pieces, one a row of `tables`."""
    counts = [len(tokens) for _, tokens in pieces]
    ends = np.cumsum(counts)
    positions = [torch.arange(start, start + len(tokens)) for start, tokens in pieces]
    slots = [tables[row][p // BLOCK].long() * BLOCK + p % BLOCK for row, p in enumerate(positions)]
    return StepInput(
        token_ids=torch.tensor([token for _, tokens in pieces for token in tokens]),
        positions=torch.cat(positions),
        slot_mapping=torch.cat(slots),
        query_start=torch.tensor([0, *ends.tolist()], dtype=torch.int32),
        seq_lens=torch.tensor([start + len(tokens) for start, tokens in pieces], dtype=torch.int32),
        block_tables=tables.int().contiguous(),
        logits_indices=torch.arange(int(ends[-1])) if all_rows else torch.tensor((ends - 1).tolist()),
    )
