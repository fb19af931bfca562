"""Sampling at the vocabularies of the models that Baton is measured with; copies of KV blocks, and the checksum."""

from __future__ import annotations

from typing import Any

from kernels.gpu import blocks, checksum, draw, sampling
from tests.kernels.gpu.hopper import HopperCase

VOCABULARIES = {"llama-3.1-8b": 128_256, "qwen3-1.7b": 151_936, "smollm2-135m": 49_152}
# As the lanes of a worker have them: room for the most that a request may ask for.
NUM_BIASES, NUM_ENDINGS = 1024, 1088

_PARAMETERS = {
    "temperature": "*fp32",
    "index": "*i64",
    "repetition": "*fp32",
    "presence": "*fp32",
    "frequency": "*fp32",
    "min_tokens": "*i32",
    "ending_ids": "*i32",
    "bias_ids": "*i32",
    "bias_values": "*fp32",
    "has_grammar": "*i1",
    "logits_stride": "i32",
    "counts_stride": "i32",
    "grammar_stride": "i32",
}
_LANE = {
    "logits": "*fp32",
    "temperatures": "*fp32",
    "top_ks": "*i32",
    "top_ps": "*fp32",
    "min_ps": "*fp32",
    "maxima": "*fp32",
    "counts": "*i32",
    "masses": "*i64",
    "near": "*i32",
    "firsts": "*i32",
    "seeds": "*i64",
    "indices": "*i64",
    "chosen": "*i64",
    "logits_stride": "i32",
    "num_lanes": "i32",
}


def _shape(vocab_size: int) -> dict[str, int]:
    num_tiles = -(-vocab_size // sampling.TILE)
    return {"vocab_size": vocab_size, "num_tiles": num_tiles, "tile": sampling.TILE}


def _maxima_case(model: str, what: str, dtype: str) -> HopperCase:
    outputs = {"adjust": ("adjusted",), "choose": ("maxima", "firsts"), "sample": ("adjusted", "maxima", "firsts")}[
        what
    ]
    types = {"adjusted": "*fp32", "maxima": "*fp32", "firsts": "*i32", "counts": "*i32", "grammar_bits": "*i32"}
    given = (*outputs, "counts", "grammar_bits") if what != "choose" else outputs
    absent: dict[str, Any] = {name: None for name in types if name not in given}
    widths = {"num_endings": NUM_ENDINGS, "num_biases": NUM_BIASES, "endings_width": 2048, "biases_width": 1024}
    return HopperCase(
        name=f"sampling-maxima-{what}-{model}-{dtype}",
        kernel=sampling._maxima_kernel,
        signature=_PARAMETERS | {"logits": f"*{dtype}"} | {name: types[name] for name in given},
        constexprs=absent | widths | _shape(VOCABULARIES[model]),
        num_warps=sampling.NUM_WARPS,
        aligned=("logits_stride", "counts_stride", "grammar_stride"),
    )


def _draw_case(model: str, name: str, kernel: Any, num_warps: int, dtype: str = "fp32", **extra: int) -> HopperCase:
    shape = _shape(VOCABULARIES[model])
    width = max(1 << (shape["num_tiles"] - 1).bit_length(), 16)
    return HopperCase(
        name=f"sampling-{name}-{model}-{dtype}",
        kernel=kernel,
        signature={arg: kind for arg, kind in (_LANE | {"logits": f"*{dtype}"}).items() if arg in kernel.arg_names},
        constexprs=shape | {"tiles_width": width} | extra,
        num_warps=num_warps,
        aligned=("logits_stride",),
    )


def cases() -> list[HopperCase]:
    """Return every pass of a choice, from adjusted and from raw logits."""
    found = [_maxima_case("qwen3-1.7b", what, dtype) for what in ("adjust", "choose") for dtype in ("bf16", "fp32")]
    for model in VOCABULARIES:
        found.append(_maxima_case(model, "sample", "bf16"))
        for level in (0, 1):
            found.append(_draw_case(model, f"survey{level}", draw.survey_kernel, sampling.NUM_WARPS, level=level))
        found.append(_draw_case(model, "collect", draw.collect_kernel, sampling.NUM_WARPS))
        found.append(_draw_case(model, "finish", draw.finish_kernel, sampling.FINISH_WARPS))
    found.append(_draw_case("qwen3-1.7b", "finish", draw.finish_kernel, sampling.FINISH_WARPS, dtype="bf16"))
    counting = {"counts": "*i32", "token_ids": "*i64", "lanes_active": "*i32", "counts_stride": "i32"}
    found.append(
        HopperCase(
            name="sampling-count",
            kernel=sampling._count_kernel,
            signature=counting | {"num_lanes": "i32", "vocab_size": "i32"},
            constexprs={"width": 64},
        )
    )
    return found + _copy_cases() + _checksum_cases()


def _copy_cases() -> list[HopperCase]:
    """Blocks of 16 tokens, 8 KV heads of 128 (and 3 of 64) in bfloat16, counted in words of 8 bytes."""
    shapes = {"llama-3.1-8b": (32, 8192), "qwen3-1.7b": (28, 8192), "smollm2-135m": (30, 1536)}
    numbers = dict.fromkeys(("first_layer", "num_layers", "num_blocks"), "i32")
    return [
        HopperCase(
            name=f"blocks-{'gather' if gathers else 'scatter'}-{model}",
            kernel=blocks._copy_kernel,
            signature=numbers | {"cache": "*i64", "slab": "*i64", "block_ids": "*i64"},
            constexprs={
                "block": num_layers * layer,
                "layer": layer,
                "tile": blocks.TILE_BYTES // 8,
                "gathers": gathers,
            },
        )
        for model, (num_layers, layer) in shapes.items()
        for gathers in (True, False)
    ]


def _checksum_cases() -> list[HopperCase]:
    tile = HopperCase(
        name="checksum-tile",
        kernel=checksum._tile_kernel,
        signature={"words": "*i64", "sums": "*i64", "num_words": "i32"},
        constexprs={"tile": checksum.TILE_WORDS},
    )
    finish = HopperCase(
        name="checksum-finish",
        kernel=checksum._finish_kernel,
        signature={"octets": "*u8", "sums": "*i64", "out": "*i64", "num_sums": "i32", "num_bytes": "i32"},
        constexprs={"width": checksum.SUMS_AT_ONCE},
    )
    return [tile, finish]
