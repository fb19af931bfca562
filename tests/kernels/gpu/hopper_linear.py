"""Products at the weights of the models that Baton is measured with."""

from __future__ import annotations

from typing import Any

from kernels.gpu import linear
from tests.kernels.gpu.hopper import HopperCase

# (outputs, depth) of qkv, attention output, one half of gate and up, down, and the vocabulary.
WEIGHTS = {
    "llama-3.1-8b": {
        "qkv": (6144, 4096), "out": (4096, 4096), "gate": (14336, 4096), "down": (4096, 14336), "head": (128256, 4096),
    },
    "qwen3-1.7b": {
        "qkv": (4096, 2048), "out": (2048, 2048), "gate": (6144, 2048), "down": (2048, 6144), "head": (151936, 2048),
    },
    "smollm2-135m": {
        "qkv": (960, 576), "out": (576, 576), "gate": (1536, 576), "down": (576, 1536), "head": (49152, 576),
    },
}  # fmt: skip


def _decode_case(model: str, weight: str, columns: int, dtype: str) -> HopperCase:
    outputs, depth = WEIGHTS[model][weight]
    is_gated, is_fp8 = weight == "gate", dtype == "*fp8e4nv"
    shape = linear.decode_shape(outputs, depth, 2, is_gated=is_gated)
    constants: dict[str, Any] = {
        "outputs": outputs,
        "depth": depth,
        "steps_per_split": shape.steps_per_split,
        "num_splits": shape.num_splits,
        "tile_depth": shape.tile_depth,
        "tile_outputs": linear.DECODE_OUTPUTS,
        "tile_columns": columns,
        "has_scales": is_fp8,
        "has_bias": False,
        "is_gated": is_gated,
    }
    signature = {
        "x": "*bf16", "weight": dtype, "scales": "*fp32", "bias": "*bf16", "out": "*bf16", "partials": "*fp32",
        "counters": "*i32", "num_columns": "i32", "x_stride": "i32",
    }  # fmt: skip
    name = f"decode_linear-{model}-{weight}-{columns}{'-fp8' if is_fp8 else ''}"
    return HopperCase(
        name, linear._decode_kernel, signature, constants, 4, shape.num_stages, aligned=("x_stride",)
    )  # fmt: skip


def _prompt_case(model: str, weight: str, dtype: str) -> HopperCase:
    outputs, depth = WEIGHTS[model][weight]
    rows, columns, tile_depth, num_warps, num_stages = linear.PROMPT_TILE
    constants: dict[str, Any] = {
        "outputs": outputs,
        "depth": depth,
        "tile_rows": rows,
        "tile_outputs": columns,
        "tile_depth": tile_depth,
        "group_rows": 8,
        "has_scales": dtype == "*fp8e4nv",
        "has_bias": False,
    }
    signature = {
        "x": "*bf16", "weight": dtype, "scales": "*fp32", "bias": "*bf16", "out": "*bf16", "num_rows": "i32",
        "x_stride": "i32",
    }  # fmt: skip
    name = f"linear-{model}-{weight}{'-fp8' if dtype == '*fp8e4nv' else ''}"
    return HopperCase(
        name, linear._prompt_kernel, signature, constants, num_warps, num_stages, aligned=("x_stride",)
    )  # fmt: skip


def cases() -> list[HopperCase]:
    """Every weight for one stream; the batch sizes, the types and the prompts at a weight of each kind."""
    found = [_decode_case(model, weight, 16, "*bf16") for model, weights in WEIGHTS.items() for weight in weights]
    found += [_decode_case("llama-3.1-8b", weight, n, "*bf16") for weight in ("qkv", "gate", "head") for n in (32, 64)]
    found += [_decode_case("llama-3.1-8b", weight, n, "*fp8e4nv") for weight in ("qkv", "gate") for n in (16, 64)]
    found += [_prompt_case("llama-3.1-8b", weight, "*bf16") for weight in ("qkv", "down")]
    return [*found, _prompt_case("llama-3.1-8b", "qkv", "*fp8e4nv"), _prompt_case("smollm2-135m", "qkv", "*bf16")]
