"""The real model on the GPU: float32 gives the golden tokens, bfloat16 stays close to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.loading import LoadedModel, load
from protocol.errors import ConfigError
from protocol.request import SamplingParams
from tests.decode.pair import prompt_of
from tests.gpu.models import DevicePair

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "smollm2.json").read_text())
NUM_TOKENS = 64


def _load(cache_dir: Path, dtype: str, **options: Any) -> LoadedModel:
    given: dict[str, Any] = {"device": "cuda", "num_kv_blocks": 4000, "max_model_len": 4096} | options
    config = EngineConfig(model="smollm2", dtype=dtype, **given)
    try:
        return load(config, print, cache_dir)
    except ConfigError as error:
        pytest.skip(f"the model is not at hand: {error}")


def _answers(
    model: LoadedModel, *, together: bool, prefill_model: LoadedModel | None = None, num_prompts: int = 24
) -> list[list[int]]:
    pair = DevicePair(model, max_lanes=32, prefill_model=prefill_model)
    for number, entry in enumerate(GOLDEN["prompts"][:num_prompts]):
        sampling = SamplingParams(seed=0, temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        assert pair.place(number, entry["prompt"], sampling, [])
        if not together:
            pair.run()
    pair.run()
    return [pair.tokens[number] for number in range(num_prompts)]


@pytest.mark.model
def test_float32_gives_the_golden_tokens(cache_dir: Path) -> None:
    expected = [entry["tokens"][:NUM_TOKENS] for entry in GOLDEN["prompts"]]
    assert _answers(_load(cache_dir, "float32"), together=True) == expected


@pytest.mark.model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prompts_computed_on_a_cpu_are_decoded_on_the_gpu(cache_dir: Path, dtype: str) -> None:
    on_cpu = _load(cache_dir, dtype, device="cpu", kernels="torch", num_kv_blocks=400)
    answers = _answers(_load(cache_dir, dtype), together=True, prefill_model=on_cpu, num_prompts=12)
    expected = [entry["tokens"][:NUM_TOKENS] for entry in GOLDEN["prompts"][:12]]
    same = [ours == theirs for ours, theirs in zip(answers, expected, strict=True)]
    begins = [ours[0] == theirs[0] for ours, theirs in zip(answers, expected, strict=True)]
    assert all(same) if dtype == "float32" else sum(begins) >= 10


@pytest.mark.model
def test_bfloat16_gives_the_same_tokens_alone_and_together_and_begins_as_float32_does(cache_dir: Path) -> None:
    model = _load(cache_dir, "bfloat16")
    together = _answers(model, together=True)
    assert together == _answers(model, together=False)
    same = [ours[0] == entry["tokens"][0] for ours, entry in zip(together, GOLDEN["prompts"], strict=True)]
    assert sum(same) >= 20, "the first token differs only where float32 itself hesitates"


@pytest.mark.model
def test_fp8_weights_generate(cache_dir: Path) -> None:
    model = _load(cache_dir, "bfloat16", quantization="fp8")
    assert "fp8" in model.backend
    pair = DevicePair(model, max_lanes=4)
    assert pair.place(1, prompt_of(1, 50), SamplingParams(seed=0, temperature=0.0, max_tokens=16), [])
    pair.run()
    assert 1 < len(pair.tokens[1]) <= 16
