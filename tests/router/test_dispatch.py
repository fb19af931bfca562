"""The life of a request, as lists of instructions."""

from __future__ import annotations

import dataclasses

import pytest

from protocol.errors import AnswerImpossible, NotReady
from protocol.request import FinishReason
from protocol.wire import Abort, Declined, GrammarFailed, Preempted, Prefill, Reserve, TransferFailed
from router.dispatch import Dispatch
from router.instructions import Cancelled, Deliver, Fail, Finish, IdSource, Instruction, Placed, Send, Terminal
from router.members import Registry
from tests.router.cluster import add, beat, cluster, first_token, key, link_all, row, submission

LENGTH, STOP = FinishReason.LENGTH, FinishReason.STOP


def dispatch(registry: Registry, max_placements: int = 3) -> Dispatch:
    return Dispatch(registry, max_placements, placement_wait_s=10.0, ids=IdSource(0))


def sent(out: list[Instruction]) -> list[tuple[str, str]]:
    """Name what is sent and to whom."""
    return [(type(i.message).__name__, i.key.worker_id) for i in out if isinstance(i, Send)]


def reserve(out: list[Instruction]) -> Reserve:
    return next(i.message for i in out if isinstance(i, Send) and isinstance(i.message, Reserve))


def prefill(out: list[Instruction]) -> Prefill:
    return next(i.message for i in out if isinstance(i, Send) and isinstance(i.message, Prefill))


def delivered(out: list[Instruction]) -> list[int]:
    return [i.row.index for i in out if isinstance(i, Deliver)]


def ends(out: list[Instruction]) -> list[Terminal]:
    return [i for i in out if isinstance(i, Terminal)]


# --- the straight way ---


def test_reserve_and_prefill_leave_together() -> None:
    d = dispatch(cluster())
    out = d.submit(submission(1), 0.25)
    assert sent(out) == [("Reserve", "d0"), ("Prefill", "p0")]
    assert [i for i in out if isinstance(i, Placed)] == [Placed(1, 0, reserve(out).transfer_id, "p0", "d0")]
    r, p = reserve(out), prefill(out)
    assert r.transfer_id == p.transfer_id and r.epoch == p.epoch == 0 and r.emitted == ()
    assert (r.prefill_worker_id, p.decode_worker_id) == ("p0", "d0")
    assert p.deadline_s == pytest.approx(0.75)


def test_tokens_come_once_and_in_order_and_the_last_one_finishes() -> None:
    d = dispatch(cluster())
    transfer_id = prefill(d.submit(submission(1), 0)).transfer_id
    out = d.first_token(key("p0"), first_token(transfer_id, row(1, 0, 0)), 1)
    assert delivered(out) == [0] and isinstance(out[0], Deliver) and out[0].first is not None
    out = d.tokens(key("d0"), [row(1, 0, 1), row(1, 0, 2)], 2)
    assert delivered(out) == [1, 2]
    assert d.tokens(key("d0"), [row(1, 0, 2), row(1, 0, 0)], 3) == []
    out = d.tokens(key("d0"), [row(1, 0, 3, STOP)], 3)
    assert delivered(out) == [3] and ends(out) == [Finish(1, STOP)] and sent(out) == []
    assert d.num_running == d.num_waiting == 0


def test_a_single_token_needs_no_decode_worker() -> None:
    registry = Registry(3.0, 20.0)
    add(registry, "p0")
    d = dispatch(registry)
    out = d.submit(submission(1, max_tokens=1), 0)
    assert sent(out) == [("Prefill", "p0")] and prefill(out).decode_worker_id is None
    out = d.first_token(key("p0"), first_token(prefill(out).transfer_id, row(1, 0, 0, LENGTH)), 1)
    assert delivered(out) == [0] and ends(out) == [Finish(1, LENGTH)] and sent(out) == []


def test_a_first_token_that_finishes_frees_the_decode_worker() -> None:
    d = dispatch(cluster())
    transfer_id = prefill(d.submit(submission(1), 0)).transfer_id
    out = d.first_token(key("p0"), first_token(transfer_id, row(1, 0, 0, STOP)), 1)
    assert ends(out) == [Finish(1, STOP)] and sent(out) == [("Abort", "d0")]


