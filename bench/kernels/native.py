"""Cases of the native CPU library, called as the step calls it: with ready arguments and no fresh memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.kernels import shape as work
from bench.kernels.batches import KV_NAMES, Menu, Pools, num_rows_in, query_start, rotary_tables, rotating, seq_lens
from bench.kernels.batches import step_input as step_input_for
from bench.kernels.ceilings import CacheSizes
from bench.kernels.shape import Load, Shape
from bench.kernels.timing import Call, Case
from kernels.cpu import abi
from kernels.cpu.matrix import PackedMatrix
from kernels.cpu.native import NativeKernels, check, kv_struct
from kernels.cpu.packed import FloatRows, WeightMemory, pack
from kernels.cpu.step import NativeStep, StepLayer, StepModel

_EPS = 1e-5


class NativeCases:
    """Builds the cases; weights and KV are taken in turns from copies that together exceed the caches.

    Args:
        kernels: one thread; every case uses it, one after the other.
        sizes: of the caches of the core that will run them.
    """

    def __init__(self, kernels: NativeKernels, shape: Shape, menu: Menu, sizes: CacheSizes, pools: Pools) -> None:
        self._kernels, self._shape, self._menu, self._sizes, self._pools = kernels, shape, menu, sizes, pools
        self._steps: dict[str, NativeStep] = {}

    def all(self) -> Iterator[Case]:
        """Give every case of the menu."""
        yield from self._linears()
        for dtype in self._menu.kv_dtypes:
            for load in self._menu.attentions:
                yield self._attention(load, dtype)
        yield from self._rows()
        for name in self._menu.formats:
            for load in self._menu.steps:
                yield self._step(name, load)

    def _linears(self) -> Iterator[Case]:
        shape = self._shape
        groups = {"layer": (shape.layer_sizes, self._menu.rows), "lm_head": ((shape.head,), self._menu.head_rows)}
        if self._menu.each_matrix:
            groups |= {name: ((size,), self._menu.rows) for name, size in shape.matrices.items()}
        for format_name in self._menu.formats:
            for name, (sizes, rows) in groups.items():
                copies = _Lazy(lambda sizes=sizes, name=format_name: self._copies(sizes, name))  # type: ignore[misc]
                for num_rows in rows:
                    yield Case(
                        "linear",
                        f"{name} {format_name}, {num_rows} rows",
                        work.linear_work(shape, sizes, num_rows, format_name),
                        lambda copies=copies, n=num_rows: rotating(self.product_calls(copies.get(), n)),  # type: ignore[misc]
                        f"{name}, {num_rows} rows",
                    )

    def _copies(self, sizes: tuple[tuple[int, int], ...], format_name: str) -> list[list[PackedMatrix]]:
        memory = WeightMemory()
        first = [_random_matrix(self._kernels, size, format_name, memory) for size in sizes]
        num_bytes = sum(matrix.data.nbytes for matrix in first)
        count = min(-(-self._sizes.cold_bytes // num_bytes), 256)
        return [first, *([_copy(matrix, memory) for matrix in first] for _ in range(count - 1))]

    def product_calls(self, copies: list[list[PackedMatrix]], num_rows: int) -> list[CallSequence]:
        """Give the products of one input with the matrices of each copy."""
        inputs = {m.cols: torch.randn(num_rows, m.cols) for m in copies[0]}
        outputs = {m.rows: torch.empty(num_rows, m.rows) for m in copies[0]}
        calls = []
        for matrices in copies:
            parts = []
            for m in matrices:
                x, out = inputs[m.cols], outputs[m.rows]
                arguments = (ctypes.byref(m.struct()), x.data_ptr(), num_rows, out.data_ptr())
                parts.append(NativeCall(self._kernels, "linear", arguments, (m, x, out)))
            calls.append(CallSequence(tuple(parts)))
        return calls

    def _attention(self, load: Load, dtype: torch.dtype) -> Case:
        name = f"{load.name}, {KV_NAMES[dtype]}"
        weight = work.attention_work(self._shape, load, dtype.itemsize)
        return Case("attention", name, weight, lambda: rotating(self.attention_calls(load, dtype)), name)

    def attention_calls(self, load: Load, dtype: torch.dtype) -> list[NativeCall]:
        """Give the same queries over one place of the KV memory after another."""
        shape = self._shape
        q = torch.randn(load.num_rows, shape.num_heads, shape.head_dim)
        out, starts, lengths = torch.empty_like(q), query_start(load, "cpu"), seq_lens(load, "cpu")
        calls: list[NativeCall] = []
        for kv_layer, tables in self._pools.pool(dtype).places(load):
            cache = kv_struct(kv_layer.unsqueeze(1))
            arguments = abi.Attention(
                *(t.data_ptr() for t in (q, out, starts, lengths, tables, kv_layer)),
                *(load.batch, shape.num_heads, shape.num_kv_heads, shape.head_dim, cache.block_size),
                *(tables.shape[1], cache.num_blocks, cache.block_stride, shape.num_heads * shape.head_dim),
                shape.head_dim**-0.5,
                cache.type,
            )
            kept = (q, out, starts, lengths, tables, kv_layer)
            calls.append(NativeCall(self._kernels, "attention", (ctypes.byref(arguments),), kept))
        return calls

    def _rows(self) -> Iterator[Case]:
        half, shape = self._sizes.second // 2, self._shape
        n = num_rows_in(half, work.rms_norm_work(shape, 1).cached_bytes)
        yield Case("rows", f"rms_norm, {n} rows", work.rms_norm_work(shape, n), lambda n=n: self._norm(n), "rms_norm")  # type: ignore[misc]
        n = num_rows_in(half, work.silu_mul_work(shape, 1).cached_bytes)
        yield Case("rows", f"silu_mul, {n} rows", work.silu_mul_work(shape, n), lambda n=n: self._silu(n), "silu_mul")  # type: ignore[misc]
        n = num_rows_in(half, work.rope_work(shape, 1).cached_bytes)
        yield Case("rows", f"rope, {n} rows", work.rope_work(shape, n), lambda n=n: self._rope(n), "rope")  # type: ignore[misc]
        for dtype in self._menu.kv_dtypes:
            name, moved = f"store_kv {KV_NAMES[dtype]}, 64 rows", work.store_kv_work(shape, 64, dtype.itemsize)
            yield Case("rows", name, moved, lambda d=dtype: self._store(64, d), f"store_kv {KV_NAMES[dtype]}")  # type: ignore[misc]

    def _norm(self, n: int) -> Call:
        x, weight = torch.randn(n, self._shape.hidden), torch.ones(self._shape.hidden)
        out = torch.empty_like(x)
        return self._row_call("rms_norm", (x, weight, _EPS, n, self._shape.hidden, out))

    def _silu(self, n: int) -> Call:
        x, out = torch.randn(n, 2 * self._shape.intermediate), torch.empty(n, self._shape.intermediate)
        return self._row_call("silu_mul", (x, n, self._shape.intermediate, out))

    def _rope(self, n: int) -> Call:
        # Rotated in place, again and again, as the step does; q and k lie side by side there too.
        heads = self._shape.num_heads + self._shape.num_kv_heads
        x, positions = torch.randn(n, heads, self._shape.head_dim), torch.arange(n)
        return self._row_call("rope", (x, positions, *rotary_tables(self._shape), n, heads, self._shape.head_dim))

    def _store(self, n: int, dtype: torch.dtype) -> Call:
        k, v = (torch.randn(n, self._shape.num_kv_heads, self._shape.head_dim) for _ in range(2))
        calls = []
        for kv_layer, slots in self._pools.pool(dtype).slots(n):
            cache = kv_struct(kv_layer.unsqueeze(1))
            arguments = (k.data_ptr(), v.data_ptr(), ctypes.byref(cache), slots.data_ptr(), n)
            calls.append(NativeCall(self._kernels, "store_kv", arguments, (k, v, kv_layer, slots)))
        return rotating(calls)

    def _row_call(self, name: str, arguments: tuple[object, ...]) -> Call:
        given = tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
        return NativeCall(self._kernels, name, given, arguments)

    def _step(self, format_name: str, load: Load) -> Case:
        dtype = torch.float32 if format_name == "f32" else torch.float16
        head_format = head_format_of(format_name)
        return Case(
            "step",
            f"{format_name}, {load.name}",
            work.step_work(self._shape, load, format_name, head_format, dtype.itemsize),
            lambda: self._forward(format_name, load, dtype),
            load.name,
        )

    def _forward(self, format_name: str, load: Load, dtype: torch.dtype) -> Call:
        if format_name not in self._steps:
            self._steps[format_name] = random_step(self._kernels, self._shape, format_name)
        step, cache, given = (
            self._steps[format_name],
            self._pools.cache(dtype),
            step_input_for(self._shape, load, "cpu"),
        )
        return lambda: step.forward(given, cache)


def head_format_of(format_name: str) -> str:
    """Return the format of embedding and lm_head beside layers of a format: as GGUF files have it."""
    return "f32" if format_name == "f32" else "q8_0"


def random_step(kernels: NativeKernels, shape: Shape, format_name: str) -> NativeStep:
    """Build a whole model with random weights, the same in every layer but each layer with memory of its own."""
    memory = WeightMemory()
    first = [_random_matrix(kernels, size, format_name, memory) for size in shape.layer_sizes]
    ones = torch.ones(shape.hidden)
    layers = []
    for index in range(shape.num_layers):
        qkv, out, gate_up, down = first if index == 0 else (_copy(matrix, memory) for matrix in first)
        layers.append(StepLayer(ones, None, None, None, ones, qkv, out, gate_up, down))
    head = _random_matrix(kernels, shape.head, head_format_of(format_name), memory)
    sizes = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
    return NativeStep(kernels, StepModel(tuple(layers), head, head, ones, *rotary_tables(shape), *sizes, _EPS))


def _random_matrix(
    kernels: NativeKernels, size: tuple[int, int], format_name: str, memory: WeightMemory
) -> PackedMatrix:
    values = np.random.default_rng(0).standard_normal(size, np.float32) * np.float32(size[1] ** -0.5)
    return pack(kernels.library, [FloatRows(values)], format_name, memory)


def _copy(matrix: PackedMatrix, memory: WeightMemory) -> PackedMatrix:
    data = memory.take(matrix.data.nbytes)
    data[:] = matrix.data
    return PackedMatrix(data, matrix.rows, matrix.cols, matrix.format)


class NativeCall:
    """One call with its arguments; keeps alive all that they point to.

    Attributes:
        kept: tensors and matrices that the arguments point to.
    """

    __slots__ = ("_arguments", "_function", "_kernels", "kept")

    def __init__(self, kernels: NativeKernels, name: str, arguments: tuple[object, ...], kept: tuple[Any, ...]) -> None:
        self._kernels, self.kept = kernels, kept
        self._function = getattr(kernels.library.functions, f"baton_{name}")
        self._arguments = (kernels.handle, *arguments)

    def __call__(self) -> None:
        if code := self._function(*self._arguments):
            check(code)


class CallSequence:
    """Calls made one after the other."""

    __slots__ = ("calls",)

    def __init__(self, calls: tuple[NativeCall, ...]) -> None:
        self.calls = calls

    def __call__(self) -> None:
        for call in self.calls:
            call()


class _Lazy:
    """Matrices that several cases share, packed when the first of them starts."""

    def __init__(self, build: Callable[[], list[list[PackedMatrix]]]) -> None:
        self._build = build
        self._built: list[list[PackedMatrix]] | None = None

    def get(self) -> list[list[PackedMatrix]]:
        """Return them."""
        if self._built is None:
            self._built = self._build()
        return self._built
