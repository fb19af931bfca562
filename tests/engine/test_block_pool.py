"""Books of the block pool."""

from __future__ import annotations

import random

import pytest

from engine.block_pool import BlockPool
from protocol.errors import OutOfBlocks


def test_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(4)
    held = pool.allocate(3)
    with pytest.raises(OutOfBlocks, match="2 blocks wanted, 1 of 4"):
        pool.allocate(2)
    assert pool.counts() == (1, 0, 3, 4)
    pool.release(held)
    pool.check(num_expected_leased=0)


def test_named_blocks_stay_findable_until_evicted_from_the_far_end() -> None:
    pool = BlockPool(3)
    names = [b"a", b"b", b"c"]
    held = pool.allocate(3)
    for block_id, name in zip(held, names, strict=True):
        pool.name(block_id, name)
    pool.release(held)
    assert pool.counts() == (0, 3, 0, 3)
    assert pool.match(names) == held
    pool.allocate(1)
    assert pool.match(names) == held[:2]


def test_a_shared_prefix_leaves_with_its_last_holder() -> None:
    pool = BlockPool(4)
    first = pool.allocate(2)
    pool.name(first[0], b"a")
    again = pool.match([b"a", b"b"])
    pool.acquire(again)
    pool.release(first)
    assert pool.counts() == (3, 0, 1, 4)
    pool.release(again)
    assert pool.counts() == (3, 1, 0, 4)


def test_using_a_prefix_keeps_it_from_being_evicted_first() -> None:
    pool = BlockPool(2)
    a, b = pool.allocate(1), pool.allocate(1)
    pool.name(a[0], b"a")
    pool.name(b[0], b"b")
    pool.release(a)
    pool.release(b)
    pool.acquire(pool.match([b"a"]))
    pool.release(a)
    assert pool.allocate(1) == b
    assert pool.match([b"a"]) == a and pool.match([b"b"]) == []


def test_the_same_content_computed_twice_is_indexed_once() -> None:
    pool = BlockPool(2)
    a, b = pool.allocate(1), pool.allocate(1)
    pool.name(a[0], b"x")
    pool.name(b[0], b"x")
    pool.release(b)
    assert pool.counts() == (1, 0, 1, 2)
    assert pool.match([b"x"]) == a


def test_releasing_twice_is_our_own_bug_and_says_so() -> None:
    pool = BlockPool(1)
    held = pool.allocate(1)
    pool.release(held)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(held)


@pytest.mark.parametrize("seed", range(5))
def test_books_balance_under_random_use(seed: int) -> None:
    rng, pool = random.Random(seed), BlockPool(32)
    held: list[list[int]] = []
    for _ in range(800):
        action = rng.random()
        if action < 0.5:
            names = [bytes([i]) for i in range(rng.randint(0, 6))]
            cached = pool.match(names)
            pool.acquire(cached)
            try:
                blocks = cached + pool.allocate(rng.randint(0, 8))
            except OutOfBlocks:
                pool.release(cached)
                continue
            for block_id, name in zip(blocks, names, strict=False):
                pool.name(block_id, name)
            held.append(blocks)
        elif held:
            pool.release(held.pop(rng.randrange(len(held))))
        counts = pool.counts()
        assert counts.free + counts.cached + counts.leased == counts.total
        pool.check(num_expected_leased=len({b for blocks in held for b in blocks}))