def test_decode_tokens_that_overtake_the_first_one_wait_for_it() -> None:
    d = dispatch(cluster())
    transfer_id = prefill(d.submit(submission(1), 0)).transfer_id
    assert d.tokens(key("d0"), [row(1, 0, 1), row(1, 0, 2, STOP)], 1) == []
    assert d.tokens(key("d0"), [row(1, 0, 1)], 1) == [], "said twice"
    out = d.first_token(key("p0"), first_token(transfer_id, row(1, 0, 0)), 2)
    assert delivered(out) == [0, 1, 2] and ends(out) == [Finish(1, STOP)]


# --- what goes wrong ---


def test_a_first_token_that_ends_what_went_on_before_fails_the_placement() -> None:
    d = dispatch(cluster())
    transfer_id = prefill(d.submit(submission(1), 0)).transfer_id
    d.first_token(key("p0"), first_token(transfer_id, row(1, 0, 0)), 1)
    out = d.transfer_failed(key("d0"), TransferFailed(transfer_id=transfer_id, reason="x"), 1)
    out = d.first_token(key("p0"), first_token(prefill(out).transfer_id, row(1, 1, 0, STOP)), 2)
    assert ends(out) == [] and sent(out) == [("Abort", "d0"), ("Reserve", "d0"), ("Prefill", "p0")]


def test_a_gap_fails_the_placement() -> None:
    d = dispatch(cluster())
    transfer_id = prefill(d.submit(submission(1), 0)).transfer_id
    d.first_token(key("p0"), first_token(transfer_id, row(1, 0, 0)), 1)
    out = d.tokens(key("d0"), [row(1, 0, 2)], 2)
    assert delivered(out) == []
    assert sent(out) == [("Abort", "p0"), ("Abort", "d0"), ("Reserve", "d0"), ("Prefill", "p0")] or sent(out) == [
        ("Abort", "d0"),
        ("Reserve", "d0"),
        ("Prefill", "p0"),
    ]
    assert reserve(out).epoch == 1 and reserve(out).emitted == (1000,)


def test_a_decline_aborts_the_other_side_and_goes_elsewhere() -> None:
    d = dispatch(cluster(1, 2))
    out = d.submit(submission(1), 0)
    declined = Declined(transfer_id=prefill(out).transfer_id, reason="no room")
    out = d.declined(key("d0"), declined, 0)
    assert sent(out) == [("Abort", "p0"), ("Reserve", "d1"), ("Prefill", "p0")]
    assert reserve(out).epoch == 1


def test_a_decline_by_the_only_worker_waits_longer_each_time() -> None:
    d, now_s, pauses = dispatch(cluster()), 0.0, []
    out = d.submit(submission(1), 0)
    for _ in range(7):
        transfer_id = prefill(out).transfer_id
        out = d.declined(key("d0"), Declined(transfer_id=transfer_id, reason="no room"), now_s)
        assert sent(out) == [("Abort", "p0")]
        begin_s, out = now_s, []
        while not sent(out):
            now_s += 0.01
            out = d.tick(now_s)
        pauses.append(now_s - begin_s)
    assert pauses == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0], abs=0.015)


def test_room_that_becomes_free_ends_the_pause() -> None:
    d = dispatch(cluster())
    first = prefill(d.submit(submission(1), 0)).transfer_id
    second = prefill(d.submit(submission(2), 0)).transfer_id
    d.declined(key("d0"), Declined(transfer_id=second, reason="no room"), 0)
    d.first_token(key("p0"), first_token(first, row(1, 0, 0)), 0)
    out = d.tokens(key("d0"), [row(1, 0, 1, STOP)], 0.001)
    assert sent(out) == [("Reserve", "d0"), ("Prefill", "p0")] and reserve(out).request_id == 2


def test_waiting_too_long_is_not_ready() -> None:
    registry = cluster()
    d = dispatch(registry)
    registry.remove(key("d0"))
    assert sent(d.submit(submission(1), 0)) == []
    assert d.tick(9.9) == []
    (fail,) = ends(d.tick(10.1))
    assert isinstance(fail, Fail) and isinstance(fail.error, NotReady) and "no decode worker" in str(fail.error)
    assert d.tick(30) == []


