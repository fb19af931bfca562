"""Weights from a GGUF file, dequantised to float32 on the way in.

GGUF names tensors in its own way, and for the architecture `llama` stores the rows of q and k permuted for interleaved
rotary embedding; both are undone here, so that the decoder sees one layout.
"""

import re

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import QuantError, dequantize
from torch import Tensor

from model.config import ModelConfig
from model.errors import WeightError
from model.gguf_file import GgufFile, GgufTensor
from model.weights import ROPE_FACTORS

_TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    ROPE_FACTORS: "rope_freqs.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


class GgufWeights:
    """Tensors by canonical name out of one GGUF file, as float32."""

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        self._file = file
        self._asked: set[str] = set()
        permuted = file.metadata.get("general.architecture") == "llama"
        self._permuted_heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if permuted else {}

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Give one tensor, dequantised to float32 in the canonical row order; raises WeightError."""
        stored_name = gguf_name(name)
        info = self._file.tensors.get(stored_name)
        where = self._file.path.name
        if info is None:
            raise WeightError(f"{where}: tensor {stored_name!r} is missing; expected shape {shape}")
        if info.shape != shape:
            raise WeightError(f"{where}: tensor {stored_name!r} has shape {info.shape}, expected {shape}")
        self._asked.add(stored_name)
        values = self._dequantized(info)
        num_heads = self._permuted_heads.get(stored_name.split(".")[-2])
        if num_heads is not None:
            values = _unpermute(values, num_heads)
        # Copies only what is still a view: unquantised tensors of the file's read-only map, and permuted rows.
        return torch.from_numpy(np.require(values, np.float32, ("C", "W")))

    def unused(self) -> list[str]:
        """Name the tensors that nobody asked for."""
        return [name for name in self._file.tensors if name not in self._asked]

    def _dequantized(self, info: GgufTensor) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
        where = f"{self._file.path.name}: tensor {info.name!r}"
        try:
            kind = GGMLQuantizationType(info.ggml_type)
            block_elements, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise WeightError(f"{where} has the unknown ggml type {info.ggml_type}") from error
        if info.shape[-1] % block_elements:
            raise WeightError(f"{where}: rows of {info.shape[-1]} do not divide into {kind.name} blocks")
        row_bytes = info.shape[-1] // block_elements * block_bytes
        num_bytes = int(np.prod(info.shape[:-1], dtype=np.int64)) * row_bytes
        if info.offset + num_bytes > len(self._file.data):
            raise WeightError(f"{where} ends past the end of the file: the file is cut off")
        raw = np.frombuffer(self._file.data, np.uint8, num_bytes, info.offset).reshape(*info.shape[:-1], row_bytes)
        try:
            values: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = dequantize(raw, kind)
        except (NotImplementedError, QuantError) as error:
            raise WeightError(f"{where} is of type {kind.name}, which the gguf package cannot dequantise") from error
        return values


def gguf_name(name: str) -> str:
    """Translate a canonical tensor name to GGUF's."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = _LAYER_NAME.fullmatch(name)
    assert match is not None, name
    return f"blk.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def _unpermute(
    rows: "np.ndarray[tuple[int, ...], np.dtype[np.float32]]", num_heads: int
) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    # Stored per head as (pair, half); rotate-half wants (half, pair).
    paired = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, *rows.shape[1:])
    return paired.swapaxes(1, 2).reshape(rows.shape)
