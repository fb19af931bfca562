"""Load the native CPU library with ctypes (which releases the interpreter lock during a call) and wrap its kernels.

Each kernel takes and returns what its namesake in `kernels.reference` does, for float32 tensors on the CPU. A row's
result is bitwise the same whatever else is in the call, on any number of threads, and with AVX2 or AVX-512.
"""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from kernels.cpu import abi
from kernels.cpu.matrix import PackedMatrix

KV_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class NativeUnavailableError(Exception):
    """The native library is missing or cannot be used here; the message says why in a few words."""


@dataclass(frozen=True, slots=True)
class NativeLibrary:
    """The loaded library and the best instruction set of it that this processor has (avx512, avx2, portable)."""

    functions: ctypes.CDLL
    instruction_set: str


def find_library() -> Path | None:
    """Find the library that the package's installation built beside this file."""
    folder = Path(__file__).parent
    candidates = (folder / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def load(path: Path | None = None) -> NativeLibrary:
    """Load the library (`path`, or the one built at installation); raises NativeUnavailableError."""
    path = path or find_library()
    if path is None:
        raise NativeUnavailableError("the native library was not built at installation")
    try:
        functions = ctypes.CDLL(str(path))
        version = int(functions.baton_abi_version())
        if version != abi.ABI_VERSION:
            raise NativeUnavailableError(
                f"the native library is of another version ({version}, wanted {abi.ABI_VERSION}): install again"
            )
        abi.declare(functions)
    except (OSError, AttributeError) as error:
        raise NativeUnavailableError(f"the native library does not load ({error})") from error
    return NativeLibrary(functions, functions.baton_instruction_set().decode())


def check(code: int) -> None:
    """Raise for a code that the library returned: MemoryError, or ValueError for what it was given."""
    if code == 5:
        raise MemoryError(abi.ERRORS[5])
    if code:
        raise ValueError(abi.ERRORS.get(code, f"the native library failed with code {code}"))


class NativeKernels:
    """Threads and working memory of one caller; calls must not overlap. Freed with the object.

    Args:
        library: as `load` gave it.
        num_threads: threads of each call, this one included.
        instruction_set: None for the best; tests name another. Raises NativeUnavailableError where it cannot run here.
    """

    def __init__(self, library: NativeLibrary, num_threads: int = 1, instruction_set: str | None = None) -> None:
        self.library = library
        self.instruction_set = instruction_set or library.instruction_set
        functions = library.functions
        self.handle = functions.baton_open(self.instruction_set.encode(), num_threads)
        if not self.handle:
            raise NativeUnavailableError(f"this processor has no {self.instruction_set}")
        self._close = weakref.finalize(self, functions.baton_close, self.handle)

    def linear(self, x: Tensor, matrix: PackedMatrix) -> Tensor:
        """Multiply rows x `[T, cols]` with a packed matrix; see `kernels.quantized.quantized_linear`, or `x @ w.T`."""
        x = _floats(x)
        out = torch.empty(x.shape[0], matrix.rows)
        code = self.library.functions.baton_linear(
            self.handle, ctypes.byref(matrix.struct()), x.data_ptr(), x.shape[0], out.data_ptr()
        )
        check(code)
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Do what `kernels.reference.rms_norm` does; the last dimension is a multiple of 16."""
        x, weight, out = _floats(x), _floats(weight), torch.empty_like(x)
        rows, cols = x.numel() // x.shape[-1], x.shape[-1]
        self.library.functions.baton_rms_norm(
            self.handle, x.data_ptr(), weight.data_ptr(), eps, rows, cols, out.data_ptr()
        )
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """Do what `kernels.reference.silu_mul` does; half the last dimension is a multiple of 16."""
        gate_up = _floats(gate_up)
        cols = gate_up.shape[-1] // 2
        out = torch.empty(*gate_up.shape[:-1], cols)
        rows = gate_up.numel() // gate_up.shape[-1]
        self.library.functions.baton_silu_mul(self.handle, gate_up.data_ptr(), rows, cols, out.data_ptr())
        return out

    def rope(
        self, q: Tensor, k: Tensor, positions: Tensor, cos_table: Tensor, sin_table: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Do what `kernels.reference.rope` does."""
        cos, sin, positions = _floats(cos_table), _floats(sin_table), positions.to(torch.int64).contiguous()
        if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < cos.shape[0]:
            raise ValueError(abi.ERRORS[4])
        rotated = []
        for x in (q, k):
            out = _floats(x).clone()
            rows, heads, dims = out.shape
            self.library.functions.baton_rope(
                self.handle, out.data_ptr(), positions.data_ptr(), cos.data_ptr(), sin.data_ptr(), rows, heads, dims
            )
            rotated.append(out)
        return rotated[0], rotated[1]

    def store_kv(self, k: Tensor, v: Tensor, kv_layer: Tensor, slot_mapping: Tensor) -> None:
        """Do what `kernels.reference.store_kv` does."""
        k, v, slots = _floats(k), _floats(v), slot_mapping.to(torch.int64).contiguous()
        cache = kv_struct(kv_layer.unsqueeze(1))
        if slots.numel() and int(slots.max()) >= cache.num_blocks * cache.block_size:
            raise ValueError(abi.ERRORS[1])
        self.library.functions.baton_store_kv(
            self.handle, k.data_ptr(), v.data_ptr(), ctypes.byref(cache), slots.data_ptr(), k.shape[0]
        )

    def paged_decode_attention(
        self, q: Tensor, kv_layer: Tensor, block_tables: Tensor, seq_lens: Tensor, scale: float
    ) -> Tensor:
        """Do what `kernels.reference.paged_decode_attention` does, for sequences of at least one token."""
        query_start = torch.arange(q.shape[0] + 1, dtype=torch.int32)
        return self.paged_prefill_attention(q, kv_layer, block_tables, query_start, seq_lens, scale)

    def paged_prefill_attention(
        self,
        q: Tensor,
        kv_layer: Tensor,
        block_tables: Tensor,
        query_start: Tensor,
        seq_lens: Tensor,
        scale: float,
    ) -> Tensor:
        """Do what `kernels.reference.paged_prefill_attention` does; the KV may be float32, float16 or bfloat16.

        head_dim is a multiple of 16. Raises ValueError for a block id or a length that does not fit the cache.
        """
        q, block_tables = _floats(q), _int32(block_tables)
        query_start, seq_lens = _int32(query_start), _int32(seq_lens)
        out = torch.empty_like(q)
        cache = kv_struct(kv_layer.unsqueeze(1))
        arguments = abi.Attention(
            *(t.data_ptr() for t in (q, out, query_start, seq_lens, block_tables, kv_layer)),
            *(seq_lens.shape[0], q.shape[1], cache.num_kv_heads, q.shape[2], cache.block_size),
            *(block_tables.shape[1], cache.num_blocks, cache.block_stride, q.shape[1] * q.shape[2]),
            scale,
            cache.type,
        )
        check(self.library.functions.baton_attention(self.handle, ctypes.byref(arguments)))
        return out


def kv_struct(kv_cache: Tensor) -> abi.KvCache:
    """Describe a KV cache `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]` for a call.

    A layer of a block must be contiguous; float32, float16 or bfloat16 on the CPU. Valid while the tensor lives.
    """
    num_blocks, num_layers, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    assert kv_cache.device.type == "cpu" and (not num_blocks or kv_cache[0, 0].is_contiguous())
    assert head_dim % 16 == 0, head_dim
    sizes = (num_blocks, num_layers, num_kv_heads, block_size, head_dim, kv_cache.stride(0), kv_cache.stride(1))
    return abi.KvCache(kv_cache.data_ptr(), *sizes, KV_TYPES[kv_cache.dtype], 0)


def _floats(x: Tensor) -> Tensor:
    assert x.device.type == "cpu" and x.dtype == torch.float32
    return x.contiguous()


def _int32(x: Tensor) -> Tensor:
    return x.to(torch.int32).contiguous()