def test_declines_do_not_prolong_the_wait() -> None:
    d, now_s = dispatch(cluster()), 0.0
    out = d.submit(submission(1), 0)
    while not ends(out):
        now_s += 0.01
        placed = [i for i in out if isinstance(i, Send) and isinstance(i.message, Prefill)]
        if placed:
            out = d.declined(key("d0"), Declined(transfer_id=prefill(out).transfer_id, reason="x"), now_s)
        else:
            out = d.tick(now_s)
        assert now_s < 12
    assert isinstance(ends(out)[0], Fail)


def test_a_request_that_waits_for_room_is_not_overtaken() -> None:
    d = dispatch(cluster(num_blocks=10))
    d.submit(submission(1, num_prompt_tokens=28), 0)
    assert sent(d.submit(submission(2, num_prompt_tokens=20, first=100), 0)) == []
    assert sent(d.submit(submission(3, num_prompt_tokens=2, first=200), 0)) == []
    out = d.cancel(1, 1)
    assert [i.request_id for i in out if isinstance(i, Placed)] == [2, 3]


def test_a_preempted_sequence_comes_back_with_what_the_client_has() -> None:
    d = dispatch(cluster())
    transfer_id = prefill(d.submit(submission(1, max_tokens=50), 0)).transfer_id
    d.first_token(key("p0"), first_token(transfer_id, row(1, 0, 0)), 1)
    d.tokens(key("d0"), [row(1, 0, 1), row(1, 0, 2)], 1)
    out = d.preempted(key("d0"), Preempted(transfer_id=transfer_id), 2)
    assert sent(out) == [("Reserve", "d0"), ("Prefill", "p0")]
    assert reserve(out).emitted == (1000, 1001, 1002) and reserve(out).epoch == 1
    assert prefill(out).prompt == reserve(out).prompt
    transfer_id = prefill(out).transfer_id
    assert d.first_token(key("p0"), first_token(transfer_id, row(1, 1, 0)), 3) == [], "the client has it"
    assert delivered(d.tokens(key("d0"), [row(1, 1, 3)], 3)) == [3]
    assert d.tokens(key("d0"), [row(1, 0, 4)], 3) == [], "of the old epoch"


def test_preemption_never_fails_a_request_but_asks_for_more_room_each_time() -> None:
    registry = cluster(num_blocks=30)
    d = dispatch(registry, max_placements=2)
    out = d.submit(submission(1, max_tokens=60), 0)
    transfer_id = prefill(out).transfer_id
    d.first_token(key("p0"), first_token(transfer_id, row(1, 0, 0)), 0)
    for epoch in range(1, 10):
        out = d.preempted(key("d0"), Preempted(transfer_id=transfer_id), epoch)
        assert ends(out) == [] and reserve(out).epoch == epoch
        transfer_id = prefill(out).transfer_id
    d.submit(submission(2, num_prompt_tokens=70, first=100), 10)
    out = d.preempted(key("d0"), Preempted(transfer_id=transfer_id), 11)
    assert "Reserve" not in [name for name, _ in sent(out)], "6 + 1 tokens fit, 10 blocks more do not"


def test_a_stream_that_gave_way_outlasts_the_wait_while_workers_live() -> None:
    registry = cluster(num_blocks=9)
    d = dispatch(registry)
    first = prefill(d.submit(submission(1, num_prompt_tokens=20), 0)).transfer_id
    d.first_token(key("p0"), first_token(first, row(1, 0, 0)), 0)
    second = prefill(d.submit(submission(2, num_prompt_tokens=4, first=50), 0)).transfer_id
    d.first_token(key("p0"), first_token(second, row(2, 0, 0)), 0)
    d.tokens(key("d0"), [row(1, 0, 1), row(1, 0, 2), row(1, 0, 3), row(1, 0, 4)], 0)
    d.preempted(key("d0"), Preempted(transfer_id=second), 1)
    assert d.tick(100) == [] and d.num_waiting == 1
    registry.remove(key("d0"))
    registry.remove(key("p0"))
    assert [type(e) for e in ends(d.tick(101))] == [Fail]


