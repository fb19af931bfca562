"""The kernels that the torch decoder calls, on a CUDA device in bfloat16, timed by events.

Written without a GPU at hand: nothing here has run on one yet.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.kernels.cases import BLOCK, Case, Shape
from bench.kernels.ceilings import event_s
from kernels import ops


def gpu_cases(shape: Shape, num_rounds: int) -> Iterator[tuple[Case, float]]:
    """Give each case with its median time in seconds."""
    for case in (*_linears(shape), *_attentions(shape)):
        for _ in range(3):
            case.run()
        times = sorted(event_s(case.run) for _ in range(max(num_rounds, 9)))
        yield case, times[len(times) // 2]


def _linears(shape: Shape) -> Iterator[Case]:
    outputs, inputs = shape.matrices[2]
    weights = [torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) for _ in range(32)]
    for num_rows in (1, 8, 64, 512):
        x = torch.randn(num_rows, inputs, device="cuda", dtype=torch.bfloat16)
        turn = iter(range(1 << 30))
        yield Case(
            f"linear {outputs}x{inputs} bfloat16, {num_rows} rows",
            lambda x=x, turn=turn: torch.nn.functional.linear(x, weights[next(turn) % 32]),  # type: ignore[misc]
            None,
            2.0 * (outputs * inputs + num_rows * (outputs + inputs)),
            2.0 * num_rows * outputs * inputs,
        )


def _attentions(shape: Shape) -> Iterator[Case]:
    for batch, context in ((1, 2048), (16, 2048), (64, 1024)):
        each = context // BLOCK
        cache = torch.randn(
            batch * each, 2, shape.num_kv_heads, BLOCK, shape.head_dim, device="cuda", dtype=torch.bfloat16
        )
        tables = torch.randperm(batch * each, device="cuda").view(batch, each).int()
        q = torch.randn(batch, shape.num_heads, shape.head_dim, device="cuda", dtype=torch.bfloat16)
        lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        yield Case(
            f"attention decode, {batch} x {context}, bfloat16",
            lambda q=q, c=cache, t=tables, n=lengths: ops.paged_decode_attention(q, c, t, n, 0.125),  # type: ignore[misc]
            None,
            2.0 * cache.numel(),
            4.0 * batch * context * shape.num_heads * shape.head_dim,
        )
