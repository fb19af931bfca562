"""Decode and prefill attention at the shapes of the models that Baton is measured with, and at some odd ones."""

from __future__ import annotations

from kernels.gpu import decode_attention as decode
from kernels.gpu import prefill_attention as prefill
from tests.kernels.gpu.hopper import HopperCase

# num_heads, num_kv_heads, head_dim
MODELS = {"llama-3.1-8b": (32, 8, 128), "qwen3-1.7b": (16, 8, 128), "smollm2-135m": (9, 3, 64)}
ODD = {"one-kv-head": (32, 1, 128), "wide-heads": (16, 8, 256), "heads-of-80": (16, 8, 80)}
WIDTHS = {"bf16": 2, "fp16": 2, "fp32": 4}
STRIDES = ("q_row_stride", "q_head_stride", "out_row_stride", "kv_block_stride", "kv_value_stride", "kv_head_stride")


def _signature(dtype: str, integers: tuple[str, ...], pointers: dict[str, str]) -> dict[str, str]:
    tensors = dict.fromkeys(("q", "kv", "out"), f"*{dtype}") | {"block_tables": "*i32", "seq_lens": "*i32"} | pointers
    numbers = dict.fromkeys((*STRIDES, "table_stride", "max_context_tokens", *integers), "i32")
    return tensors | numbers | {"scale_log2": "fp32"}


def _decode_case(model: str, block_size: int = 16, dtype: str = "bf16", fused: bool = True) -> HopperCase:
    num_heads, num_kv_heads, head_dim = (MODELS | ODD)[model]
    constexprs = {
        "num_kv_heads": num_kv_heads,
        "group": num_heads // num_kv_heads,
        "head_dim": head_dim,
        "block_size": block_size,
        "tile": decode.tile_tokens(head_dim, WIDTHS[dtype]),
        "fused_combine": fused,
    }
    scratch = {"sums": "*fp32", "scales": "*fp32", "counters": "*i32"}
    return HopperCase(
        name=f"decode_attention-{model}-block{block_size}-{dtype}-{'fused' if fused else 'separate'}",
        kernel=decode._decode_kernel,
        signature=_signature(dtype, ("scratch_splits",), scratch),
        constexprs=constexprs,
        num_warps=decode.NUM_WARPS,
        num_stages=decode.NUM_STAGES,
        aligned=STRIDES,
    )


def _combine_case(model: str) -> HopperCase:
    num_heads, num_kv_heads, head_dim = MODELS[model]
    signature = dict.fromkeys(("sums", "scales"), "*fp32") | {"out": "*bf16", "seq_lens": "*i32"}
    return HopperCase(
        name=f"combine_attention-{model}",
        kernel=decode._combine_kernel,
        signature=signature | dict.fromkeys(("max_context_tokens", "scratch_splits", "out_row_stride"), "i32"),
        constexprs={"num_kv_heads": num_kv_heads, "group": num_heads // num_kv_heads, "head_dim": head_dim},
        num_warps=decode.NUM_WARPS,
        aligned=("out_row_stride",),
    )


def _prefill_case(model: str, block_size: int = 16, dtype: str = "bf16") -> HopperCase:
    num_heads, num_kv_heads, head_dim = (MODELS | ODD)[model]
    group = num_heads // num_kv_heads
    shape = prefill.tile_shape(head_dim, WIDTHS[dtype], group)
    constexprs = {"group": group, "head_dim": head_dim, "block_size": block_size}
    return HopperCase(
        name=f"prefill_attention-{model}-block{block_size}-{dtype}",
        kernel=prefill._prefill_kernel,
        signature=_signature(dtype, ("num_sequences",), {"query_start": "*i32"}),
        constexprs=constexprs | {"tile_rows": shape.rows, "tile_tokens": shape.tokens},
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        aligned=STRIDES,
        with_loops=model in MODELS and block_size == 16 and dtype != "fp16",
    )


def cases() -> list[HopperCase]:
    """Return every model in bfloat16, and for one of each the other block sizes, dtypes and shapes of heads."""
    found = [_combine_case("llama-3.1-8b"), _decode_case("llama-3.1-8b", fused=False)]
    for make in (_decode_case, _prefill_case):
        found.extend(make(model) for model in (*MODELS, *ODD))
        found.extend(make("llama-3.1-8b", block_size) for block_size in (32, 64))
        found.append(make("llama-3.1-8b", dtype="fp16"))
        found.append(make("smollm2-135m", dtype="fp32"))
    return found
