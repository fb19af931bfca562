"""The weights as the decoder holds them, and how they are assembled from any source.

A source gives single tensors under the names that Hugging Face uses (`model.layers.0.self_attn.q_proj.weight`), in
that layout, checked for shape; `assemble` packs them (q, k, v into one matrix; gate and up into one) in the dtype and
on the device of the decoder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from kernels.fp8 import Fp8Matrix, quantize_fp8
from kernels.quantized import QuantizedRows
from kernels.reference import Matrix
from model.config import ModelConfig
from model.errors import WeightError

ROPE_FACTORS = "model.rope_factors"
Progress: TypeAlias = Callable[[int, int, str], None]


class WeightSource(Protocol):
    """Where tensors come from: safetensors files, a GGUF file, or a random generator."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Give one tensor of a float dtype on the CPU; raises WeightError naming file, tensor and both shapes."""
        ...

    def quantized(self, name: str, shape: tuple[int, int]) -> QuantizedRows | None:
        """Give a matrix in its own quantisation, or None where the native kernels have none like it."""
        ...

    def is_float(self, name: str) -> bool:
        """Tell whether a tensor is stored as floats, not quantised."""
        ...

    def unused(self) -> list[str]:
        """Name the tensors of the source that nobody asked for, and that are not known to be ignorable."""
        ...


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer; matrices are `[out, in]`. Rows of qkv: all q heads, all k heads, all v heads."""

    attention_norm: Tensor
    qkv: Matrix
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    attention_out: Matrix
    mlp_norm: Tensor
    gate_up: Matrix
    down: Matrix


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """Everything learned. lm_head is the embedding itself where the two are tied.

    rope_factors: `[head_dim / 2]` float32, divides the rotary frequencies (GGUF's way to store llama3 scaling).
    """

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    lm_head: Tensor
    rope_factors: Tensor | None

    @property
    def arithmetic(self) -> str:
        """Name the numbers that a decoder of these weights computes with."""
        name = str(self.embedding.dtype).removeprefix("torch.")
        return f"{name} with fp8 weights" if isinstance(self.layers[0].qkv, Fp8Matrix) else name

    def num_bytes(self) -> int:
        """Count the bytes that the weights take, a tied lm_head once."""
        tensors = {id(tensor): tensor for tensor in self._tensors()}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def _tensors(self) -> list[Tensor]:
        found: list[Tensor | None] = [self.embedding, self.final_norm, self.lm_head, self.rope_factors]
        for layer in self.layers:
            found += [layer.attention_norm, layer.qkv_bias, layer.q_norm, layer.k_norm, layer.mlp_norm]
            for matrix in (layer.qkv, layer.attention_out, layer.gate_up, layer.down):
                found += [matrix.data, matrix.scales] if isinstance(matrix, Fp8Matrix) else [matrix]
        return [tensor for tensor in found if tensor is not None]


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """What loading took: bytes of weights in memory, seconds, dtype and device."""

    weight_bytes: int
    load_s: float
    dtype: str
    device: str

    def __str__(self) -> str:
        """Say it in one line."""
        return f"{self.weight_bytes / 1e6:.0f} MB of {self.dtype} weights on {self.device} in {self.load_s:.1f} s"


def assemble(
    config: ModelConfig,
    source: WeightSource,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None,
    *,
    is_fp8: bool = False,
) -> DecoderWeights:
    """Read every tensor that the config asks for and pack them for the decoder; raises WeightError.

    `progress(done, total, name)` is called after each tensor. `is_fp8` rounds the matrices of the layers to 8-bit
    floats on the device, one layer after another; embedding and lm_head stay as they are. The caller owns the result.
    """
    reader = _Reader(config, source, dtype, device, progress, quantize_fp8 if is_fp8 else _as_is)
    embedding = reader.one("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    layers = tuple(reader.layer(index) for index in range(config.num_layers))
    final_norm = reader.one("model.norm.weight", config.hidden_size)
    lm_head = embedding
    if not config.tie_embeddings:
        lm_head = reader.one("lm_head.weight", config.vocab_size, config.hidden_size)
    factors: Tensor | None = None
    if config.rope_scaling.kind == "tensor":
        factors = source.tensor(ROPE_FACTORS, (config.head_dim // 2,)).to(device, torch.float32)
    if left := source.unused():
        raise WeightError(f"{config.architecture} has no place for {len(left)} tensors of this model, as {left[0]!r}")
    return DecoderWeights(embedding, layers, final_norm, lm_head, factors)


@dataclass(slots=True)
class _Reader:
    config: ModelConfig
    source: WeightSource
    dtype: torch.dtype
    device: torch.device
    progress: Progress | None
    matrix: Callable[[Tensor], Matrix]
    num_read: int = 0

    def one(self, name: str, *shape: int) -> Tensor:
        tensor = self.source.tensor(name, shape)
        self.num_read += 1
        if self.progress is not None:
            self.progress(self.num_read, self._num_tensors(), name)
        return tensor.to(self.device, self.dtype)

    def layer(self, index: int) -> LayerWeights:
        c, prefix = self.config, f"model.layers.{index}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        heads = {"q_proj": c.num_heads, "k_proj": c.num_kv_heads, "v_proj": c.num_kv_heads}
        rows = {name: count * c.head_dim for name, count in heads.items()}
        qkv = [self.one(f"{attention}{name}.weight", size, c.hidden_size) for name, size in rows.items()]
        bias = [self.one(f"{attention}{name}.bias", size) for name, size in rows.items()] if c.qkv_bias else []
        return LayerWeights(
            attention_norm=self.one(prefix + "input_layernorm.weight", c.hidden_size),
            qkv=self.matrix(torch.cat(qkv)),
            qkv_bias=torch.cat(bias) if bias else None,
            q_norm=self.one(attention + "q_norm.weight", c.head_dim) if c.qk_norm else None,
            k_norm=self.one(attention + "k_norm.weight", c.head_dim) if c.qk_norm else None,
            attention_out=self.matrix(self.one(attention + "o_proj.weight", c.hidden_size, rows["q_proj"])),
            mlp_norm=self.one(prefix + "post_attention_layernorm.weight", c.hidden_size),
            gate_up=self.matrix(
                torch.cat(
                    [
                        self.one(f"{mlp}{name}.weight", c.intermediate_size, c.hidden_size)
                        for name in ("gate_proj", "up_proj")
                    ]
                )
            ),
            down=self.matrix(self.one(mlp + "down_proj.weight", c.hidden_size, c.intermediate_size)),
        )

    def _num_tensors(self) -> int:
        per_layer = 9 + 3 * self.config.qkv_bias + 2 * self.config.qk_norm
        return 2 + (not self.config.tie_embeddings) + per_layer * self.config.num_layers


def _as_is(weight: Tensor) -> Matrix:
    return weight
