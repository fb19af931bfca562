"""The decoder against a plain implementation without cache, for every architecture; chunks, batches, hooks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
from torch import Tensor

from model.decoder import Decoder
from model.dummy_weights import DummyWeights
from model.loader import LoadOptions, load_model
from model.source import resolve
from tests.kernels.native_cases import kernels_for
from tests.model.plain import VARIANTS, all_tensors, batch_of, hf_config, new_cache, plain_logits

BLOCK = 8
TOKENS = [int(t) for t in torch.randint(0, 97, (75,), generator=torch.Generator().manual_seed(3))]


Load: TypeAlias = Callable[..., Decoder]


@pytest.fixture(params=["torch", "native"])
def load(request: pytest.FixtureRequest, tmp_path: Path) -> Load:
    """Load a tiny dummy model the way a worker does, from a config.json, for either kind of kernels."""
    if request.param == "native":
        kernels_for()

    def load_variant(variant: str, dtype: str = "float32") -> Decoder:
        (tmp_path / "config.json").write_text(json.dumps(hf_config(VARIANTS[variant])))
        kernels = request.param if dtype == "float32" else "torch"
        options = LoadOptions(dtype=dtype, dummy_seed=5, kernels=kernels)
        return load_model(resolve(f"dummy:{tmp_path}", tmp_path, print), options)

    return load_variant


def expected(variant: str, tokens: list[int]) -> Tensor:
    """Give the plain implementation's logits for the same dummy weights."""
    return plain_logits(VARIANTS[variant], all_tensors(VARIANTS[variant], DummyWeights(5)), tokens).float()


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_gives_the_logits_of_the_plain_implementation(variant: str, load: Load) -> None:
    decoder = load(variant)
    assert decoder.config == VARIANTS[variant]
    assert decoder.arithmetic == "float32"
    kv_cache, tables = new_cache(decoder, 1, 80, BLOCK)
    found = decoder.forward(batch_of([(TOKENS, 0)], tables, BLOCK, all_rows=True), kv_cache)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected(variant, TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_decode_steps_agree_with_prefill(variant: str, load: Load) -> None:
    decoder = load(variant)
    kv_cache, tables = new_cache(decoder, 1, 80, BLOCK)
    decoder.forward(batch_of([(TOKENS[:60], 0)], tables, BLOCK), kv_cache)
    wanted = expected(variant, TOKENS)
    for place in range(60, 75):
        step = batch_of([([TOKENS[place]], place)], tables, BLOCK, decode=True)
        found = decoder.forward(step, kv_cache)
        torch.testing.assert_close(found[0], wanted[place], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [(75,), (8, 67), (1, 30, 1, 43), (25, 25, 25)])
def test_a_prompt_in_chunks_gives_what_it_gives_in_one_shot(sizes: tuple[int, ...], load: Load) -> None:
    decoder = load("llama3.1")
    kv_cache, tables = new_cache(decoder, 1, 80, BLOCK)
    done, pieces = 0, []
    for size in sizes:
        chunk = batch_of([(TOKENS[done : done + size], done)], tables, BLOCK, all_rows=True)
        pieces.append(decoder.forward(chunk, kv_cache))
        done += size
    torch.testing.assert_close(torch.cat(pieces), expected("llama3.1", TOKENS), rtol=1e-4, atol=1e-4)


def test_sequences_of_one_ragged_batch_do_not_see_each_other(load: Load) -> None:
    decoder = load("qwen2")
    kv_cache, tables = new_cache(decoder, 3, 80, BLOCK)
    prompts = [TOKENS[:20], TOKENS[30:75], TOKENS[10:11]]
    decoder.forward(batch_of([(p[:7], 0) for p in prompts], tables, BLOCK), kv_cache)
    rest = [(p[7:], 7) for p in prompts[:2]] + [([TOKENS[11]], 1)]
    found = decoder.forward(batch_of(rest, tables, BLOCK), kv_cache)
    for row, tokens in enumerate([*prompts[:2], TOKENS[10:12]]):
        torch.testing.assert_close(found[row], expected("qwen2", tokens)[-1], rtol=1e-4, atol=1e-4)


def test_a_decode_batch_gives_each_row_its_own_logits(load: Load) -> None:
    decoder = load("smollm2")
    kv_cache, tables = new_cache(decoder, 4, 80, BLOCK)
    lengths = [1, 9, 40, 16]
    decoder.forward(batch_of([(TOKENS[:n], 0) for n in lengths], tables, BLOCK), kv_cache)
    step = batch_of([([TOKENS[n]], n) for n in lengths], tables, BLOCK, decode=True)
    found = decoder.forward(step, kv_cache)
    wanted = expected("smollm2", TOKENS)
    torch.testing.assert_close(found, wanted[torch.tensor(lengths)], rtol=1e-4, atol=1e-4)


def test_on_layer_is_called_when_the_layer_stands_in_the_cache(load: Load) -> None:
    decoder = load("llama")
    kv_cache, tables = new_cache(decoder, 1, 16, BLOCK)
    seen: list[tuple[int, Tensor]] = []
    batch = batch_of([(TOKENS[:16], 0)], tables, BLOCK)
    decoder.forward(batch, kv_cache, lambda layer: seen.append((layer, kv_cache.clone())))
    assert [layer for layer, _ in seen] == [0, 1, 2]
    for layer, snapshot in seen:
        used = tables[0].long()
        assert torch.equal(snapshot[used, : layer + 1], kv_cache[used, : layer + 1])
        assert snapshot[used, layer].count_nonzero() > 0
        assert snapshot[:, layer + 1 :].count_nonzero() == 0


def test_a_chunk_without_wanted_rows_fills_the_cache_and_gives_no_logits(load: Load) -> None:
    decoder = load("llama")
    kv_cache, tables = new_cache(decoder, 1, 16, BLOCK)
    batch = batch_of([(TOKENS[:16], 0)], tables, BLOCK)
    quiet = type(batch)(
        **{name: getattr(batch, name) for name in batch.__slots__ if name != "logits_indices"},
        logits_indices=torch.empty(0, dtype=torch.int64),
    )
    assert decoder.forward(quiet, kv_cache).shape == (0, 97)
    assert kv_cache[tables[0].long(), 2].count_nonzero() > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_stay_near_the_exact_logits(dtype: str, load: Load) -> None:
    decoder = load("llama", dtype)
    kv_cache, tables = new_cache(decoder, 1, 80, BLOCK)
    decoder.forward(batch_of([(TOKENS[:74], 0)], tables, BLOCK), kv_cache)
    found = decoder.forward(batch_of([(TOKENS[74:], 74)], tables, BLOCK, decode=True), kv_cache)
    assert found.dtype == torch.float32
    wanted = expected("llama", TOKENS)[-1]
    assert (found[0] - wanted).abs().max() < 0.1 * wanted.std()


def test_dummy_weights_are_the_same_for_a_seed_and_other_for_another() -> None:
    first, same, other = DummyWeights(1), DummyWeights(1), DummyWeights(2)
    same.tensor("something.else", (3,))
    assert torch.equal(first.tensor("a.weight", (4, 9)), same.tensor("a.weight", (4, 9)))
    assert not torch.equal(first.tensor("a.weight", (4, 9)), other.tensor("a.weight", (4, 9)))
    assert not torch.equal(first.tensor("a.weight", (4, 9)), first.tensor("b.weight", (4, 9)))
