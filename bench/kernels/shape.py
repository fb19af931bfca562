"""A model's sizes, and the least work of each kernel: bytes that must be moved, operations that must be done.

A multiply-add counts as two operations. Bytes are those that no cache can hold from one step to the next: weights and
KV; inputs and outputs of single rows count as bytes of the second-level cache, since the kernel before has just written
them. What a kernel adds of its own (unpacking, rounding, scaling, masks) is not counted: a floor is what remains if all
of that were free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

# Stored bits of a weight, scales included.
WEIGHT_BITS: Final = {"f32": 32.0, "bf16": 16.0, "q8_0": 8.5, "q4_0": 4.5, "q4_1": 5.0}
Arithmetic = Literal["float", "int8", "int4"]
ARITHMETIC: Final[dict[str, Arithmetic]] = {
    "f32": "float", "bf16": "float", "q8_0": "int8", "q4_0": "int4", "q4_1": "int4",
}  # fmt: skip
BLOCK_SIZE: Final = 16
# exp in float32 takes about ten multiply-adds; a division, a product and two sums come on top.
SILU_OPERATIONS: Final = 24.0


@dataclass(frozen=True, slots=True)
class Work:
    """The least work of one call.

    Attributes:
        num_bytes: of weights and KV, from memory.
        cached_bytes: of rows, to and from the second-level cache.
    """

    num_bytes: float = 0.0
    cached_bytes: float = 0.0
    float_operations: float = 0.0
    int8_operations: float = 0.0
    int4_operations: float = 0.0

    @property
    def num_operations(self) -> float:
        """Operations of every kind."""
        return self.float_operations + self.int8_operations + self.int4_operations

    def __add__(self, other: Work) -> Work:
        """Do both."""
        return Work(
            self.num_bytes + other.num_bytes,
            self.cached_bytes + other.cached_bytes,
            self.float_operations + other.float_operations,
            self.int8_operations + other.int8_operations,
            self.int4_operations + other.int4_operations,
        )


@dataclass(frozen=True, slots=True)
class Load:
    """One batch: `batch` sequences of `context` tokens each, of which the last `queries` are computed."""

    batch: int
    context: int
    queries: int = 1

    @property
    def name(self) -> str:
        """How tables call it."""
        if self.queries == 1:
            return f"decode {self.batch} x {self.context}"
        many = f"{self.batch} x " if self.batch > 1 else ""
        return f"prefill {many}{self.queries} at {self.context}"

    @property
    def num_rows(self) -> int:
        """Rows of the forward."""
        return self.batch * self.queries

    @property
    def num_pairs(self) -> float:
        """Pairs of a query and a position that it sees."""
        return self.batch * (self.queries * self.context - self.queries * (self.queries - 1) / 2)


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's sizes; SmolLM2-135M unless told otherwise.

    Attributes:
        activation_bytes: of one element of a row: 4 on a CPU, 2 on a GPU.
    """

    hidden: int = 576
    intermediate: int = 1536
    num_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64
    num_layers: int = 30
    vocab: int = 49152
    activation_bytes: int = 4

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Sizes (outputs, inputs) of a layer's matrices, by name."""
        heads = self.num_heads * self.head_dim
        return {
            "qkv": (heads + 2 * self.num_kv_heads * self.head_dim, self.hidden),
            "out": (self.hidden, heads),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }

    @property
    def head(self) -> tuple[int, int]:
        """Size (outputs, inputs) of the projection to the vocabulary."""
        return self.vocab, self.hidden

    @property
    def layer_sizes(self) -> tuple[tuple[int, int], ...]:
        """Sizes of all of a layer's matrices."""
        return tuple(self.matrices.values())

    @property
    def layer_weights(self) -> int:
        """Weights of a layer's matrices."""
        return sum(outputs * inputs for outputs, inputs in self.layer_sizes)


def linear_work(shape: Shape, sizes: tuple[tuple[int, int], ...], num_rows: int, weight_format: str) -> Work:
    """Return the work of rows through matrices of the given sizes (outputs, inputs)."""
    num_weights = float(sum(outputs * inputs for outputs, inputs in sizes))
    operations = _operations(weight_format, 2.0 * num_rows * num_weights)
    moved = shape.activation_bytes * num_rows * sum(outputs + inputs for outputs, inputs in sizes)
    return Work(num_weights * WEIGHT_BITS[weight_format] / 8, moved) + operations


def attention_work(shape: Shape, load: Load, kv_bytes: int) -> Work:
    """Return the work of one layer's attention; kv_bytes: of one element of the cache."""
    stored = 2.0 * load.batch * load.context * shape.num_kv_heads * shape.head_dim * kv_bytes
    moved = 2 * shape.activation_bytes * load.num_rows * shape.num_heads * shape.head_dim
    return Work(stored, moved, 4.0 * load.num_pairs * shape.num_heads * shape.head_dim)


def rms_norm_work(shape: Shape, num_rows: int) -> Work:
    """Return the work of a norm over the hidden dimension."""
    size = float(num_rows * shape.hidden)
    return Work(cached_bytes=2 * shape.activation_bytes * size, float_operations=4 * size)


def rope_work(shape: Shape, num_rows: int) -> Work:
    """Return the work of rotating q and k."""
    size = float(num_rows * (shape.num_heads + shape.num_kv_heads) * shape.head_dim)
    return Work(cached_bytes=2 * shape.activation_bytes * size, float_operations=3 * size)


def silu_mul_work(shape: Shape, num_rows: int) -> Work:
    """Return the work of SiLU times up."""
    size = float(num_rows * shape.intermediate)
    return Work(cached_bytes=3 * shape.activation_bytes * size, float_operations=SILU_OPERATIONS * size)


def store_kv_work(shape: Shape, num_rows: int, kv_bytes: int) -> Work:
    """Return the work of writing rows of K and V into slots that no cache holds."""
    size = 2.0 * num_rows * shape.num_kv_heads * shape.head_dim
    return Work(size * kv_bytes, shape.activation_bytes * size)


def step_work(shape: Shape, load: Load, weight_format: str, head_format: str, kv_bytes: int) -> Work:
    """Return the work of a whole forward that gives logits for the last row of each sequence.

    After the last layer's attention only those rows go on.
    """
    attention = attention_work(shape, load, kv_bytes)
    first = float(shape.matrices["qkv"][0] * shape.matrices["qkv"][1])
    rest = shape.layer_weights - first
    num_all, num_last, layers = load.num_rows, load.batch, shape.num_layers
    products = layers * num_all * first + ((layers - 1) * num_all + num_last) * rest
    head_weights = float(shape.vocab * shape.hidden)
    weight_bytes = layers * shape.layer_weights * WEIGHT_BITS[weight_format] + head_weights * WEIGHT_BITS[head_format]
    return (
        Work(weight_bytes / 8 + layers * attention.num_bytes, 0.0, layers * attention.float_operations)
        + _operations(weight_format, 2 * products)
        + _operations(head_format, 2 * num_last * head_weights)
    )


def _operations(weight_format: str, count: float) -> Work:
    match ARITHMETIC[weight_format]:
        case "float":
            return Work(float_operations=count)
        case "int8":
            return Work(int8_operations=count)
        case "int4":
            return Work(int4_operations=count)
