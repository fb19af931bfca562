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

TYPES = ("*bf16", "*fp8e4nv")


def _decode_case(model: str, weight: str, num_rows: int, dtype: str) -> HopperCase:
    outputs, depth = WEIGHTS[model][weight]
    is_gated, is_fp8 = weight == "gate", dtype == "*fp8e4nv"
    split = linear.decode_split(outputs, depth)
    tile = linear.decode_tile(num_rows, 2, 1 if is_fp8 else 2, is_gated=is_gated)
    constants: dict[str, Any] = {
        "outputs": outputs,
        "depth": depth,
        "split_depth": split.depth,
        "num_splits": split.num_splits,
        "tile_outputs": tile.outputs,
        "tile_columns": tile.columns,
        "tile_depth": tile.depth,
        "has_scales": is_fp8,
        "has_bias": False,
        "is_gated": is_gated,
    }
    signature = {
        "x": "*bf16", "weight": dtype, "scales": "*fp32", "bias": "*bf16", "out": "*bf16", "partials": "*fp32",
        "counters": "*i32", "num_columns": "i32", "x_stride": "i32",
    }  # fmt: skip
    name = f"decode_linear-{model}-{weight}-{num_rows}{'-fp8' if is_fp8 else ''}"
    return HopperCase(
        name, linear._decode_kernel, signature, constants, tile.num_warps, tile.num_stages, aligned=("x_stride",)
    )


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
    """Every weight for one stream, of both types; more rows, and prompts, at weights of each kind."""
    found = []
    for model, weights in WEIGHTS.items():
        found += [_decode_case(model, weight, 16, "*bf16") for weight in weights]
        # The vocabulary keeps its type.
        found += [_decode_case(model, weight, 16, "*fp8e4nv") for weight in weights if weight != "head"]
        found += [_decode_case(model, weight, 64, "*bf16") for weight in ("qkv", "gate", "head")]
        found.append(_decode_case(model, "gate", 64, "*fp8e4nv"))
    found += [_decode_case("llama-3.1-8b", weight, 32, dtype) for weight in ("qkv", "gate") for dtype in TYPES]
    found.append(_decode_case("llama-3.1-8b", "qkv", 64, "*fp8e4nv"))
    found += [_prompt_case("llama-3.1-8b", weight, "*bf16") for weight in ("qkv", "down")]
    return [*found, _prompt_case("llama-3.1-8b", "qkv", "*fp8e4nv"), _prompt_case("smollm2-135m", "qkv", "*bf16")]
