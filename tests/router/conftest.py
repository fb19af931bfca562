"""Fixtures shared by the router's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from model.source import resolve
from router.tokenizer import Tokenizer
from tests.router.tiny import small_tokenizer
from tests.router.workers import Stage, staged


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer with 256 bytes and a few words."""
    return small_tokenizer(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def smollm2(cache_dir: Path) -> Tokenizer:
    """The tokenizer of the real model."""
    return Tokenizer(resolve("smollm2", cache_dir, print).path)


@pytest_asyncio.fixture
async def stage(tokenizer: Tokenizer) -> AsyncIterator[Stage]:
    """A router without workers."""
    async with staged(tokenizer) as stage:
        yield stage
