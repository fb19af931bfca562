"""The kernels that the model calls: the native CPU path where it is built and fits, the torch reference elsewhere.

The choice is made once per process, at the first call. `describe_backend` says which it was and why.
Signatures, shapes and dtypes are those of `kernels.reference`.
"""

from functools import cache

from torch import Tensor

from kernels.cpu import native
from kernels.reference import (
    gather_blocks,
    paged_prefill_attention,
    rms_norm,
    rope,
    scatter_blocks,
    silu_mul,
    store_kv,
)
from kernels.reference import paged_decode_attention as _reference_decode_attention

__all__ = [
    "describe_backend",
    "gather_blocks",
    "paged_decode_attention",
    "paged_prefill_attention",
    "rms_norm",
    "rope",
    "scatter_blocks",
    "silu_mul",
    "store_kv",
]


@cache
def _native() -> native.NativeKernels | str:
    try:
        return native.load()
    except native.NativeUnavailableError as error:
        return str(error)


def describe_backend() -> str:
    """Say in one line which kernels run and why."""
    found = _native()
    if isinstance(found, str):
        return f"kernels: torch reference everywhere ({found})"
    return f"kernels: native decode attention ({found.instruction_set}) for float32 on CPU, torch reference elsewhere"


def paged_decode_attention(q: Tensor, kv_layer: Tensor, block_tables: Tensor, seq_lens: Tensor, scale: float) -> Tensor:
    """Attend one query per sequence to its whole cached context; see `kernels.reference.paged_decode_attention`."""
    found = _native()
    if not isinstance(found, str) and native.accepts(q, kv_layer):
        return found.paged_decode_attention(q, kv_layer, block_tables, seq_lens, scale)
    return _reference_decode_attention(q, kv_layer, block_tables, seq_lens, scale)
