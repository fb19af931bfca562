"""The small version of `python -m tests.clients.hostile`: what must not happen, without a clock."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import RequestRejected
from router.api import ChatRequest, CompletionRequest, parse
from router.intake import Intake
from router.response_request import ResponsesRequest
from tests.clients.answers import ODD, Odd
from tests.clients.bodies import CHAT, COMPLETIONS, MODEL, RESPONSES, corpus, damaged, large
from tests.clients.hostile import MAX_RSS_GROWTH_BYTES, POOL_BLOCKS, besiege
from tests.e2e.server import serving
from tests.router.tiny import small_tokenizer


@pytest.mark.e2e
@pytest.mark.model
async def test_hostile_bodies_are_refused_and_nobody_else_notices(cache_dir: Path, tmp_path: Path) -> None:
    with serving("smollm2", tmp_path, cache_dir, "--mode", "colocated", "--num-kv-blocks", str(POOL_BLOCKS)) as server:
        report = await besiege(server, number=300, seed=1)
    assert report.wrong == []
    assert report.num_refused >= 300 and report.num_streams > 0
    assert max(report.rss_growth_bytes.values()) < MAX_RSS_GROWTH_BYTES


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.name)
def test_an_answer_to_an_odd_request_may_be_wrong(odd: Odd) -> None:
    message: dict[str, Any] = {"content": "\u00e9", "tool_calls": []}
    told = {"text": "", "logprobs": {"tokens": [], "text_offset": []}}
    answer = {"choices": [{"message": message, "finish_reason": "error", "stop_reason": None, **told}]}
    try:
        is_right = odd.is_right(answer)
    except (ValueError, AssertionError):
        is_right = False
    assert not is_right


def test_damage_follows_from_its_seed() -> None:
    one, two = (list(map(damaged, [random.Random(3)] * 50)) for _ in range(2))
    assert one == two and len({sent.data for sent in one}) > 40
    assert len({sent.name for sent in corpus()}) > 90


def test_whatever_is_sent_is_taken_or_refused_and_nothing_else_is_raised(tmp_path: Path) -> None:
    intake = Intake(small_tokenizer(tmp_path), (MODEL,))
    kinds: dict[str, type[ChatRequest] | type[CompletionRequest] | type[ResponsesRequest]] = {
        CHAT: ChatRequest, COMPLETIONS: CompletionRequest, RESPONSES: ResponsesRequest
    }  # fmt: skip
    dice = random.Random(4)
    for sent in (*corpus(), *large()[:2], *(damaged(dice) for _ in range(3000))):
        if sent.path in kinds:
            with suppress(RequestRejected):
                intake.job(parse(sent.data, kinds[sent.path]), 8192)
