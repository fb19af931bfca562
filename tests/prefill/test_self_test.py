"""What a prefill worker says of its own pace, against runners whose pace is known."""

from __future__ import annotations

import time
from typing import Any

import pytest

from engine.batch import BatchItem
from engine.block_pool import BlockPool
from prefill.self_test import measure, measure_prompts


class Paced:
    """Takes so long for a token, and more for each token before it."""

    depth = 1

    def __init__(self, token_s: float, context_share: float = 0.0) -> None:
        self.token_s, self.context_share = token_s, context_share
        self.items: list[BatchItem] = []

    def launch(self, items: list[BatchItem], *_: Any) -> Paced:
        self.items += items
        for item in items:
            assert not item.wants_logits
            context = item.start + item.num_tokens / 2
            time.sleep(item.num_tokens * self.token_s * (1 + self.context_share * context))
        return self

    def results(self) -> list[Any]:
        return []


def test_pace_and_context_are_found_and_it_does_not_take_long() -> None:
    runner, begin_s = Paced(0.0005, 0.001), time.monotonic()
    found = measure_prompts(runner, BlockPool(250), 16, 4000, 256)  # type: ignore[arg-type]
    assert found.tokens_per_s == pytest.approx(2000, rel=0.3)
    assert found.context_share == pytest.approx(0.001, rel=0.4)
    assert time.monotonic() - begin_s < 0.6
    assert all(item.start + item.num_tokens <= 4000 for item in runner.items)


def test_what_is_slow_is_computed_once_only() -> None:
    runner = Paced(0.07)
    found = measure_prompts(runner, BlockPool(250), 16, 4000, 256)  # type: ignore[arg-type]
    assert len(runner.items) == 1 and found.context_share == 0.0
    assert found.tokens_per_s == pytest.approx(14, rel=0.1)


@pytest.mark.parametrize("max_tokens", [1, 15, 100])
def test_a_pool_may_be_small(max_tokens: int) -> None:
    runner = Paced(0.0002)
    found = measure_prompts(runner, BlockPool(250), 16, max_tokens, 256)  # type: ignore[arg-type]
    assert found.tokens_per_s > 1000 and found.context_share == 0.0
    assert all(item.start + item.num_tokens <= max_tokens for item in runner.items)


def test_only_blocks_that_nobody_has_are_written_and_all_go_back() -> None:
    pool = BlockPool(12)
    held = pool.allocate(9)
    runner = Paced(0.0002)
    found = measure_prompts(runner, pool, 16, 4000, 256)  # type: ignore[arg-type]
    assert found.tokens_per_s > 1000
    assert not {i for item in runner.items for i in item.sequence.block_ids} & set(held)
    assert all(item.start + item.num_tokens <= 3 * 16 for item in runner.items)
    pool.check(9)
    assert measure_prompts(runner, BlockPool(0), 16, 4000, 256).tokens_per_s == 0.0  # type: ignore[arg-type]


def test_the_fastest_pass_counts() -> None:
    took = iter([0.2, 0.09, 0.02, 0.09, 0.09, 0.09])
    pace, _ = measure(lambda _: time.sleep(next(took)), 16)
    assert pace == pytest.approx(16 / 0.02, rel=0.3)
