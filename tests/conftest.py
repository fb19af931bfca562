"""What all tests share: the cache that model files land in, and where Triton kernels run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # `@triton.jit` reads it when a kernel's module is imported, so it must stand before the first such import.
    os.environ["TRITON_INTERPRET"] = "1"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job passes interrupts over, and so would every process that a test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    """Return Baton's cache, the one a user's `baton serve` fills, so that the model is fetched once."""
    return Path(os.environ.get("BATON_CACHE") or Path.home() / ".cache" / "baton")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Return the device that Triton kernels take tensors of here: a GPU, or the CPU in Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
