"""The two models that are measured, the least work of their steps, and Baton's targets.

A step's floor is the bytes it must read (weights without the rows of the embedding, the projection to the vocabulary,
keys and values of every sequence) over the bandwidth of a copy on the same GPU. Norms and rows of activations are not
counted: together they are less than a thousandth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from bench.kernels.shape import Load, Shape, step_work
from model.config import ModelConfig, from_hf

DTYPE_BYTES: Final = 2
_WEIGHTS: Final = "bf16"

LLAMA_8B: Final[Mapping[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
QWEN3_1_7B: Final[Mapping[str, Any]] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
# What a rehearsal computes with in their place: the same architectures, small enough for a CPU.
_TINY: Final[Mapping[str, Any]] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True, slots=True)
class BenchModel:
    """A model as it is measured.

    Attributes:
        name: how the command line and the tables call it.
        title: whose shape it has.
        hugging_face: its config.json.
    """

    name: str
    title: str
    hugging_face: Mapping[str, Any]

    @property
    def config(self) -> ModelConfig:
        """What the decoder is built from."""
        return from_hf(self.hugging_face)

    @property
    def shape(self) -> Shape:
        """What work is counted by."""
        return shape_of(self.config)

    def tiny(self) -> BenchModel:
        """Give what stands for it in a rehearsal."""
        return BenchModel(self.name, f"a tiny {self.title}", {**self.hugging_face, **_TINY})


MODELS: Final = {
    "8b": BenchModel("8b", "Llama-3.1-8B", LLAMA_8B),
    "1.7b": BenchModel("1.7b", "Qwen3-1.7B", QWEN3_1_7B),
}


def shape_of(config: ModelConfig) -> Shape:
    """Give a config's sizes."""
    return Shape(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        num_layers=config.num_layers,
        vocab=config.vocab_size,
        activation_bytes=DTYPE_BYTES,
    )


def kv_token_bytes(shape: Shape) -> int:
    """Return the bytes of keys and values of one token, all layers."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * DTYPE_BYTES


def streamed_bytes(shape: Shape) -> float:
    """Return the bytes of weights that every decode step reads, whatever its batch."""
    return (shape.num_layers * shape.layer_weights + shape.vocab * shape.hidden) * float(DTYPE_BYTES)


def step_bytes(shape: Shape, batch: int, context_tokens: int) -> float:
    """Return the bytes that a decode step of `batch` sequences of so many tokens each must read."""
    return streamed_bytes(shape) + batch * context_tokens * float(kv_token_bytes(shape))


def prefill_operations(shape: Shape, num_tokens: int, num_cached_tokens: int = 0) -> float:
    """Return the operations of computing `num_tokens` of one prompt behind a cached prefix, logits of the last row.

    A multiply-add is two; attention counts the causal pairs only.
    """
    load = Load(1, num_cached_tokens + num_tokens, num_tokens)
    return step_work(shape, load, _WEIGHTS, _WEIGHTS, DTYPE_BYTES).num_operations


def handoff_bytes(shape: Shape, num_tokens: int) -> int:
    """Return the bytes of keys and values that a hand-off of so many tokens moves."""
    return num_tokens * kv_token_bytes(shape)


@dataclass(frozen=True, slots=True)
class Target:
    """The target of the median ITL at the client, as a multiple of the floor.

    Attributes:
        is_published: the row is one of the stated targets; the others were derived beside them.
    """

    batch: int
    context_tokens: int
    gate: float
    stretch: float
    is_published: bool


def _targets(*rows: tuple[int, int, float, float, bool]) -> tuple[Target, ...]:
    return tuple(Target(*row) for row in rows)


TARGETS: Final[Mapping[str, tuple[Target, ...]]] = {
    "8b": _targets(
        (1, 1024, 1.20, 1.10, True),
        (8, 1024, 1.22, 1.12, True),
        (32, 1024, 1.30, 1.18, True),
        (64, 8192, 1.18, 1.12, True),
        (1, 8192, 1.20, 1.12, False),
        (8, 8192, 1.22, 1.14, False),
        (32, 8192, 1.18, 1.12, False),
        (64, 1024, 1.35, 1.22, False),
    ),
    "1.7b": _targets(
        (1, 1024, 1.60, 1.28, True),
        (8, 1024, 1.60, 1.30, True),
        (32, 1024, 1.50, 1.30, True),
        (64, 8192, 1.18, 1.12, True),
        (1, 8192, 1.55, 1.28, False),
        (8, 8192, 1.35, 1.20, False),
        (32, 8192, 1.20, 1.12, False),
        (64, 1024, 1.45, 1.25, False),
    ),
}
# The other targets: at least, or at most, so much.
LEAST_ATTENTION_SHARE: Final = 0.88
LEAST_PREFILL_SHARE: Final = 0.65
MOST_CLIENT_OVER_DEVICE: Final = 1.02
MOST_P99_OVER_MEDIAN: Final = 1.10
