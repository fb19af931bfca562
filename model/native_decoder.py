"""The decoder on a CPU: one native call per forward, weights in the file's own quantisation or as floats.

source ─► quantised rows as they are stored, or float rows ─► packed once ─► NativeStep ─► logits
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from kernels.cpu.matrix import PackedMatrix
from kernels.cpu.native import NativeKernels, NativeLibrary
from kernels.cpu.packed import FloatRows, WeightMemory, pack
from kernels.cpu.step import NativeStep, StepInput, StepLayer, StepModel
from kernels.quantized import GROUP, QuantizedRows
from model.batch import ForwardBatch
from model.config import ModelConfig
from model.errors import WeightError
from model.rotary import rotary_tables
from model.weights import ROPE_FACTORS, LoadSummary, Progress, WeightSource

QUANTIZATIONS = ("none", "stored", "int8", "int4")


class NativeDecoder:
    """A decoder-only transformer in the native library; a `model.decoder.Decoder`.

    Args:
        config: the model's shape; `why_not` must have nothing against it.
        packed: its weights.
        kernels: threads and instruction set; not shared with another decoder.
        load_summary: what loading took.
    """

    def __init__(
        self, config: ModelConfig, packed: StepModel, kernels: NativeKernels, load_summary: LoadSummary
    ) -> None:
        self.config = config
        self.load_summary = load_summary
        self.max_context_tokens = packed.cos.shape[0]
        self.device = torch.device("cpu")
        formats = "+".join(sorted({matrix.format for matrix in packed.matrices()}))
        is_exact = formats == "f32"
        self.arithmetic = "float32" if is_exact else f"{formats} by int8"
        # The rounding of activations dwarfs that of half-precision KV, which halves what is stored and sent.
        self.kv_dtype = torch.float32 if is_exact else torch.float16
        kept = "exact float32" if is_exact else f"{formats} by int8 activations"
        self.backend = f"one native call per step, {kernels.instruction_set} (the best this processor has), {kept}"
        self._step = NativeStep(kernels, packed)

    def kv_shape(self, num_blocks: int, block_size: int) -> tuple[int, ...]:
        """Give the shape of a KV cache for this model: one block of all layers is contiguous."""
        c = self.config
        return num_blocks, c.num_layers, 2, c.num_kv_heads, block_size, c.head_dim

    def forward(
        self,
        batch: ForwardBatch,
        kv_cache: Tensor,
        on_layer: Callable[[int], None] | None = None,
        stops: Collection[int] | None = None,
    ) -> Tensor:
        """Run the batch through the model in one native call; see `model.decoder.Decoder.forward`.

        kv_cache may be float32, float16 or bfloat16. Calls of two threads take turns. Raises ValueError,
        with nothing written, for a batch that does not fit the cache or the model.
        """
        return self._step.forward(_step_input(batch), kv_cache, on_layer, stops)

    def forward_states(self, batch: ForwardBatch, kv_cache: Tensor) -> Tensor:
        """Run the batch for its last hidden states; see `model.decoder.Decoder.forward_states`."""
        return self._step.forward_states(_step_input(batch), kv_cache)


def _step_input(batch: ForwardBatch) -> StepInput:
    return StepInput(*(getattr(batch, part.name) for part in fields(StepInput)))


def why_not(config: ModelConfig) -> str | None:
    """Say why the native step cannot run a model of this shape, or None where it can."""
    for name in ("hidden_size", "intermediate_size", "head_dim"):
        if getattr(config, name) % 16:
            return f"{name} {getattr(config, name)} is no multiple of 16"
    return None


def pack_model(
    config: ModelConfig,
    source: WeightSource,
    library: NativeLibrary,
    *,
    quantization: str,
    max_context_tokens: int,
    progress: Progress | None,
) -> StepModel:
    """Read and pack every tensor that the config asks for; raises WeightError.

    Args:
        config: the model's shape.
        source: where tensors come from.
        library: packs them.
        quantization: "none" for float32, "stored" for what the file holds where the kernels know it and 8 bits
            where it is another quantisation, "int8" or "int4" to quantise floats.
        max_context_tokens: length of the rotary tables.
        progress: called with (done, total, name) after each matrix.
    """
    packer = _Packer(config, source, library, quantization, progress)
    embedding = packer.matrix("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    layers = tuple(packer.layer(index) for index in range(config.num_layers))
    final_norm = packer.vector("model.norm.weight", config.hidden_size)
    lm_head = embedding
    if not config.tie_embeddings:
        lm_head = packer.matrix("lm_head.weight", config.vocab_size, config.hidden_size)
    factors: Tensor | None = None
    if config.rope_scaling.kind == "tensor":
        factors = source.tensor(ROPE_FACTORS, (config.head_dim // 2,)).float()
    if left := source.unused():
        raise WeightError(f"{config.architecture} has no place for {len(left)} tensors of this model, as {left[0]!r}")
    cos, sin = rotary_tables(config, max_context_tokens, torch.device("cpu"), factors)
    return StepModel(
        layers=layers,
        embedding=embedding,
        lm_head=lm_head,
        final_norm=final_norm,
        cos=cos,
        sin=sin,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        eps=config.rms_eps,
    )


@dataclass(slots=True)
class _Packer:
    config: ModelConfig
    source: WeightSource
    library: NativeLibrary
    quantization: str
    progress: Progress | None
    num_done: int = 0
    memory: WeightMemory = field(default_factory=WeightMemory)

    def vector(self, name: str, size: int) -> Tensor:
        return self.source.tensor(name, (size,)).float()

    def matrix(self, name: str, rows: int, cols: int) -> PackedMatrix:
        return self.stacked([(name, rows)], cols)

    def stacked(self, parts: list[tuple[str, int]], cols: int) -> PackedMatrix:
        """Pack matrices under each other: as stored where all are stored alike, else by way of floats."""
        kept = self._stored(parts, cols)
        if kept is not None:
            format_name = kept[0].format
            packed = pack(self.library, kept, format_name, self.memory)
        else:
            format_name = self._format_of_floats(parts, cols)
            floats = [self.source.tensor(name, (rows, cols)).float().contiguous() for name, rows in parts]
            packed = pack(self.library, [FloatRows(values.numpy()) for values in floats], format_name, self.memory)
        self.num_done += 1
        if self.progress is not None:
            self.progress(self.num_done, 4 * self.config.num_layers + 1, parts[0][0])
        return packed

    def layer(self, index: int) -> StepLayer:
        c, prefix = self.config, f"model.layers.{index}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        heads = {"q_proj": c.num_heads, "k_proj": c.num_kv_heads, "v_proj": c.num_kv_heads}
        sizes = {name: count * c.head_dim for name, count in heads.items()}
        bias = [self.vector(f"{attention}{name}.bias", size) for name, size in sizes.items()] if c.qkv_bias else []
        return StepLayer(
            attention_norm=self.vector(prefix + "input_layernorm.weight", c.hidden_size),
            qkv_bias=torch.cat(bias) if bias else None,
            q_norm=self.vector(attention + "q_norm.weight", c.head_dim) if c.qk_norm else None,
            k_norm=self.vector(attention + "k_norm.weight", c.head_dim) if c.qk_norm else None,
            mlp_norm=self.vector(prefix + "post_attention_layernorm.weight", c.hidden_size),
            qkv=self.stacked([(f"{attention}{name}.weight", size) for name, size in sizes.items()], c.hidden_size),
            attention_out=self.matrix(attention + "o_proj.weight", c.hidden_size, sizes["q_proj"]),
            gate_up=self.stacked(
                [(f"{mlp}{name}.weight", c.intermediate_size) for name in ("gate_proj", "up_proj")], c.hidden_size
            ),
            down=self.matrix(mlp + "down_proj.weight", c.hidden_size, c.intermediate_size),
        )

    def _stored(self, parts: list[tuple[str, int]], cols: int) -> list[QuantizedRows] | None:
        if self.quantization != "stored":
            return None
        rows = [self.source.quantized(name, (size, cols)) for name, size in parts]
        kept = [part for part in rows if part is not None]
        return kept if len(kept) == len(parts) and len({part.format for part in kept}) == 1 else None

    def _format_of_floats(self, parts: list[tuple[str, int]], cols: int) -> str:
        if cols % GROUP or self.quantization == "none":
            return "f32"
        if self.quantization == "stored" and all(self.source.is_float(name) for name, _ in parts):
            return "f32"
        return "q4_1" if self.quantization == "int4" else "q8_0"
