"""Cases of the plain-torch kernels: what stands beside the native ones on a CPU, and what is measured on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels import shape as work
from bench.kernels.batches import (
    KV_NAMES,
    Menu,
    Pools,
    num_rows_in,
    query_start,
    rotary_tables,
    rotating,
    seq_lens,
    step_input,
)
from bench.kernels.shape import Load, Shape
from bench.kernels.timing import Call, Case
from kernels import reference
from kernels.cpu.step import StepInput

_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Setting:
    """Where the cases run.

    Attributes:
        device: "cpu" or "cuda".
        dtype: of weights and rows.
        weight_format: the same as a key of `shape.WEIGHT_BITS`.
        cold_bytes: copies of weights and KV together exceed this.
        row_bytes: what norms and activations move in one call.
        store_rows: rows of a store_kv.
    """

    device: str
    dtype: torch.dtype
    weight_format: str
    cold_bytes: int
    row_bytes: int
    store_rows: int


class PlainCases:
    """Builds the cases. The KV cache of a step has the setting's dtype."""

    def __init__(self, shape: Shape, menu: Menu, setting: Setting, pools: Pools) -> None:
        self._shape, self._menu, self._setting, self._pools = shape, menu, setting, pools

    def all(self) -> Iterator[Case]:
        """Give every case of the menu; a native case that does the same names it without the weights' format."""
        shape = self._shape
        groups = {"layer": (shape.layer_sizes, self._menu.rows), "lm_head": ((shape.head,), self._menu.head_rows)}
        if self._menu.each_matrix:
            groups |= {name: ((size,), self._menu.rows) for name, size in shape.matrices.items()}
        for name, (sizes, rows) in groups.items():
            for num_rows in rows:
                yield Case(
                    "linear",
                    f"{name}, {num_rows} rows",
                    work.linear_work(shape, sizes, num_rows, self._setting.weight_format),
                    lambda sizes=sizes, n=num_rows: self._products(sizes, n),  # type: ignore[misc]
                )
        for dtype in self._menu.kv_dtypes:
            for load in self._menu.attentions:
                weight = work.attention_work(shape, load, dtype.itemsize)
                yield Case(
                    "attention",
                    f"{load.name}, {KV_NAMES[dtype]}",
                    weight,
                    lambda load=load, dtype=dtype: self._attend(load, dtype),  # type: ignore[misc]
                )
        yield from self._rows()
        for load in self._menu.steps:
            weight = work.step_work(
                *(shape, load, self._setting.weight_format, self._setting.weight_format, self._setting.dtype.itemsize)
            )
            yield Case("step", load.name, weight, lambda load=load: self._step(load))  # type: ignore[misc]

    def _random(self, *size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, device=self._setting.device) * scale).to(self._setting.dtype)

    def _products(self, sizes: tuple[tuple[int, int], ...], num_rows: int) -> Call:
        inputs = {size[1]: self._random(num_rows, size[1]) for size in sizes}
        return rotating([
            lambda weights=weights: [F.linear(inputs[w.shape[1]], w) for w in weights]  # type: ignore[misc]
            for weights in self._weights(sizes)
        ])  # fmt: skip

    def _weights(self, sizes: tuple[tuple[int, int], ...]) -> list[list[Tensor]]:
        """Give copies of some matrices; the copies of a whole layer are those of the step's model."""
        if sizes == self._shape.layer_sizes and self._menu.steps:
            return [layer.matrices() for layer in self._model.layers]
        first = [self._random(*size, scale=size[1] ** -0.5) for size in sizes]
        num_bytes = sum(w.nbytes for w in first)
        return [[w.clone() for w in first] for _ in range(min(-(-self._setting.cold_bytes // num_bytes), 256))]

    def _attend(self, load: Load, dtype: torch.dtype) -> Call:
        shape, device = self._shape, self._setting.device
        q = self._random(load.num_rows, shape.num_heads, shape.head_dim)
        starts, lengths, scale = query_start(load, device), seq_lens(load, device), shape.head_dim**-0.5
        places = self._pools.pool(dtype).places(load)
        if load.queries == 1:
            return rotating([
                lambda kv=kv, t=t: reference.paged_decode_attention(q, kv, t, lengths, scale)  # type: ignore[misc]
                for kv, t in places
            ])  # fmt: skip
        return rotating([
            lambda kv=kv, t=t: reference.paged_prefill_attention(q, kv, t, starts, lengths, scale)  # type: ignore[misc]
            for kv, t in places
        ])  # fmt: skip

    def _rows(self) -> Iterator[Case]:
        shape, moved = self._shape, self._setting.row_bytes
        n = num_rows_in(moved, work.rms_norm_work(shape, 1).cached_bytes)
        yield Case("rows", "rms_norm", work.rms_norm_work(shape, n), lambda n=n: self._norm(n))  # type: ignore[misc]
        n = num_rows_in(moved, work.silu_mul_work(shape, 1).cached_bytes)
        yield Case("rows", "silu_mul", work.silu_mul_work(shape, n), lambda n=n: self._silu(n))  # type: ignore[misc]
        n = num_rows_in(moved, work.rope_work(shape, 1).cached_bytes)
        yield Case("rows", "rope", work.rope_work(shape, n), lambda n=n: self._rope(n))  # type: ignore[misc]
        n = self._setting.store_rows
        for dtype in self._menu.kv_dtypes:
            weight = work.store_kv_work(shape, n, dtype.itemsize)
            yield Case("rows", f"store_kv {KV_NAMES[dtype]}", weight, lambda d=dtype, n=n: self._store(n, d))  # type: ignore[misc]

    def _norm(self, n: int) -> Call:
        x, weight = self._random(n, self._shape.hidden), self._random(self._shape.hidden)
        return lambda: reference.rms_norm(x, weight, _EPS)

    def _silu(self, n: int) -> Call:
        x = self._random(n, 2 * self._shape.intermediate)
        return lambda: reference.silu_mul(x)

    def _rope(self, n: int) -> Call:
        shape, device = self._shape, self._setting.device
        q, k = self._random(n, shape.num_heads, shape.head_dim), self._random(n, shape.num_kv_heads, shape.head_dim)
        cos, sin = (table.to(device) for table in rotary_tables(shape))
        positions = torch.arange(n, device=device) % cos.shape[0]
        return lambda: reference.rope(q, k, positions, cos, sin)

    def _store(self, n: int, dtype: torch.dtype) -> Call:
        k, v = (self._random(n, self._shape.num_kv_heads, self._shape.head_dim) for _ in range(2))
        return rotating([
            lambda kv=kv, slots=slots: reference.store_kv(k, v, kv, slots)  # type: ignore[misc]
            for kv, slots in self._pools.pool(dtype).slots(n)
        ])  # fmt: skip

    def _step(self, load: Load) -> Call:
        model, given = self._model, step_input(self._shape, load, self._setting.device)
        cache = self._pools.cache(self._setting.dtype)
        return lambda: model.forward(given, cache, is_decode=load.queries == 1)

    @cached_property
    def _model(self) -> PlainModel:
        return PlainModel(self._shape, self._setting)


@dataclass(frozen=True, slots=True)
class PlainLayer:
    """Matrices of one layer, `[outputs, inputs]`."""

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor

    def matrices(self) -> list[Tensor]:
        """Give all of them, in the order of `Shape.matrices`."""
        return [self.qkv, self.out, self.gate_up, self.down]


class PlainModel:
    """A Llama of random weights in torch operations, operation by operation what `model.torch_decoder` runs."""

    def __init__(self, shape: Shape, setting: Setting) -> None:
        def matrix(outputs: int, inputs: int) -> Tensor:
            scale: float = inputs**-0.5
            return (torch.randn(outputs, inputs, device=setting.device) * scale).to(setting.dtype)

        first = [matrix(*size) for size in shape.layer_sizes]
        self._shape = shape
        self.layers = [PlainLayer(*(weight.clone() for weight in first)) for _ in range(shape.num_layers)]
        self._head = matrix(*shape.head)
        self._norm = torch.ones(shape.hidden, device=setting.device, dtype=setting.dtype)
        self._cos, self._sin = (table.to(setting.device) for table in rotary_tables(shape))

    def forward(self, batch: StepInput, kv_cache: Tensor, *, is_decode: bool) -> Tensor:
        """Write the batch's KV and return logits; on a GPU the reference kernels synchronise in every layer."""
        hidden = F.embedding(batch.token_ids, self._head)
        for index, layer in enumerate(self.layers):
            attended = self._attend(layer, hidden, batch, kv_cache[:, index], is_decode)
            if index == len(self.layers) - 1:
                hidden, attended = hidden[batch.logits_indices], attended[batch.logits_indices]
            hidden = hidden + F.linear(attended, layer.out)
            normed = reference.rms_norm(hidden, self._norm, _EPS)
            hidden = hidden + F.linear(reference.silu_mul(F.linear(normed, layer.gate_up)), layer.down)
        logits: Tensor = F.linear(reference.rms_norm(hidden, self._norm, _EPS), self._head)
        return logits.float()

    def _attend(self, layer: PlainLayer, hidden: Tensor, batch: StepInput, kv_layer: Tensor, is_decode: bool) -> Tensor:
        shape, tables, lengths = self._shape, batch.block_tables, batch.seq_lens
        normed = reference.rms_norm(hidden, self._norm, _EPS)
        qkv = F.linear(normed, layer.qkv).view(hidden.shape[0], -1, shape.head_dim)
        query, key, value = torch.split(qkv, [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
        query, key = reference.rope(query, key, batch.positions, self._cos, self._sin)
        reference.store_kv(key, value, kv_layer, batch.slot_mapping)
        scale = shape.head_dim**-0.5
        if is_decode:
            attended = reference.paged_decode_attention(query, kv_layer, tables, lengths, scale)
        else:
            attended = reference.paged_prefill_attention(query, kv_layer, tables, batch.query_start, lengths, scale)
        return attended.reshape(query.shape[0], -1)
