"""The small kernels around products and attention."""

from __future__ import annotations

from kernels.gpu import activation, lanes, norm, rope
from tests.kernels.gpu.hopper import HopperCase


def _norm_case(size: int, *, adds: bool) -> HopperCase:
    width = 1 << (size - 1).bit_length()
    pointers = dict.fromkeys(("x", "residual", "weight", "out", "total"), "*bf16")
    return HopperCase(
        f"{'add_' if adds else ''}rms_norm-{size}",
        norm._norm_kernel,
        pointers | {"eps": "fp32", "x_stride": "i32"},
        {"size": size, "width": width, "adds": adds},
        min(8, max(1, width // 512)),
        aligned=("x_stride",),
    )


def _rope_case(model: str, num_heads: int, num_kv_heads: int, head_dim: int, *, has_norms: bool) -> HopperCase:
    half = ("qkv", "kv", "q_weight", "k_weight", "out")
    signature = dict.fromkeys(half, "*bf16") | {
        "positions": "*i64", "cosines": "*fp32", "sines": "*fp32", "slots": "*i64", "eps": "fp32", "qkv_stride": "i32",
        "kv_block_stride": "i64", "kv_value_stride": "i32", "kv_head_stride": "i32",
    }  # fmt: skip
    constants = {
        "num_heads": num_heads, "num_kv_heads": num_kv_heads, "half": head_dim // 2, "width": head_dim // 2,
        "tile_heads": 16, "block_size": 16, "has_norms": has_norms,
    }  # fmt: skip
    strides = ("qkv_stride", "kv_block_stride", "kv_value_stride", "kv_head_stride")
    return HopperCase(f"rope_store-{model}", rope._rope_kernel, signature, constants, 4, aligned=strides)


def _lane_cases() -> list[HopperCase]:
    begin = {
        "positions": "*i64", "is_alive": "*i32", "num_prompt_tokens": "*i64", "block_tables": "*i32",
        "slot_mapping": "*i64", "seq_lens": "*i32", "index": "*i64", "num_lanes": "i32", "table_stride": "i32",
        "table_width": "i32",
    }  # fmt: skip
    end = {
        "token_ids": "*i64", "positions": "*i64", "is_alive": "*i32", "num_known": "*i64", "num_prompt_tokens": "*i64",
        "max_output_tokens": "*i64", "history": "*i32", "ending_ids": "*i32", "min_tokens": "*i32", "emitted": "*i64",
        "step": "*i64", "chosen": "*i64", "num_lanes": "i32", "history_stride": "i32", "history_width": "i32",
        "emitted_stride": "i32",
    }  # fmt: skip
    return [
        HopperCase("begin_step", lanes._begin_kernel, begin, {"block_size": 16, "width": 256}),
        HopperCase("end_step", lanes._end_kernel, end, {"ring": 4, "num_endings": 16, "width": 256}),
    ]


def cases() -> list[HopperCase]:
    """Give the shapes of the three models."""
    norms = [_norm_case(size, adds=adds) for size in (576, 2048, 4096) for adds in (False, True)]
    ropes = [
        _rope_case("llama-3.1-8b", 32, 8, 128, has_norms=False),
        _rope_case("qwen3-1.7b", 16, 8, 128, has_norms=True),
        _rope_case("smollm2-135m", 9, 3, 64, has_norms=False),
    ]
    silu = HopperCase(
        "silu_mul", activation._silu_mul_kernel, {"gate_up": "*bf16", "out": "*bf16"}, {"size": 14336, "tile": 1024}
    )
    return [*norms, *ropes, silu, *_lane_cases()]