@pytest.mark.parametrize("by", ["p0", "d0"])
def test_a_broken_transfer_is_placed_again_and_aborted_on_the_other_side(by: str) -> None:
    d = dispatch(cluster())
    transfer_id = prefill(d.submit(submission(1), 0)).transfer_id
    out = d.transfer_failed(key(by), TransferFailed(transfer_id=transfer_id, reason="x"), 1)
    other = "d0" if by == "p0" else "p0"
    assert sent(out) == [("Abort", other), ("Reserve", "d0"), ("Prefill", "p0")]
    assert d.transfer_failed(key(by), TransferFailed(transfer_id=transfer_id, reason="x"), 1) == [], "history"


def test_too_many_failures_end_with_one_explicit_error() -> None:
    d = dispatch(cluster(), max_placements=3)
    out = d.submit(submission(1), 0)
    for _ in range(2):
        transfer_id = prefill(out).transfer_id
        out = d.transfer_failed(key("d0"), TransferFailed(transfer_id=transfer_id, reason="checksum"), 1)
        assert ends(out) == []
    out = d.transfer_failed(key("d0"), TransferFailed(transfer_id=prefill(out).transfer_id, reason="checksum"), 1)
    (fail,) = ends(out)
    assert isinstance(fail, Fail) and str(fail.error) == "gave up after 3 failed placements; the last: checksum"
    assert sent(out) == [("Abort", "p0")]


def test_a_lost_decode_worker_is_replayed_on_another() -> None:
    registry = cluster(1, 2)
    d = dispatch(registry)
    transfer_id = prefill(d.submit(submission(1), 0)).transfer_id
    d.first_token(key("p0"), first_token(transfer_id, row(1, 0, 0)), 1)
    d.tokens(key("d0"), [row(1, 0, 1)], 1)
    registry.remove(key("d0"))
    out = d.worker_lost(key("d0"), 2)
    assert sent(out) == [("Reserve", "d1"), ("Prefill", "p0")] and reserve(out).emitted == (1000, 1001)
    assert d.tokens(key("d0"), [row(1, 1, 2)], 2) == [], "not from whom it was lost"


def test_a_lost_prefill_worker_matters_only_before_the_kv_has_landed() -> None:
    registry = cluster(2, 1)
    d = dispatch(registry)
    early = prefill(d.submit(submission(1), 0))
    registry.remove(key("p0"))
    out = d.worker_lost(key("p0"), 1)
    assert early.transfer_id and sent(out) == [("Abort", "d0"), ("Reserve", "d0"), ("Prefill", "p1")]
    transfer_id = prefill(out).transfer_id
    d.first_token(key("p1"), first_token(transfer_id, row(1, 1, 0)), 1)
    d.tokens(key("d0"), [row(1, 1, 1)], 1)
    registry.remove(key("p1"))
    assert d.worker_lost(key("p1"), 2) == []
    assert delivered(d.tokens(key("d0"), [row(1, 1, 2)], 3)) == [2]


def test_a_prefill_worker_lost_with_its_first_token_is_replaced_though_decode_goes_on() -> None:
    registry = cluster(2, 1)
    d = dispatch(registry)
    d.submit(submission(1), 0)
    d.tokens(key("d0"), [row(1, 0, 1)], 1)
    registry.remove(key("p0"))
    out = d.worker_lost(key("p0"), 2)
    assert sent(out) == [("Abort", "d0"), ("Reserve", "d0"), ("Prefill", "p1")] and reserve(out).emitted == ()


def test_nothing_is_placed_on_a_draining_worker_and_what_runs_goes_on() -> None:
    registry = cluster(1, 2)
    d = dispatch(registry)
    transfer_id = prefill(d.submit(submission(1), 0)).transfer_id
    registry.heartbeat(key("d0"), beat(is_draining=True), 1)
    assert sent(d.submit(submission(2), 1))[0] == ("Reserve", "d1")
    d.first_token(key("p0"), first_token(transfer_id, row(1, 0, 0)), 1)
    assert delivered(d.tokens(key("d0"), [row(1, 0, 1)], 2)) == [1]


