"""The two hand-off automata."""

from __future__ import annotations

import random

import pytest

from protocol.errors import ProtocolError
from protocol.handoff import HandoffState, Receiving, SendCommit, Sending, SendRange


def test_what_is_computed_before_the_grant_is_held_and_then_sent_in_order() -> None:
    sending = Sending(num_blocks=4)
    assert sending.ready(SendRange(0, 2, 0, 3)) == []
    assert sending.ready(SendRange(2, 2, 0, 3)) == []
    assert sending.commit() == []
    assert sending.grant(4, 0) == [SendRange(0, 2, 0, 3), SendRange(2, 2, 0, 3), SendCommit()]
    assert sending.state is HandoffState.COMMITTED


def test_blocks_that_the_receiver_holds_are_not_sent() -> None:
    sending = Sending(num_blocks=5)
    assert sending.grant(5, 3) == []
    assert sending.ready(SendRange(0, 2, 0, 3)) == []
    assert sending.ready(SendRange(2, 3, 1, 2)) == [SendRange(3, 2, 1, 2)]
    assert sending.commit() == [SendCommit()]
    sending.landed()
    assert sending.state is HandoffState.LANDED


def test_an_aborted_sender_says_nothing_more_and_ignores_late_words() -> None:
    sending = Sending(num_blocks=2)
    sending.ready(SendRange(0, 1, 0, 1))
    assert sending.abort()
    assert not sending.abort()
    assert sending.grant(2, 0) == sending.ready(SendRange(1, 1, 0, 1)) == sending.commit() == []
    sending.landed()
    assert sending.state is HandoffState.ABORTED


@pytest.mark.parametrize(("num_blocks", "num_cached"), [(3, 0), (4, 5), (4, -1)])
def test_a_grant_that_does_not_fit_the_prompt_is_refused(num_blocks: int, num_cached: int) -> None:
    with pytest.raises(ProtocolError):
        Sending(num_blocks=4).grant(num_blocks, num_cached)


def test_a_second_grant_and_an_early_landed_are_refused() -> None:
    sending = Sending(num_blocks=1)
    sending.grant(1, 0)
    with pytest.raises(ProtocolError):
        sending.grant(1, 0)
    with pytest.raises(ProtocolError):
        sending.landed()


def test_receiving_is_complete_only_with_commit_and_every_cell() -> None:
    receiving = Receiving(num_blocks=2, num_cached_blocks=0, num_layers=2)
    assert receiving.accepts(SendRange(0, 2, 0, 1))
    assert not receiving.landed(SendRange(0, 2, 0, 1))
    assert not receiving.commit(2)
    assert receiving.landed(SendRange(0, 2, 1, 1))
    assert receiving.state is HandoffState.COMPLETE
    assert not receiving.accepts(SendRange(0, 1, 0, 1))


def test_a_fully_cached_prompt_is_complete_with_commit() -> None:
    receiving = Receiving(num_blocks=3, num_cached_blocks=3, num_layers=2)
    assert receiving.commit(3)


@pytest.mark.parametrize(
    "cells",
    [SendRange(0, 1, 0, 2), SendRange(1, 3, 0, 2), SendRange(3, 2, 0, 2), SendRange(2, 1, 1, 2), SendRange(2, 0, 0, 2)],
    ids=str,
)
def test_pieces_outside_the_grant_are_refused(cells: SendRange) -> None:
    receiving = Receiving(num_blocks=4, num_cached_blocks=2, num_layers=2)
    with pytest.raises(ProtocolError, match="outside"):
        receiving.accepts(cells)


def test_a_piece_sent_twice_and_a_wrong_or_second_commit_are_refused() -> None:
    receiving = Receiving(num_blocks=2, num_cached_blocks=0, num_layers=1)
    receiving.landed(SendRange(0, 1, 0, 1))
    with pytest.raises(ProtocolError, match="twice"):
        receiving.accepts(SendRange(0, 2, 0, 1))
    with pytest.raises(ProtocolError):
        receiving.commit(3)
    receiving.commit(2)
    with pytest.raises(ProtocolError):
        receiving.commit(2)


