"""Reservations wait for their prompts, in either order, and cost nothing meanwhile."""

from __future__ import annotations

import pytest

from decode import reservations
from decode.reservations import Reservations
from engine.sequence import Sequence
from protocol.block_hash import root_hash
from protocol.request import SamplingParams
from protocol.wire import Reserve

SAMPLING = SamplingParams(max_tokens=5, seed=1)


class Desk:
    """Reservations, and what they have let through."""

    def __init__(self) -> None:
        self.reserved: list[int] = []
        self.side = Reservations(16, lambda message, _: self.reserved.append(message.transfer_id))

    def hold(self, transfer_id: int, prefill_worker_id: str = "p0", num_tokens: int = 40) -> None:
        prompt = tuple(range(num_tokens))
        message = Reserve(
            request_id=1,
            transfer_id=transfer_id,
            epoch=1,
            prompt=prompt,
            sampling=SAMPLING,
            prefill_worker_id=prefill_worker_id,
        )
        sequence = Sequence(1, transfer_id, 1, list(prompt), num_tokens, SAMPLING, root_hash("m", ""), [])
        sequence.num_prefill_tokens = num_tokens
        self.side.hold(message, sequence)


def test_a_prompt_reserves_when_it_begins_and_is_promised_until_then() -> None:
    desk = Desk()
    desk.hold(1)
    desk.hold(2, num_tokens=16)
    assert desk.reserved == [] and desk.side.num_blocks == 3 + 1
    desk.side.begins("p0", 1)
    assert desk.reserved == [1] and desk.side.num_blocks == 1
    desk.side.begins("p0", 1)
    assert desk.reserved == [1]


def test_the_word_may_come_before_the_placement() -> None:
    desk = Desk()
    desk.side.begins("p0", 1)
    desk.hold(1)
    assert desk.reserved == [1] and desk.side.num_blocks == 0


@pytest.mark.parametrize("is_first", [True, False])
def test_the_word_of_another_prefill_worker_counts_for_nothing(is_first: bool) -> None:
    desk = Desk()
    if is_first:
        desk.side.begins("stranger", 1)
    desk.hold(1)
    desk.side.begins("stranger", 1)
    assert desk.reserved == []
    desk.side.begins("p0", 1)
    assert desk.reserved == [1]


def test_what_was_dropped_is_not_reserved_and_promises_nothing() -> None:
    desk = Desk()
    desk.hold(1)
    desk.side.drop(1)
    desk.side.drop(1)
    desk.side.begins("p0", 1)
    assert desk.reserved == [] and desk.side.num_blocks == 0


def test_words_about_placements_that_never_come_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservations, "MAX_BEGUN", 3)
    desk = Desk()
    for transfer_id in range(10):
        desk.side.begins("p0", transfer_id)
    for transfer_id in range(10):
        desk.hold(transfer_id)
    assert desk.reserved == [7, 8, 9]
