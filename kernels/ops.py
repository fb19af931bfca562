"""The kernels that the torch decoder calls. Signatures, shapes and dtypes are those of `kernels.reference`.

On a CPU the native step (`kernels/cpu`) takes the place of the whole decoder, not of single kernels.
"""

from kernels.reference import (
    gather_blocks,
    paged_decode_attention,
    paged_prefill_attention,
    rms_norm,
    rope,
    scatter_blocks,
    silu_mul,
    store_kv,
)

__all__ = [
    "gather_blocks",
    "paged_decode_attention",
    "paged_prefill_attention",
    "rms_norm",
    "rope",
    "scatter_blocks",
    "silu_mul",
    "store_kv",
]