def test_after_abort_late_pieces_and_commits_are_not_taken() -> None:
    receiving = Receiving(num_blocks=1, num_cached_blocks=0, num_layers=1)
    assert receiving.abort()
    assert not receiving.abort()
    assert not receiving.accepts(SendRange(0, 1, 0, 1))
    assert not receiving.commit(1)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_order_exactly_the_missing_cells_travel(seed: int) -> None:
    rng = random.Random(seed)
    num_blocks, num_layers = rng.randint(1, 12), rng.randint(1, 6)
    num_cached = rng.randint(0, num_blocks)
    sending, receiving = Sending(num_blocks), Receiving(num_blocks, num_cached, num_layers)
    edges = sorted({0, num_blocks, *(rng.randint(0, num_blocks) for _ in range(3))})
    cut = rng.randint(0, num_layers)
    ready = [
        SendRange(a, b - a, first, count)
        for a, b in zip(edges, edges[1:], strict=False)
        for first, count in ((0, cut), (cut, num_layers - cut))
        if count
    ]
    grant_at, sent = rng.randint(0, len(ready)), []
    for i, cells in enumerate(ready):
        if i == grant_at:
            sent += sending.grant(num_blocks, num_cached)
        sent += sending.ready(cells)
    sent += sending.commit()
    if grant_at == len(ready):
        sent += sending.grant(num_blocks, num_cached)
    assert sent.pop() == SendCommit()
    rng.shuffle(sent)
    done = [receiving.commit(num_blocks)]
    pieces = [piece for piece in sent if isinstance(piece, SendRange)]
    for piece in pieces:
        assert receiving.accepts(piece)
        done.append(receiving.landed(piece))
    assert len(pieces) == len(sent) and done == [False] * len(sent) + [True]
    num_cells = sum(piece.num_blocks * piece.num_layers for piece in pieces)
    assert num_cells == (num_blocks - num_cached) * num_layers


def test_a_damaged_piece_is_sent_again_once() -> None:
    sending = Sending(num_blocks=4)
    sending.grant(4, 1)
    sending.ready(SendRange(0, 4, 0, 3))
    assert sending.resend(SendRange(1, 2, 0, 3)) == [SendRange(1, 2, 0, 3)]
    sending.commit()
    assert sending.resend(SendRange(3, 1, 1, 2)) == [SendRange(3, 1, 1, 2)], "also behind COMMIT"
    for cells, words in (
        (SendRange(2, 1, 2, 1), "came twice"),
        (SendRange(0, 1, 0, 1), "outside the grant"),
        (SendRange(3, 2, 0, 1), "outside the grant"),
        (SendRange(3, 0, 0, 1), "outside the grant"),
    ):
        with pytest.raises(ProtocolError, match=words):
            sending.resend(cells)
    sending.landed()
    assert Sending(num_blocks=1).abort()


def test_a_resend_before_the_grant_is_refused_and_after_an_abort_ignored() -> None:
    sending = Sending(num_blocks=2)
    with pytest.raises(ProtocolError, match="outside the grant"):
        sending.resend(SendRange(0, 1, 0, 1))
    sending.abort()
    assert sending.resend(SendRange(0, 1, 0, 1)) == []


def test_the_receiver_asks_for_each_cell_once() -> None:
    receiving = Receiving(num_blocks=3, num_cached_blocks=0, num_layers=2)
    assert receiving.damaged(SendRange(0, 2, 0, 2))
    assert not receiving.damaged(SendRange(1, 1, 1, 1))
    assert receiving.damaged(SendRange(2, 1, 0, 1)) and receiving.damaged(SendRange(2, 1, 1, 1))
    receiving.commit(3)
    assert receiving.landed(SendRange(0, 3, 0, 2)), "asking again changes nothing of what is missing"
