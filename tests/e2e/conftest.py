"""Servers shared by the end-to-end tests: one disaggregated, one colocated, each started once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model.source import resolve
from tests.e2e.server import Server, serving

GOLDEN = Path(__file__).parent.parent / "golden" / "smollm2.json"


@pytest.fixture(scope="session")
def gguf(cache_dir: Path) -> Path:
    """Return the path of the real model's file, fetched on first use."""
    return resolve("smollm2", cache_dir, print).path


@pytest.fixture(scope="session")
def disaggregated(gguf: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A router, a prefill worker and a decode worker with SmolLM2."""
    with serving("smollm2", tmp_path_factory.mktemp("disaggregated"), cache_dir) as server:
        yield server


@pytest.fixture(scope="session")
def colocated(gguf: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A router and one worker that runs both roles, with SmolLM2."""
    with serving("smollm2", tmp_path_factory.mktemp("colocated"), cache_dir, "--mode", "colocated") as server:
        yield server


@pytest.fixture(scope="session")
def minilm(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A router and two workers that embed."""
    with serving("minilm", tmp_path_factory.mktemp("minilm"), cache_dir, "--prefill", "2") as server:
        yield server


@pytest.fixture(scope="session")
def golden() -> list[dict[str, Any]]:
    """Prompts with their greedy continuation by transformers in float32."""
    prompts: list[dict[str, Any]] = json.loads(GOLDEN.read_text())["prompts"]
    return prompts