def test_cancel_and_stop_abort_where_something_is_held_and_only_once() -> None:
    d = dispatch(cluster())
    d.submit(submission(1), 0)
    out = d.cancel(1, 1)
    assert sent(out) == [("Abort", "p0"), ("Abort", "d0")] and ends(out) == [Cancelled(1)]
    assert d.cancel(1, 1) == [] == d.stop(1, 1)
    transfer_id = prefill(d.submit(submission(2), 1)).transfer_id
    d.first_token(key("p0"), first_token(transfer_id, row(2, 0, 0)), 1)
    d.tokens(key("d0"), [row(2, 0, 1)], 1)
    out = d.stop(2, 2)
    assert sent(out) == [("Abort", "d0")] and ends(out) == [Finish(2, STOP)]
    assert d.tokens(key("d0"), [row(2, 0, 2)], 2) == [], "late"
    abort = next(i.message for i in out if isinstance(i, Send))
    assert isinstance(abort, Abort) and abort.transfer_id == transfer_id


def test_cancelling_what_waits_needs_no_worker() -> None:
    d = dispatch(Registry(3.0, 20.0))
    d.submit(submission(1), 0)
    assert d.num_waiting == 1 and d.cancel(1, 0) == [Cancelled(1)]


def test_what_waits_is_placed_when_workers_come() -> None:
    registry = Registry(3.0, 20.0)
    d = dispatch(registry)
    d.submit(submission(1), 0)
    add(registry, "p0")
    add(registry, "d0")
    assert d.tick(1) == []
    link_all(registry)
    assert sent(d.tick(2)) == [("Reserve", "d0"), ("Prefill", "p0")]


@pytest.mark.parametrize("token_id", [-1, 1 << 31])
def test_a_token_that_is_none_fails_the_placement(token_id: int) -> None:
    d = dispatch(cluster())
    transfer_id = prefill(d.submit(submission(1), 0)).transfer_id
    bad = row(1, 0, 0)
    bad = type(bad)(1, 0, 0, token_id)
    out = d.first_token(key("p0"), first_token(transfer_id, bad), 1)
    assert delivered(out) == [] and reserve(out).epoch == 1


def test_ids_are_unlike_those_of_other_routers_and_fit_the_wire() -> None:
    a, b = IdSource(), IdSource()
    ids = {source.next() for source in (a, b) for _ in range(100)}
    assert len(ids) == 200 and all(0 < i < 1 << 63 for i in ids)


# --- streams that are moved, and streams that nobody reads ---


def streaming(d: Dispatch, request_id: int, num_tokens: int, max_tokens: int) -> str:
    """Submit a request and bring it to this many tokens; return its decode worker."""
    out = d.submit(submission(request_id, max_tokens=max_tokens), 0)
    transfer_id = prefill(out).transfer_id
    prefill_id, decode_id = (next(w for name, w in sent(out) if name == kind) for kind in ("Prefill", "Reserve"))
    d.first_token(key(prefill_id), first_token(transfer_id, row(request_id, 0, 0)), 0)
    d.tokens(key(decode_id), [row(request_id, 0, index) for index in range(1, num_tokens)], 0)
    return decode_id


def test_streams_of_a_draining_decode_worker_move_a_few_at_a_time() -> None:
    registry = cluster(1, 1, max_num_seqs=8)
    d = dispatch(registry)
    assert {streaming(d, request_id, 3, 50) for request_id in (1, 2, 3)} == {"d0"}
    add(registry, "d1", max_num_seqs=8)
    link_all(registry)
    registry.heartbeat(key("d0"), beat(is_draining=True), 1)
    out = d.tick(1)
    assert sent(out) == [("Abort", "d0"), ("Reserve", "d1"), ("Prefill", "p0")] * 2
    assert reserve(out).emitted == (1000, 1001, 1002) and reserve(out).epoch == 1
    assert d.tick(1.1) == [], "two at a time"
    assert delivered(d.tokens(key("d0"), [row(3, 0, 3)], 1.2)) == [3], "who waits goes on"
    assert d.tokens(key("d0"), [row(1, 0, 3)], 1.2) == [], "who has moved does not"
    assert delivered(d.tokens(key("d1"), [row(1, 1, 3)], 1.3)) == [3]
    assert sent(d.tick(1.4)) == [("Abort", "d0"), ("Reserve", "d1"), ("Prefill", "p0")]


