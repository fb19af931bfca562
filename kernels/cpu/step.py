"""The whole forward as one native call: decode steps and prefill chunks alike."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from kernels.cpu import abi
from kernels.cpu.matrix import PackedMatrix
from kernels.cpu.native import NativeKernels, check, kv_struct
from kernels.cpu.packed import FloatRows, pack


@dataclass(frozen=True, slots=True)
class StepLayer:
    """Weights of one layer: vectors as float32 tensors, matrices packed; absent biases and norms are None."""

    attention_norm: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    mlp_norm: Tensor
    qkv: PackedMatrix
    attention_out: PackedMatrix
    gate_up: PackedMatrix
    down: PackedMatrix


@dataclass(frozen=True, slots=True)
class StepModel:
    """Everything a forward reads but the batch and the KV.

    cos, sin: `[num_positions, head_dim / 2]` float32. lm_head is the embedding itself where the two are tied.
    Needs: hidden_size and intermediate_size multiples of 16 (of 32 where a matrix over them is quantised), head_dim
    of 16.
    """

    layers: tuple[StepLayer, ...]
    embedding: PackedMatrix
    lm_head: PackedMatrix
    final_norm: Tensor
    cos: Tensor
    sin: Tensor
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float

    def matrices(self) -> list[PackedMatrix]:
        """Give every matrix, a tied lm_head once."""
        found = {id(self.embedding): self.embedding, id(self.lm_head): self.lm_head}
        for layer in self.layers:
            found |= {id(m): m for m in (layer.qkv, layer.attention_out, layer.gate_up, layer.down)}
        return list(found.values())


@dataclass(frozen=True, slots=True)
class StepInput:
    """One batch, with the fields of `model.batch.ForwardBatch`: contiguous CPU tensors."""

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    query_start: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    logits_indices: Tensor


class NativeStep:
    """A model in the native library, ready to run. Forwards of several threads take turns.

    Args:
        kernels: threads and instruction set; owned from here on.
        model: kept alive as long as this object.
    """

    def __init__(self, kernels: NativeKernels, model: StepModel) -> None:
        self._kernels = kernels
        self._model = model
        self._vectors: list[Tensor] = []
        # Threads and working memory of the kernels serve one call at a time.
        self._turn = threading.Lock()
        layers = (abi.Layer * len(model.layers))(*(self._layer(layer) for layer in model.layers))
        self._layers = layers
        self._final = [self._vector(vector) for vector in (model.final_norm, model.cos, model.sin)]
        self._struct = self._model_struct(model.lm_head)
        self._identity: PackedMatrix | None = None

    def forward(
        self,
        batch: StepInput,
        kv_cache: Tensor,
        on_layer: Callable[[int], None] | None = None,
        stops: Collection[int] | None = None,
    ) -> Tensor:
        """Write the batch's KV and return logits `[R, vocab]` float32, a fresh tensor.

        The interpreter lock is released for the whole call but for `on_layer(l)`, which is called on this thread once
        layer l's KV of the whole batch stands in the cache, for the layers in `stops` (None: for every layer). What
        `on_layer` raises is raised again at the end. Raises ValueError before anything is written where the batch
        does not fit the cache, the vocabulary or the rotary tables.
        """
        return self._run(self._struct, batch, kv_cache, on_layer, stops)

    def _run(
        self,
        model: abi.Model,
        batch: StepInput,
        kv_cache: Tensor,
        on_layer: Callable[[int], None] | None,
        stops: Collection[int] | None,
    ) -> Tensor:
        tensors = [getattr(batch, field.name) for field in fields(batch)]
        for tensor in tensors:
            assert tensor.is_contiguous() and tensor.device.type == "cpu"
        logits = torch.empty(batch.logits_indices.shape[0], self._model.lm_head.rows)
        call = _Callback(on_layer)
        marks = np.zeros(len(self._model.layers), np.uint8)
        marks[range(len(marks)) if stops is None else sorted(stops)] = 1
        arguments = abi.Batch(
            *(tensor.data_ptr() for tensor in (*tensors, logits)),
            *(batch.token_ids.shape[0], batch.seq_lens.shape[0], batch.block_tables.shape[1], logits.shape[0]),
            call.function,
            marks.ctypes.data,
        )
        cache = kv_struct(kv_cache)
        references = (ctypes.byref(struct) for struct in (model, arguments, cache))
        with self._turn:
            check(self._kernels.library.functions.baton_forward(self._kernels.handle, *references))
        if call.error is not None:
            raise call.error
        return logits

    def forward_states(self, batch: StepInput, kv_cache: Tensor) -> Tensor:
        """Write the batch's KV and return the last hidden states, normed, `[R, hidden_size]` float32.

        They are what the step projects to the vocabulary, projected by the identity instead: every sum has one term
        that is not zero. The rows of a step's result lie a vocabulary apart, so the result is a view of a larger
        tensor that is never touched elsewhere. Raises as `forward` does.
        """
        if self._identity is None:
            rows = np.eye(self._model.embedding.cols, dtype=np.float32)
            self._identity = pack(self._kernels.library, [FloatRows(rows)], "f32")
        out = self._run(self._model_struct(self._identity), batch, kv_cache, None, None)
        return out[:, : self._identity.rows]

    def _model_struct(self, head: PackedMatrix) -> abi.Model:
        model = self._model
        return abi.Model(
            self._layers,
            *self._final,
            model.embedding.struct(),
            head.struct(),
            *(len(model.layers), model.embedding.cols, model.layers[0].down.cols),
            *(model.num_heads, model.num_kv_heads, model.head_dim, model.lm_head.rows, model.cos.shape[0]),
            model.eps,
            model.head_dim**-0.5,
        )

    def _vector(self, x: Tensor | None) -> int | None:
        if x is None:
            return None
        kept = x.detach().to(torch.float32).contiguous()
        self._vectors.append(kept)
        return kept.data_ptr()

    def _layer(self, layer: StepLayer) -> abi.Layer:
        vectors = (layer.attention_norm, layer.qkv_bias, layer.q_norm, layer.k_norm, layer.mlp_norm)
        matrices = (layer.qkv, layer.attention_out, layer.gate_up, layer.down)
        return abi.Layer(*(self._vector(x) for x in vectors), *(matrix.struct() for matrix in matrices))


class _Callback:
    """A Python callable for the library to call; an exception cannot pass through C, so it is kept."""

    def __init__(self, on_layer: Callable[[int], None] | None) -> None:
        self.error: BaseException | None = None
        self._on_layer = on_layer
        self.function = abi.ON_LAYER(self._call) if on_layer is not None else abi.ON_LAYER()

    def _call(self, layer: int) -> None:
        assert self._on_layer is not None
        try:
            if self.error is None:
                self._on_layer(layer)
        except BaseException as error:  # noqa: BLE001 - raised again by the caller of the native step
            self.error = error
