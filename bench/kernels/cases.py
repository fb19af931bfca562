"""What is measured: single kernels and whole steps of a model's shape, with the work that each has to do.

Weights and KV are read cold, as in a step: each case rotates over copies that together exceed the caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels import reference
from kernels.cpu.matrix import PackedMatrix
from kernels.cpu.native import NativeKernels
from kernels.cpu.packed import FloatRows, WeightMemory, pack
from kernels.cpu.step import NativeStep, StepInput, StepLayer, StepModel

BLOCK = 16
COLD_BYTES = 96 << 20
BITS = {"f32": 32.0, "q8_0": 8.5, "q4_0": 4.5, "q4_1": 5.0}


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's sizes; SmolLM2-135M unless told otherwise."""

    hidden: int = 576
    intermediate: int = 1536
    num_layers: int = 30
    num_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64
    vocab: int = 49152

    @property
    def qkv(self) -> int:
        """Outputs of the packed projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """Sizes `(outputs, inputs)` of a layer's matrices."""
        heads = self.num_heads * self.head_dim
        up = 2 * self.intermediate
        return (self.qkv, self.hidden), (self.hidden, heads), (up, self.hidden), (self.hidden, self.intermediate)


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement.

    Attributes:
        run: the native call; each call works on the next cold copy.
        plain: the same by torch, or None where that says nothing.
        num_bytes, num_operations: the least work that it can be done with; a multiply-add counts twice.
    """

    name: str
    run: Callable[[], object]
    plain: Callable[[], object] | None
    num_bytes: float
    num_operations: float
    is_integer: bool = False


def _rotating(calls: list[Callable[[], object]]) -> Callable[[], object]:
    turn = 0

    def call() -> object:
        nonlocal turn
        turn += 1
        return calls[turn % len(calls)]()

    return call


def linears(kernels: NativeKernels, shape: Shape, rows: tuple[int, ...]) -> Iterator[Case]:
    """Gate and up of one layer, in every format."""
    outputs, inputs = shape.matrices[2]
    weights = np.random.default_rng(0).normal(size=(outputs, inputs)).astype(np.float32)
    dense = [torch.from_numpy(weights.copy()) for _ in range(min(8, 1 + COLD_BYTES // weights.nbytes))]
    for name, bits in BITS.items():
        memory, size = WeightMemory(), outputs * inputs * bits / 8
        copies = [
            pack(kernels.library, [FloatRows(weights)], name, memory) for _ in range(1 + int(COLD_BYTES // size) // 4)
        ]
        for num_rows in rows:
            x = torch.randn(num_rows, inputs)
            plain = _rotating([lambda w=w, x=x: x @ w.T for w in dense]) if name == "f32" else None  # type: ignore[misc]
            yield Case(
                f"linear {outputs}x{inputs} {name}, {num_rows} rows",
                _rotating([lambda m=m, x=x: kernels.linear(x, m) for m in copies]),  # type: ignore[misc]
                plain,
                size + 4 * num_rows * (inputs + outputs),
                2.0 * num_rows * inputs * outputs,
                name != "f32",
            )


def attentions(kernels: NativeKernels, shape: Shape) -> Iterator[Case]:
    """Decode for some batches and contexts, prefill of a chunk; over float16 and float32 KV."""
    sizes = [(1, 128, 1), (1, 2048, 1), (8, 128, 1), (8, 512, 1), (16, 2048, 1), (1, 256, 256), (1, 1024, 256)]
    for dtype in (torch.float16, torch.float32):
        for batch, context, queries in sizes:
            yield _attention(kernels, shape, batch, context, queries, dtype)


def _attention(
    kernels: NativeKernels, shape: Shape, batch: int, context: int, queries: int, dtype: torch.dtype
) -> Case:
    blocks_each = context // BLOCK
    one = torch.randn(batch * blocks_each, 2, shape.num_kv_heads, BLOCK, shape.head_dim)
    size = one.numel() * dtype.itemsize
    caches = [one.to(dtype) for _ in range(1 + min(64, COLD_BYTES // size))]
    tables = torch.randperm(batch * blocks_each).view(batch, blocks_each).int()
    q = torch.randn(batch * queries, shape.num_heads, shape.head_dim)
    start = torch.arange(0, batch * queries + 1, queries, dtype=torch.int32)
    lengths = torch.full((batch,), context, dtype=torch.int32)
    scale = shape.head_dim**-0.5
    seen = batch * (queries * context - queries * (queries - 1) / 2)
    phase = "decode" if queries == 1 else f"prefill of {queries}"
    return Case(
        f"attention {phase}, {batch} x {context}, {str(dtype).removeprefix('torch.')}",
        _rotating([
            lambda c=c: kernels.paged_prefill_attention(q, c, tables, start, lengths, scale)  # type: ignore[misc]
            for c in caches
        ]),
        _rotating([
            lambda c=c: reference.paged_prefill_attention(q, c, tables, start, lengths, scale)  # type: ignore[misc]
            for c in caches
        ]),
        size + 8.0 * q.numel(),
        4.0 * seen * shape.num_heads * shape.head_dim,
    )  # fmt: skip


def rows(kernels: NativeKernels, shape: Shape) -> Iterator[Case]:
    """Norm, SiLU and rotation of many rows; warm, since in a step their input has just been written."""
    x, weight, both = torch.randn(256, shape.hidden), torch.randn(shape.hidden), torch.randn(64, 2 * shape.intermediate)
    yield Case(
        f"rms_norm 256 x {shape.hidden}",
        lambda: kernels.rms_norm(x, weight, 1e-5),
        lambda: reference.rms_norm(x, weight, 1e-5),
        8.0 * x.numel(),
        4.0 * x.numel(),
    )
    yield Case(
        f"silu_mul 64 x {shape.intermediate}",
        lambda: kernels.silu_mul(both),
        lambda: reference.silu_mul(both),
        6.0 * both.numel(),
        20.0 * both.numel() / 2,
    )
    q, k = (torch.randn(64, heads, shape.head_dim) for heads in (shape.num_heads, shape.num_kv_heads))
    table = torch.randn(256, shape.head_dim // 2)
    positions = torch.arange(64)
    yield Case(
        "rope 64 rows",
        lambda: kernels.rope(q, k, positions, table, table),
        lambda: reference.rope(q, k, positions, table, table),
        8.0 * (q.numel() + k.numel()),
        3.0 * (q.numel() + k.numel()),
    )


def random_step(kernels: NativeKernels, shape: Shape, format_name: str, head_format: str) -> NativeStep:
    """Build a whole model with random weights."""
    generator, memory = np.random.default_rng(0), WeightMemory()

    def matrix(outputs: int, inputs: int, name: str) -> PackedMatrix:
        values = generator.standard_normal((outputs, inputs), np.float32) * np.float32(inputs**-0.5)
        return pack(kernels.library, [FloatRows(values)], name, memory)

    ones = torch.ones(shape.hidden)
    layers = []
    for _ in range(shape.num_layers):
        qkv, out, up, down = (matrix(*size, format_name) for size in shape.matrices)
        layers.append(StepLayer(ones, None, None, None, ones, qkv, out, up, down))
    head = matrix(shape.vocab, shape.hidden, head_format)
    angles = torch.outer(torch.arange(8192).float(), 1e-5 ** (torch.arange(0, shape.head_dim, 2) / shape.head_dim))
    sizes = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
    return NativeStep(kernels, StepModel(tuple(layers), head, head, ones, angles.cos(), angles.sin(), *sizes, 1e-5))


def steps(kernels: NativeKernels, shape: Shape, format_name: str) -> Iterator[Case]:
    """Whole steps: decode at some batches and contexts, and prefill chunks."""
    head_format = "f32" if format_name == "f32" else "q8_0"
    step = random_step(kernels, shape, format_name, head_format)
    sizes = [(1, 128, 1), (1, 1024, 1), (4, 128, 1), (8, 128, 1), (8, 512, 1), (16, 512, 1), (1, 256, 256)]
    dtype = torch.float32 if format_name == "f32" else torch.float16
    most_blocks = max(batch * context for batch, context, _ in sizes) // BLOCK
    kv_cache = torch.zeros(most_blocks, shape.num_layers, 2, shape.num_kv_heads, BLOCK, shape.head_dim, dtype=dtype)
    layer_weights = float(sum(a * b for a, b in shape.matrices) * shape.num_layers)
    head_weights = float(shape.vocab * shape.hidden)
    weight_bytes = (layer_weights * BITS[format_name] + head_weights * BITS[head_format]) / 8
    for batch, context, queries in sizes:
        given = _step_input(shape, batch, context, queries)
        seen = batch * (queries * context - queries * (queries - 1) / 2)
        kv_bytes = 2.0 * batch * context * shape.num_layers * shape.num_kv_heads * shape.head_dim * dtype.itemsize
        attention = 4.0 * seen * shape.num_heads * shape.head_dim * shape.num_layers
        yield Case(
            f"step {format_name}, {'decode' if queries == 1 else f'prefill of {queries}'}, {batch} x {context}",
            lambda given=given: step.forward(given, kv_cache),  # type: ignore[misc]
            None,
            weight_bytes + kv_bytes,
            2.0 * (batch * queries * layer_weights + batch * head_weights) + attention,
            format_name != "f32",
        )


def _step_input(shape: Shape, batch: int, context: int, queries: int) -> StepInput:
    tables = torch.randperm(batch * context // BLOCK).view(batch, -1)
    places = torch.arange(context - queries, context).repeat(batch)
    owner = torch.arange(batch).repeat_interleave(queries)
    ends: Tensor = torch.arange(0, batch * queries + 1, queries)
    return StepInput(
        token_ids=torch.randint(0, shape.vocab, (batch * queries,)),
        positions=places,
        slot_mapping=tables[owner, places // BLOCK] * BLOCK + places % BLOCK,
        query_start=ends.int(),
        seq_lens=torch.full((batch,), context, dtype=torch.int32),
        block_tables=tables.int().contiguous(),
        logits_indices=ends[1:] - 1,
    )
