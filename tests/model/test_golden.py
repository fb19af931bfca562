"""The real model against the golden file: greedy tokens and logits of transformers in float32.

The end-to-end tests ask for all prompts over HTTP; here the decoder alone answers the short ones.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.decoder import Decoder
from model.loader import LoadOptions, load_model
from model.source import resolve
from tests.golden.export_safetensors import export_safetensors
from tests.kernels.native_cases import kernels_for
from tests.model.plain import batch_of, floats, load_torch, new_cache

pytestmark = pytest.mark.model

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "smollm2.json").read_text())
PROMPTS: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in GOLDEN["prompts"]}
BLOCK = 16
# Two float32 implementations that sum in another order; the golden gaps are at least 20 times wider.
LOGIT_TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["native", "torch"])
def decoder(request: pytest.FixtureRequest, cache_dir: Path) -> Decoder:
    """Load the real model in float32, for either kind of kernels."""
    if request.param == "native":
        kernels_for()
    return load_model(resolve("smollm2", cache_dir, print), LoadOptions(dtype="float32", kernels=request.param))


@dataclass(frozen=True, slots=True)
class Answer:
    """Greedy tokens and the logits that they came from, `[steps, vocab]`."""

    tokens: list[int]
    logits: Tensor


def greedy(decoder: Decoder, prompt: list[int], num_steps: int) -> Answer:
    """Continue a prompt through the paged decoder: one prefill, then one decode step per token."""
    kv_cache, tables = new_cache(decoder, 1, len(prompt) + num_steps, BLOCK)
    logits = [decoder.forward(batch_of([(prompt, 0)], tables, BLOCK), kv_cache)[0]]
    tokens = [int(logits[0].argmax())]
    for place in range(len(prompt), len(prompt) + num_steps - 1):
        step = batch_of([([tokens[-1]], place)], tables, BLOCK, decode=True)
        logits.append(decoder.forward(step, kv_cache)[0])
        tokens.append(int(logits[-1].argmax()))
    return Answer(tokens, torch.stack(logits))


def logit_error(answer: Answer, entry: dict[str, Any]) -> float:
    """Find the largest difference to the golden top logits of the first steps."""
    worst = 0.0
    for found, best in zip(answer.logits, entry["top_logits"], strict=False):
        worst = max(worst, float((found[best["ids"]] - torch.tensor(best["values"])).abs().max()))
    return worst


def test_the_golden_file_holds_what_it_promises() -> None:
    lengths = [len(entry["prompt"]) for entry in PROMPTS.values()]
    assert (len(PROMPTS), min(lengths), max(lengths)) == (24, 5, 3000)
    assert sum(2048 < length < 3000 for length in lengths) >= 1
    assert all(len(entry["tokens"]) == 64 and entry["min_gap"] > 2e-3 for entry in PROMPTS.values())
    first, second = (PROMPTS[f"shared prefix, {which}"]["prompt"] for which in ("first", "second"))
    assert first[:600] == second[:600]
    assert first != second
    assert sum("top_logits" in entry for entry in PROMPTS.values()) == 3


@pytest.mark.parametrize("name", ["five tokens", "mixed languages"])
def test_greedy_tokens_are_the_golden_ones(name: str, decoder: Decoder) -> None:
    entry = PROMPTS[name]
    assert greedy(decoder, entry["prompt"], 64).tokens == entry["tokens"]


@pytest.mark.parametrize("name", ["five tokens", "profile 513"])
def test_logits_agree_with_the_golden_ones(name: str, decoder: Decoder) -> None:
    entry = PROMPTS[name]
    answer = greedy(decoder, entry["prompt"], len(entry["top_logits"]))
    assert logit_error(answer, entry) < LOGIT_TOLERANCE


def test_a_safetensors_copy_holds_the_same_weights(cache_dir: Path, tmp_path: Path) -> None:
    files = resolve("smollm2", cache_dir, print)
    decoder = load_torch(files)
    copy = load_torch(resolve(str(export_safetensors(files.path, tmp_path)), tmp_path, print))
    assert copy.config.eos_token_ids == decoder.config.eos_token_ids
    assert copy.config.rms_eps == pytest.approx(decoder.config.rms_eps, rel=1e-6)
    assert torch.equal(copy.weights.embedding, decoder.weights.embedding)
    for ours, theirs in zip(copy.weights.layers, decoder.weights.layers, strict=True):
        assert torch.equal(floats(ours.qkv), floats(theirs.qkv))
        assert torch.equal(floats(ours.gate_up), floats(theirs.gate_up))
        assert torch.equal(floats(ours.down), floats(theirs.down))
