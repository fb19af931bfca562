"""Fixtures shared by all tests: the cache that model files land in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    """Return Baton's cache, the one a user's `baton serve` fills, so that the model is fetched once."""
    return Path(os.environ.get("BATON_CACHE") or Path.home() / ".cache" / "baton")
