"""Admission: places are held while texts are tokenised, and long texts wait for a thread in a bounded number."""

from __future__ import annotations

import asyncio
import threading

import pytest

from protocol.errors import NotReady, Overloaded
from router.config import RouterConfig
from router.core import LONG_TEXT_BYTES, Core
from router.metrics import Metrics
from router.switchboard import Switchboard
from router.tokenizer import Tokenizer


class Ready(Switchboard):
    """A switchboard whose workers are there."""

    @property
    def max_model_len(self) -> int:
        return 100


def core_of(tokenizer: Tokenizer, max_num_requests: int = 3) -> Core:
    config = RouterConfig("", ("m",), b"s" * 16, max_num_requests=max_num_requests)
    return Core(config, tokenizer, Ready(config, tokenizer, Metrics("m"), lambda: 0.0))


async def test_requests_that_are_being_admitted_count_against_the_limit(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer, max_num_requests=2)
    with core.admission(), core.admission():
        with pytest.raises(Overloaded, match="the limit is 2"), core.admission():
            pass
    with core.admission():
        pass
    await core.close()


async def test_without_workers_nothing_is_admitted(tokenizer: Tokenizer) -> None:
    config = RouterConfig("", ("m",), b"s" * 16)
    core = Core(config, tokenizer, Switchboard(config, tokenizer, Metrics("m"), lambda: 0.0))
    with pytest.raises(NotReady), core.admission():
        pass
    await core.close()


async def test_long_texts_wait_for_a_thread_in_a_bounded_number_and_a_place_is_free_when_its_thread_is(
    tokenizer: Tokenizer,
) -> None:
    core, may_end = core_of(tokenizer, max_num_requests=3), threading.Event()
    waiting = [asyncio.create_task(core.off_loop(LONG_TEXT_BYTES + 1, may_end.wait)) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="wait to be tokenised"):
        await core.off_loop(LONG_TEXT_BYTES + 1, lambda: None)
    assert await core.off_loop(10, lambda: 7) == 7, "a short text needs no thread"
    waiting[0].cancel()
    may_end.set()
    done = await asyncio.gather(*waiting, return_exceptions=True)
    assert done[1:] == [True] * 2
    assert await core.off_loop(LONG_TEXT_BYTES + 1, lambda: 7) == 7
    await core.close()
