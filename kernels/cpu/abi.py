"""The C interface of the native library as ctypes sees it; mirrors `kernels/cpu/native/abi.h` field by field."""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

ABI_VERSION = 2
ON_LAYER = ctypes.CFUNCTYPE(None, c_int64)

ERRORS = {
    1: "a block table or slot names a block outside the KV cache",
    2: "a sequence is longer than its block table, or shorter than its queries",
    3: "a token id lies outside the vocabulary",
    4: "a position lies outside the rotary tables",
    5: "out of memory",
    6: "a matrix or KV cache of an unknown format",
}


class Matrix(ctypes.Structure):
    """A packed matrix."""

    _fields_ = [
        ("data", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("format", c_int32),
        ("unused", c_int32),
    ]


class Layer(ctypes.Structure):
    """Weights of one layer."""

    _fields_ = [
        *((name, c_void_p) for name in ("attention_norm", "qkv_bias", "q_norm", "k_norm", "mlp_norm")),
        *((name, Matrix) for name in ("qkv", "attention_out", "gate_up", "down")),
    ]


_DIMS = ("num_layers", "hidden", "intermediate", "num_heads", "num_kv_heads", "head_dim", "vocab", "num_positions")


class Model(ctypes.Structure):
    """Weights and sizes of a model."""

    _fields_ = [
        ("layers", ctypes.POINTER(Layer)),
        *((name, c_void_p) for name in ("final_norm", "cos", "sin")),
        ("embedding", Matrix),
        ("lm_head", Matrix),
        *((name, c_int64) for name in _DIMS),
        ("eps", c_float),
        ("scale", c_float),
    ]


_KV_SIZES = ("num_blocks", "num_layers", "num_kv_heads", "block_size", "head_dim", "block_stride", "layer_stride")


class KvCache(ctypes.Structure):
    """KV memory; strides in elements."""

    _fields_ = [
        ("data", c_void_p),
        *((name, c_int64) for name in _KV_SIZES),
        ("type", c_int32),
        ("unused", c_int32),
    ]


_BATCH_ARRAYS = ("token_ids", "positions", "slot_mapping", "query_start", "seq_lens", "block_tables", "logits_indices")


class Batch(ctypes.Structure):
    """One forward."""

    _fields_ = [
        *((name, c_void_p) for name in (*_BATCH_ARRAYS, "logits")),
        *((name, c_int64) for name in ("num_rows", "num_seqs", "max_blocks", "num_logits")),
        ("on_layer", ON_LAYER),
        ("stops", c_void_p),
    ]


_ATTENTION_SIZES = (
    *("num_seqs", "num_heads", "num_kv_heads", "head_dim", "block_size", "max_blocks"),
    *("num_blocks", "block_stride", "q_stride"),
)


class Attention(ctypes.Structure):
    """Causal attention of query chunks over one layer of KV memory."""

    _fields_ = [
        *((name, c_void_p) for name in ("q", "out", "query_start", "seq_lens", "block_tables", "kv")),
        *((name, c_int64) for name in _ATTENTION_SIZES),
        ("scale", c_float),
        ("kv_type", c_int32),
    ]


def declare(library: ctypes.CDLL) -> None:
    """Set argument and result types of every function; raises AttributeError where one is missing."""
    p, i, n, f = c_void_p, c_int32, c_int64, c_float
    signatures: dict[str, tuple[object, list[object]]] = {
        "instruction_set": (ctypes.c_char_p, []),
        "open": (p, [ctypes.c_char_p, i]),
        "close": (None, [p]),
        "forward": (i, [p, p, p, p]),
        "linear": (i, [p, p, p, n, p]),
        "attention": (i, [p, p]),
        "rms_norm": (None, [p, p, p, f, n, n, p]),
        "silu_mul": (None, [p, p, n, n, p]),
        "rope": (None, [p, p, p, p, p, n, n, n]),
        "store_kv": (None, [p, p, p, p, p, n]),
        "packed_bytes": (n, [i, n, n]),
        "pack_blocks": (i, [i, p, p, n, n, n, p]),
        "pack_floats": (i, [i, p, p, n, n, n, p]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"baton_{name}")
        function.restype, function.argtypes = result, arguments
