"""Each kernel of a step beside its floor, on the model's own weights and KV memory.

Calls after each other work on another layer, so that nothing is found in the cache; on a GPU they are recorded in one
graph, so that no launch is waited for. What moves bytes is held against the copy's bandwidth, what multiplies against
the rate of large matrix products. Beside a product stands torch's of the same rows (without the SiLU of gate_up).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.gpu.points import Figures, Point, Section
from bench.gpu.rig import Rig, Stage
from bench.gpu.shapes import DTYPE_BYTES, LEAST_ATTENTION_SHARE
from bench.gpu.timing import Call, median_s
from bench.kernels.shape import Load, attention_work
from kernels.reference import HeadNorms

_MATRICES = ("qkv", "out", "gate_up", "down")
_DECODE_LOADS = ((32, 4096), (1, 1024), (8, 1024), (64, 8192))
_ROWS = (1, 8, 32, 64)
_PREFILL_TOKENS = (2048, 8192)
_PREFILL_LAYERS = 4
_EPS = 1e-5


def section(stage: Stage, name: str, share_s: float) -> Section:
    """Give every kernel's points, the one with a target first."""
    cases = Cases(stage, name)
    return Section("kernels", name, share_s, tuple(cases.all()))


class Cases:
    """Builds points of one model's kernels."""

    def __init__(self, stage: Stage, name: str) -> None:
        self._stage, self._name = stage, name

    @property
    def _rig(self) -> Rig:
        return self._stage.rig(self._name)

    def all(self) -> Iterator[Point]:
        """Give the points, most important first."""
        for batch, context_tokens in _DECODE_LOADS:
            measure = partial(self._decode_attention, batch, context_tokens)
            yield self._point(f"decode attention, {batch} x {context_tokens // 1024}k", measure)
        for num_rows in _ROWS:
            for matrix in _MATRICES:
                yield self._point(f"{matrix}, {num_rows} rows", partial(self._linear, matrix, num_rows))
            yield self._point(f"lm_head, {num_rows} rows", partial(self._head, num_rows))
        for num_tokens in _PREFILL_TOKENS:
            yield self._point(f"gate_up, {num_tokens} rows", partial(self._many_rows, "gate_up", num_tokens))
            yield self._point(f"prefill attention, {num_tokens // 1024}k", partial(self._prefill_attention, num_tokens))
        for num_rows in (1, 64):
            yield self._point(f"add_rms_norm, {num_rows} rows", partial(self._norm, num_rows))
            yield self._point(f"rope_store, {num_rows} rows", partial(self._rope, num_rows))
        for temperature in (0.0, 0.8):
            yield self._point(f"choose 64 tokens, temperature {temperature:g}", partial(self._choose, 64, temperature))

    def _point(self, name: str, measure: Callable[[], Figures]) -> Point:
        return Point(name, {"kernel": name}, 0.7 * self._stage.scale.need_factor, measure)

    def _rows(self, num_rows: int, width: int) -> Tensor:
        rig = self._rig
        return torch.randn(num_rows, width, device=rig.queue.device).to(rig.decoder.dtype)

    def _seconds(self, calls: list[Call]) -> float:
        in_graph = self._rig.decoder.kernels.is_capturable
        return median_s(calls, self._rig.queue, self._stage.scale.num_rounds, in_graph=in_graph)

    def _moved(self, seconds: float, num_bytes: float, operations: float = 0.0) -> Figures:
        peaks = self._stage.ceilings
        floor_s = max(num_bytes / peaks.copy_bytes_per_s, operations / peaks.operations_per_s)
        return {
            "us": seconds * 1e6,
            "floor_us": floor_s * 1e6,
            "over_floor": seconds / floor_s,
            "copy_share": num_bytes / seconds / peaks.copy_bytes_per_s,
            "matmul_share": operations / seconds / peaks.operations_per_s,
        }

    def _many_rows(self, matrix: str, num_tokens: int) -> Figures:
        return self._linear(matrix, self._stage.scale.tokens(num_tokens))

    def _linear(self, matrix: str, num_rows: int) -> Figures:
        kernels, (outputs, inputs) = self._rig.decoder.kernels, self._rig.shape.matrices[matrix]
        x, field = self._rows(num_rows, inputs), {"out": "attention_out"}.get(matrix, matrix)
        weights: list[Any] = [getattr(layer, field) for layer in self._rig.decoder.weights.layers]
        is_decode = num_rows <= _ROWS[-1]
        linear = kernels.decode_linear if is_decode else kernels.linear
        linear_silu = kernels.decode_linear_silu if is_decode else kernels.linear_silu
        calls: list[Call] = [partial(linear, x, weight, None) for weight in weights]
        if matrix == "gate_up":
            calls = [partial(linear_silu, x, weight) for weight in weights]
        plain: list[Call] = [partial(functional.linear, x, weight) for weight in weights]
        figures = self._moved(self._seconds(calls), outputs * inputs * DTYPE_BYTES, 2.0 * num_rows * outputs * inputs)
        return figures | {"torch_us": self._seconds(plain) * 1e6}

    def _head(self, num_rows: int) -> Figures:
        kernels, weight = self._rig.decoder.kernels, self._rig.decoder.weights.lm_head
        x = self._rows(num_rows, weight.shape[1])
        seconds = self._seconds([partial(kernels.decode_linear, x, weight, None)] * 4)
        return self._moved(seconds, weight.numel() * DTYPE_BYTES, 2.0 * num_rows * weight.numel())

    def _decode_attention(self, batch: int, context_tokens: int) -> Figures:
        rig, context_tokens = self._rig, self._stage.scale.tokens(context_tokens)
        query, tables, lengths, scale = self._attention_inputs(batch, context_tokens, 1)
        attend = rig.decoder.kernels.paged_decode_attention
        kv = rig.kv_cache.tensor
        seconds = self._seconds([
            partial(attend, query, kv[:, layer], tables, lengths, scale) for layer in range(kv.shape[1])
        ])  # fmt: skip
        figures = self._moved(seconds, attention_work(rig.shape, Load(batch, context_tokens), DTYPE_BYTES).num_bytes)
        share = figures["copy_share"]
        assert isinstance(share, float)
        return figures | {"target_share": LEAST_ATTENTION_SHARE, "meets_target": share >= LEAST_ATTENTION_SHARE}

    def _prefill_attention(self, num_tokens: int) -> Figures:
        rig, num_tokens = self._rig, self._stage.scale.tokens(num_tokens)
        query, tables, lengths, scale = self._attention_inputs(1, num_tokens, num_tokens)
        starts = torch.tensor([0, num_tokens], dtype=torch.int32, device=rig.queue.device)
        attend = rig.decoder.kernels.paged_prefill_attention
        kv = rig.kv_cache.tensor
        seconds = self._seconds([
            partial(attend, query, kv[:, layer], tables, starts, lengths, scale)
            for layer in range(min(_PREFILL_LAYERS, kv.shape[1]))
        ])  # fmt: skip
        work = attention_work(rig.shape, Load(1, num_tokens, num_tokens), DTYPE_BYTES)
        figures = self._moved(seconds, work.num_bytes, work.float_operations)
        return figures | {"torch_us": self._seconds([partial(self._torch_attention, query)] * _PREFILL_LAYERS) * 1e6}

    def _torch_attention(self, query: Tensor) -> Tensor:
        """Attend as torch's fused attention does to keys and values in one place: no prefix, no blocks."""
        q = query.transpose(0, 1).unsqueeze(0)
        kv = q[:, : self._rig.shape.num_kv_heads]
        return functional.scaled_dot_product_attention(q, kv, kv, is_causal=True, enable_gqa=True)

    def _attention_inputs(self, batch: int, context_tokens: int, queries: int) -> tuple[Tensor, Tensor, Tensor, float]:
        rig, device = self._rig, self._rig.queue.device
        query = self._rows(batch * queries * rig.shape.num_heads, rig.shape.head_dim)
        query = query.view(batch * queries, rig.shape.num_heads, rig.shape.head_dim)
        lengths = torch.full((batch,), context_tokens, dtype=torch.int32, device=device)
        return query, rig.block_tables(batch, context_tokens), lengths, rig.shape.head_dim**-0.5

    def _norm(self, num_rows: int) -> Figures:
        kernels, layers = self._rig.decoder.kernels, self._rig.decoder.weights.layers
        x, residual = self._rows(num_rows, self._rig.shape.hidden), self._rows(num_rows, self._rig.shape.hidden)
        calls: list[Call] = [partial(kernels.add_rms_norm, x, residual, layer.mlp_norm, _EPS) for layer in layers]
        return {"us": self._seconds(calls) * 1e6}

    def _rope(self, num_rows: int) -> Figures:
        rig, decoder, num_heads = self._rig, self._rig.decoder, self._rig.shape.num_heads
        qkv = self._rows(num_rows, rig.shape.matrices["qkv"][0])
        positions = torch.arange(num_rows, device=rig.queue.device)
        slots = rig.block_tables(num_rows, 1)[:, 0].long() * rig.loaded.fingerprint.block_size
        first, kv = decoder.weights.layers[0], rig.kv_cache.tensor
        norms: HeadNorms | None = None
        if first.q_norm is not None and first.k_norm is not None:
            norms = HeadNorms(first.q_norm, first.k_norm, _EPS)
        calls: list[Call] = [
            partial(decoder.kernels.rope_store, qkv, positions, decoder.rotary, kv[:, layer], slots, num_heads, norms)
            for layer in range(kv.shape[1])
        ]
        return {"us": self._seconds(calls) * 1e6}

    def _choose(self, num_rows: int, temperature: float) -> Figures:
        rig, kernels = self._rig, self._rig.decoder.kernels
        logits = torch.randn(num_rows, rig.shape.vocab, device=rig.queue.device)
        sampling = rig.state.first(num_rows).sampling
        with rig.queue.active():
            sampling.temperature.fill_(temperature)
        try:
            return {"us": self._seconds([partial(kernels.choose_tokens, logits, sampling)] * 4) * 1e6}
        finally:
            with rig.queue.active():
                sampling.temperature.zero_()
