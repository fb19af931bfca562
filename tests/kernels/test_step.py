"""The native step: a token's result depends on its own sequence alone, bit by bit. Fail-over leans on it."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.native_cases import BLOCK, TinySize, kernels_for, step_input, tiny_cache, tiny_step

FORMATS = ("f32", "q8_0", "q4_0", "q4_1")
KINDS = [*((name, torch.float32) for name in FORMATS), ("q4_1", torch.float16), ("f32", torch.bfloat16)]
NUM_TOKENS = 45
SIZE = TinySize()
TOKENS = [[(7 * seq + 13 * place + place * place) % SIZE.vocab for place in range(NUM_TOKENS)] for seq in range(5)]


def tables_for(num_sequences: int, seed: int = 0) -> Tensor:
    """Shuffle the blocks of a pool among sequences of NUM_TOKENS tokens."""
    each = -(-NUM_TOKENS // BLOCK)
    order = torch.randperm(num_sequences * each, generator=torch.Generator().manual_seed(seed))
    return order.view(num_sequences, each)


@cache
def alone(format_name: str, dtype: torch.dtype, seq: int, instruction_set: str | None = None) -> Tensor:
    """Compute a sequence alone, a token at a time, as decode does; return its logits `[tokens, vocab]`."""
    step = tiny_step(SIZE, format_name, kernels_for(instruction_set))
    kv_cache, tables = tiny_cache(SIZE, 3, dtype), tables_for(1)
    rows = [step.forward(step_input([(place, [t])], tables), kv_cache)[0] for place, t in enumerate(TOKENS[seq])]
    return torch.stack(rows)


@pytest.mark.parametrize(("format_name", "dtype"), KINDS)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_a_token_is_bitwise_the_same_in_any_batch_and_phase(
    format_name: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Sequences advance by random chunks, several at once, on random threads; each token as if computed alone."""
    num_threads = data.draw(st.sampled_from([1, 2, 3]))
    step = tiny_step(SIZE, format_name, kernels_for(num_threads=num_threads))
    num_sequences = data.draw(st.integers(1, 4))
    kv_cache = tiny_cache(SIZE, 3 * num_sequences, dtype)
    tables = tables_for(num_sequences, data.draw(st.integers(0, 9)))
    done = dict.fromkeys(range(num_sequences), 0)
    while left := [seq for seq in done if done[seq] < NUM_TOKENS]:
        chosen = data.draw(st.lists(st.sampled_from(left), min_size=1, unique=True))
        pieces = []
        for seq in chosen:
            size = data.draw(st.sampled_from([1, 1, 2, 7, 16, 33]))
            pieces.append((done[seq], TOKENS[seq][done[seq] : done[seq] + size]))
        found = step.forward(step_input(pieces, tables[chosen], all_rows=True), kv_cache)
        row = 0
        for seq, (start, tokens) in zip(chosen, pieces, strict=True):
            assert torch.equal(
                found[row : row + len(tokens)], alone(format_name, dtype, seq)[start : start + len(tokens)]
            )
            row += len(tokens)
            done[seq] = start + len(tokens)


@pytest.mark.parametrize("format_name", FORMATS)
def test_avx2_and_avx512_give_the_same_bits(format_name: str) -> None:
    kernels_for("avx512")
    assert torch.equal(*(alone(format_name, torch.float16, 0, name) for name in ("avx2", "avx512")))


def test_the_portable_step_differs_by_rounding_only() -> None:
    portable, best = alone("f32", torch.float32, 0, "portable"), alone("f32", torch.float32, 0)
    torch.testing.assert_close(portable, best, rtol=1e-4, atol=1e-4)


def test_a_batch_that_does_not_fit_writes_nothing() -> None:
    step, tables = tiny_step(SIZE, "q8_0", kernels_for()), tables_for(1)
    kv_cache = tiny_cache(SIZE, 3)
    good = step_input([(0, [1, 2, 3])], tables)
    wrong = {
        "vocabulary": {"token_ids": torch.tensor([1, SIZE.vocab, 2])},
        "rotary tables": {"positions": torch.tensor([0, 1, 256])},
        "outside the KV cache": {"slot_mapping": torch.tensor([0, 1, 3 * BLOCK])},
        "longer than its block table": {"seq_lens": torch.tensor([3 * BLOCK + 1], dtype=torch.int32)},
    }
    for message, change in wrong.items():
        fields = {name: getattr(good, name) for name in good.__slots__} | change
        with pytest.raises(ValueError, match=message):
            step.forward(type(good)(**fields), kv_cache)
    assert kv_cache.count_nonzero() == 0
    assert step.forward(good, kv_cache).isfinite().all()


def test_on_layer_is_called_at_its_stops_when_the_layers_stand_in_the_cache() -> None:
    step, kv_cache, tables = tiny_step(SIZE, "q4_1", kernels_for()), tiny_cache(SIZE, 3), tables_for(1)
    seen: list[tuple[int, list[bool]]] = []

    def on_layer(layer: int) -> None:
        seen.append((layer, [bool(kv_cache[:, index].count_nonzero()) for index in range(SIZE.num_layers)]))

    step.forward(step_input([(0, TOKENS[0][:20])], tables), kv_cache, on_layer, (0, 2))
    assert seen == [(0, [True, False, False]), (2, [True, True, True])]
    step.forward(step_input([(20, TOKENS[0][20:21])], tables), kv_cache, on_layer)
    assert [layer for layer, _ in seen[2:]] == [0, 1, 2]


def test_an_exception_of_on_layer_comes_out_of_the_step() -> None:
    step, kv_cache, tables = tiny_step(SIZE, "f32", kernels_for()), tiny_cache(SIZE, 3), tables_for(1)

    def fail(layer: int) -> None:
        raise RuntimeError(f"no room for layer {layer}")

    with pytest.raises(RuntimeError, match="no room for layer 0"):
        step.forward(step_input([(0, [1, 2])], tables), kv_cache, fail)
