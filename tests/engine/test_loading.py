"""Loading, sizing and the KV region that transfers see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import EngineConfig, ServiceConfig
from engine.kv_cache import KVCache
from engine.loading import load, pin_process
from protocol.errors import ConfigError
from protocol.kv_layout import KVFingerprint
from tests.engine.tiny import tiny_model


def test_a_model_names_its_weights_in_the_fingerprint(tmp_path: Path) -> None:
    first, again = tiny_model(tmp_path), tiny_model(tmp_path)
    other = tiny_model(tmp_path, dummy_seed=1)
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint.model_hash != other.fingerprint.model_hash
    assert first.max_model_len == 512 and first.vocab_size == 256


def test_the_context_is_limited_by_the_pool(tmp_path: Path) -> None:
    assert tiny_model(tmp_path, num_kv_blocks=10).max_model_len == 80


def test_sizes_that_cannot_work_are_refused_by_name(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    config = EngineConfig(model=f"dummy:{tmp_path / 'config.json'}", device="cpu", block_size=8)
    for change, words in (
        ({"max_model_len": 1000}, "exceed the model's context of 512"),
        ({"max_model_len": 500, "num_kv_blocks": 10}, "do not fit the KV pool"),
        ({"kv_cache_gib": 1e-9}, "at least 2 are needed"),
        ({"model": f"dummy:{tmp_path / 'nothing'}"}, "nothing"),
        ({"model": "no such thing"}, "no such thing"),
    ):
        with pytest.raises(ConfigError, match=words):
            load(replace(config, **change), lambda line: None, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_asking_for_a_gpu_that_is_not_there_is_refused(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        load(EngineConfig(model=f"dummy:{tmp_path / 'config.json'}", device="cuda"), lambda line: None, tmp_path)


@pytest.mark.parametrize(
    "change", [{"dtype": "int3"}, {"device": "tpu"}, {"block_size": 5}, {"num_threads": 0}, {"num_kv_blocks": -1}]
)
def test_engine_configuration_checks_its_bounds(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        EngineConfig(model="m", **change)  # type: ignore[arg-type]


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(ConfigError, match="secret"):
        ServiceConfig("w", ("http://x",), b"short")


def test_pinning_to_a_core_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot run on cores"):
        pin_process((4095,))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gather_and_scatter_move_exactly_the_named_cells(dtype: str) -> None:
    f = KVFingerprint(model_hash="m", dtype=dtype, block_size=4, num_layers=3, num_kv_heads=2, head_dim=8)
    source, target = KVCache(f, 6, torch.device("cpu")), KVCache(f, 6, torch.device("cpu"))
    source.tensor.copy_(torch.randn(source.tensor.shape))
    slab = np.zeros(2 * 2 * f.layer_bytes, np.uint8)
    source.gather([4, 1], 1, 2, slab)
    target.scatter([0, 5], 1, 2, slab)
    assert torch.equal(target.tensor[0, 1:], source.tensor[4, 1:])
    assert torch.equal(target.tensor[5, 1:], source.tensor[1, 1:])
    assert not target.tensor[:, 0].any() and not target.tensor[1:5].any()
    assert source.tensor[0].numel() * source.tensor.element_size() == f.block_bytes
