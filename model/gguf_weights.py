"""Weights from a GGUF file: as they are stored, or dequantised to float32 on the way in.

GGUF names tensors in its own way, and for the architecture `llama` stores the rows of q and k permuted for interleaved
rotary embedding; both are undone here, so that the decoder sees one layout.
"""

import re

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import QuantError, dequantize
from numpy.typing import NDArray
from torch import Tensor

from kernels.quantized import BLOCK_BYTES, QuantizedRows
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
_FLOATS = ("F32", "F16", "BF16", "F64")
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
        info = self._take(name, shape)
        kind = self._kind(info)
        try:
            values: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = dequantize(self._raw(info, kind), kind)
        except (NotImplementedError, QuantError) as error:
            raise WeightError(f"{self._where(info)} is of type {kind.name}, which cannot be dequantised") from error
        order = self._order(info)
        # Copies only what is still a view: unquantised tensors of the file's read-only map, and permuted rows.
        return torch.from_numpy(np.require(values if order is None else values[order], np.float32, ("C", "W")))

    def quantized(self, name: str, shape: tuple[int, int]) -> QuantizedRows | None:
        """Give a matrix as it is stored, a view of the mapped file, or None where its type has no kernel of ours."""
        info = self._take(name, shape)
        kind = self._kind(info)
        if kind.name.lower() not in BLOCK_BYTES:
            return None
        return QuantizedRows(kind.name.lower(), self._raw(info, kind), self._order(info))

    def is_float(self, name: str) -> bool:
        """Tell whether a tensor is stored as floats; an absent one is not."""
        info = self._file.tensors.get(gguf_name(name))
        return info is not None and self._kind(info).name in _FLOATS

    def unused(self) -> list[str]:
        """Name the tensors that nobody asked for."""
        return [name for name in self._file.tensors if name not in self._asked]

    def _take(self, name: str, shape: tuple[int, ...]) -> GgufTensor:
        stored_name = gguf_name(name)
        info = self._file.tensors.get(stored_name)
        where = self._file.path.name
        if info is None:
            raise WeightError(f"{where}: tensor {stored_name!r} is missing; expected shape {shape}")
        if info.shape != shape:
            raise WeightError(f"{where}: tensor {stored_name!r} has shape {info.shape}, expected {shape}")
        self._asked.add(stored_name)
        return info

    def _where(self, info: GgufTensor) -> str:
        return f"{self._file.path.name}: tensor {info.name!r}"

    def _kind(self, info: GgufTensor) -> GGMLQuantizationType:
        try:
            return GGMLQuantizationType(info.ggml_type)
        except ValueError as error:
            raise WeightError(f"{self._where(info)} has the unknown ggml type {info.ggml_type}") from error

    def _raw(self, info: GgufTensor, kind: GGMLQuantizationType) -> NDArray[np.uint8]:
        block_elements, block_bytes = GGML_QUANT_SIZES[kind]
        if info.shape[-1] % block_elements:
            raise WeightError(f"{self._where(info)}: rows of {info.shape[-1]} do not divide into {kind.name} blocks")
        row_bytes = info.shape[-1] // block_elements * block_bytes
        num_bytes = int(np.prod(info.shape[:-1], dtype=np.int64)) * row_bytes
        if info.offset + num_bytes > len(self._file.data):
            raise WeightError(f"{self._where(info)} ends past the end of the file: the file is cut off")
        return np.frombuffer(self._file.data, np.uint8, num_bytes, info.offset).reshape(*info.shape[:-1], row_bytes)

    def _order(self, info: GgufTensor) -> NDArray[np.int64] | None:
        num_heads = self._permuted_heads.get(info.name.split(".")[-2])
        return None if num_heads is None else _unpermuted(info.shape[0], num_heads)


def gguf_name(name: str) -> str:
    """Translate a canonical tensor name to GGUF's."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = _LAYER_NAME.fullmatch(name)
    assert match is not None, name
    return f"blk.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def _unpermuted(num_rows: int, num_heads: int) -> NDArray[np.int64]:
    """Say which stored row stands at each place: stored per head as (pair, half), wanted as (half, pair)."""
    rows = np.arange(num_rows, dtype=np.int64)
    return np.ascontiguousarray(rows.reshape(num_heads, -1, 2).swapaxes(1, 2).reshape(-1))
