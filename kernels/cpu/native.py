"""Load the native CPU kernels with ctypes (which releases the GIL during a call) and check what they are given."""

import ctypes
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

_ABI_VERSION = 1
_ERRORS = {1: "a block table names a block outside the KV cache", 2: "a sequence is longer than its block table"}


class NativeUnavailableError(Exception):
    """The native library is missing or cannot be used here; the message says why in a few words."""


@dataclass(frozen=True, slots=True)
class NativeKernels:
    """The loaded library and the instruction set it chose (`avx512`, `avx2` or `default`)."""

    library: ctypes.CDLL
    instruction_set: str

    def paged_decode_attention(
        self, q: Tensor, kv_layer: Tensor, block_tables: Tensor, seq_lens: Tensor, scale: float
    ) -> Tensor:
        """Do what `kernels.reference.paged_decode_attention` does, for CPU float32 tensors that `accepts` allows.

        A row's result is bitwise independent of the other rows. Single-threaded. Raises ValueError for a block id or
        a length that does not fit the cache.
        """
        q, block_tables, seq_lens = q.contiguous(), _int32(block_tables), _int32(seq_lens)
        num_rows, num_heads, head_dim = q.shape
        num_blocks, _, num_kv_heads, block_size, _ = kv_layer.shape
        out = torch.empty_like(q)
        code = self.library.baton_paged_decode_attention(
            q.data_ptr(),
            kv_layer.data_ptr(),
            block_tables.data_ptr(),
            seq_lens.data_ptr(),
            out.data_ptr(),
            num_rows,
            num_heads,
            num_kv_heads,
            head_dim,
            block_size,
            block_tables.shape[1],
            num_blocks,
            kv_layer.stride(0),
            scale,
        )
        if code:
            raise ValueError(_ERRORS.get(code, f"native attention failed with code {code}"))
        return out


def accepts(q: Tensor, kv_layer: Tensor) -> bool:
    """Say whether the native attention can take these tensors: CPU, float32, head_dim a multiple of 8, dense blocks."""
    return (
        q.device.type == "cpu"
        and q.dtype == kv_layer.dtype == torch.float32
        and q.shape[2] % 8 == 0
        and kv_layer[0].is_contiguous()
    )


def find_library() -> Path | None:
    """Find the library that the package's installation built beside this file."""
    folder = Path(__file__).parent
    candidates = (folder / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def load(path: Path | None = None) -> NativeKernels:
    """Load the library (`path`, or the one built at installation); raises NativeUnavailableError."""
    path = path or find_library()
    if path is None:
        raise NativeUnavailableError("the native library was not built at installation")
    try:
        library = ctypes.CDLL(str(path))
        version = int(library.baton_abi_version())
    except (OSError, AttributeError) as error:
        raise NativeUnavailableError(f"the native library does not load ({error})") from error
    if version != _ABI_VERSION:
        raise NativeUnavailableError(f"the native library is of another version ({version}, wanted {_ABI_VERSION})")
    library.baton_instruction_set.restype = ctypes.c_char_p
    library.baton_paged_decode_attention.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 8 + [ctypes.c_float]
    library.baton_paged_decode_attention.restype = ctypes.c_int32
    return NativeKernels(library, library.baton_instruction_set().decode())


def _int32(x: Tensor) -> Tensor:
    return x.to(torch.int32).contiguous()