def test_a_stream_that_is_nearly_done_or_has_nowhere_to_go_stays_where_it_drains() -> None:
    registry = cluster(1, 1)
    d = dispatch(registry)
    streaming(d, 1, 3, 50)
    streaming(d, 2, 5, 8)
    registry.heartbeat(key("d0"), beat(is_draining=True), 1)
    assert d.tick(1) == [], "nobody else is there"
    add(registry, "d1")
    link_all(registry)
    out = d.tick(2)
    assert sent(out) == [("Abort", "d0"), ("Reserve", "d1"), ("Prefill", "p0")] and reserve(out).request_id == 1
    assert delivered(d.tokens(key("d0"), [row(2, 0, index) for index in (5, 6)], 3)) == [5, 6]
    assert ends(d.tokens(key("d0"), [row(2, 0, 7, LENGTH)], 3)) == [Finish(2, LENGTH)]


def test_a_paused_stream_holds_nothing_and_goes_on_with_what_its_client_has() -> None:
    d = dispatch(cluster())
    streaming(d, 1, 3, 50)
    assert sent(d.pause(1, 1)) == [("Abort", "d0")]
    assert d.pause(1, 1) == [] and (d.num_running, d.num_waiting) == (0, 0)
    assert d.tokens(key("d0"), [row(1, 0, 3)], 1) == []
    assert d.tick(100) == [], "it waits for its client, not for workers"
    out = d.go_on(1, 101)
    assert reserve(out).emitted == (1000, 1001, 1002) and reserve(out).epoch == 1
    assert d.go_on(1, 101) == []
    assert delivered(d.tokens(key("d0"), [row(1, 1, 3)], 102)) == [3]


def test_a_paused_request_can_be_cancelled_and_one_that_waits_can_be_paused() -> None:
    registry = cluster(1, 1, max_num_seqs=1)
    d = dispatch(registry)
    streaming(d, 1, 3, 50)
    assert d.submit(submission(2), 0) == [] and d.num_waiting == 1
    assert d.pause(2, 0) == [] and d.num_waiting == 0
    assert sent(d.pause(1, 0)) == [("Abort", "d0")]
    assert d.cancel(1, 0) == [Cancelled(1)]
    assert sent(d.go_on(2, 0)) == [("Reserve", "d0"), ("Prefill", "p0")]


# --- where the phases agree, prefill computes what was emitted before ---


def agreeing(num_decodes: int = 2) -> Registry:
    return cluster(1, num_decodes, phases_agree=True)


def test_a_resumed_stream_gets_its_next_token_from_prefill() -> None:
    registry = agreeing()
    d = dispatch(registry)
    lost = streaming(d, 1, 3, 50)
    registry.remove(key(lost))
    out = d.worker_lost(key(lost), 1)
    r, p = reserve(out), prefill(out)
    assert r.emitted == p.emitted == (1000, 1001, 1002) and not r.is_replayed
    other = next(w for name, w in sent(out) if name == "Reserve")
    assert delivered(d.first_token(key("p0"), first_token(p.transfer_id, row(1, 1, 3)), 2)) == [3]
    assert delivered(d.tokens(key(other), [row(1, 1, 4)], 3)) == [4]
    assert d.tokens(key(other), [row(1, 1, 4)], 3) == [], "once"


def test_a_token_of_a_resumed_stream_that_is_not_the_next_fails_the_placement() -> None:
    d = dispatch(agreeing(1))
    streaming(d, 1, 3, 50)
    out = d.preempted(key("d0"), Preempted(transfer_id=_transfer_of(d)), 1)
    out = d.first_token(key("p0"), first_token(prefill(out).transfer_id, row(1, 1, 0)), 2)
    assert delivered(out) == [] and prefill(out).epoch == 2


def _transfer_of(d: Dispatch) -> int:
    return next(iter(d._by_transfer))


def test_decode_rows_that_overtake_the_next_token_of_a_resumed_stream_wait_for_it() -> None:
    d = dispatch(agreeing(1))
    streaming(d, 1, 3, 50)
    out = d.preempted(key("d0"), Preempted(transfer_id=_transfer_of(d)), 1)
    assert d.tokens(key("d0"), [row(1, 1, 4), row(1, 1, 5)], 2) == []
    assert d.tokens(key("d0"), [row(1, 1, 5)], 2) == [], "kept once"
    first = first_token(prefill(out).transfer_id, row(1, 1, 3))
    assert delivered(d.first_token(key("p0"), first, 3)) == [3, 4, 5]
    assert delivered(d.tokens(key("d0"), [row(1, 1, 6)], 3)) == [6]


def test_a_resumed_stream_may_end_with_its_next_token() -> None:
    d = dispatch(agreeing(1))
    streaming(d, 1, 3, 4)
    out = d.preempted(key("d0"), Preempted(transfer_id=_transfer_of(d)), 1)
    first = first_token(prefill(out).transfer_id, row(1, 1, 3, LENGTH))
    out = d.first_token(key("p0"), first, 2)
    assert delivered(out) == [3] and ends(out) == [Finish(1, LENGTH)] and sent(out) == [("Abort", "d0")]


def test_one_worker_that_differs_lets_decode_replay() -> None:
    registry = agreeing(1)
    add(registry, "d1", phases_agree=False)
    link_all(registry)
    d = dispatch(registry)
    lost = streaming(d, 1, 3, 50)
    out = d.preempted(key(lost), Preempted(transfer_id=_transfer_of(d)), 1)
    assert reserve(out).is_replayed and prefill(out).emitted == ()


def test_a_lower_priority_number_is_placed_and_due_earlier() -> None:
    d = dispatch(cluster(num_blocks=10))
    d.submit(submission(1, num_prompt_tokens=28), 0)
    for request_id, priority in ((2, 1), (3, 0), (4, -1), (5, 0)):
        made = submission(request_id, num_prompt_tokens=20, first=100 * request_id)
        assert sent(d.submit(dataclasses.replace(made, priority=priority), 0)) == []
    order = []
    for running in (1, 4, 3, 5):
        order += [i.request_id for i in d.cancel(running, 1) if isinstance(i, Placed)]
    assert order == [4, 3, 5, 2]


# --- grammars ---


@pytest.mark.parametrize("who", ["p0", "d0"])
@pytest.mark.parametrize("num_tokens", [0, 2])
def test_a_failed_grammar_ends_its_request_and_is_not_placed_again(who: str, num_tokens: int) -> None:
    d = dispatch(cluster())
    transfer_id = prefill(d.submit(submission(1), 0.0)).transfer_id
    if num_tokens:
        out = d.first_token(key("p0"), first_token(transfer_id, row(1, 0, 0)), 0.1)
        assert delivered(out + d.tokens(key("d0"), [row(1, 0, 1)], 0.2)) == [0, 1]
    told = GrammarFailed(transfer_id=transfer_id, reason="grammar: too costly")
    out = d.grammar_failed(key(who), told, 0.3)
    (end,) = ends(out)
    assert isinstance(end, Fail) and isinstance(end.error, AnswerImpossible) and "too costly" in str(end.error)
    assert end.error.status == 400
    holders = {"p0", "d0"} if not num_tokens else {"d0"}
    assert sent(out) == [("Abort", worker) for worker in ("p0", "d0") if worker in holders - {who}]
    assert d.num_running == d.num_waiting == 0
    # The other worker, where the same grammar fails, comes too late.
    assert d.grammar_failed(key("d0" if who == "p0" else "p0"), told, 0.4) == []


def test_a_failed_grammar_of_an_older_placement_counts_for_nothing() -> None:
    d = dispatch(cluster())
    old = prefill(d.submit(submission(1), 0.0)).transfer_id
    d.transfer_failed(key("d0"), TransferFailed(transfer_id=old, reason="x"), 0.1)
    assert d.grammar_failed(key("d0"), GrammarFailed(transfer_id=old, reason="late"), 0.2) == []
    assert d.num_running == 1
