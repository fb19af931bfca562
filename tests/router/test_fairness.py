"""Who is placed next, and who holds how many places."""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.request import SamplingParams
from protocol.turns import Turns
from protocol.wire import Abort, Prefill
from router.access import NOBODY, Client
from router.dispatch import YIELD_AFTER_S, Dispatch
from router.fairness import FairQueue, Shares
from router.instructions import IdSource, Instruction, Send, Submission
from router.request_state import Need, RequestState
from tests.router.cluster import cluster, first_token, key, row

A, B, C = (Client(name, name) for name in "abc")
HEAVY = Client("heavy", "heavy", weight=3)
URGENT = Client("urgent", "urgent", first_priority=-5)
PAIR = (Need.PAIR,)
_ids = itertools.count(1)


def request(client: Client, cost: int = 10, priority: int = 0, max_tokens: int = 5) -> RequestState:
    number = next(_ids)
    sampling = SamplingParams(seed=1, max_tokens=max_tokens)
    submission = Submission(number, (1, 2), sampling, 1.0, priority=priority, client=client)
    state = RequestState(submission, number, 0.0)
    state.cost = cost
    return state


def drained(queue: FairQueue, needs: tuple[Need, ...] = tuple(Need)) -> list[RequestState]:
    found = []
    while (first := queue.first(needs)) is not None:
        queue.take(first)
        found.append(first)
    return found


def test_one_client_alone_is_served_in_order() -> None:
    queue, asked = FairQueue(), [request(NOBODY) for _ in range(5)]
    for one in asked:
        queue.add(one)
    assert drained(queue) == asked and len(queue) == 0


def test_a_late_small_client_comes_next_whatever_the_backlog() -> None:
    queue = FairQueue()
    for _ in range(1000):
        queue.add(request(A, 2000))
    for _ in range(10):
        first = queue.first(PAIR)
        assert first is not None
        queue.take(first)
    late = request(B, 20)
    queue.add(late)
    served = drained(queue)[:2]
    assert late in served


def test_priorities_order_ones_own_requests_and_overtake_others_only_where_granted() -> None:
    queue = FairQueue()
    first, second, eager = request(A), request(B), request(B, priority=-(1 << 31))
    for one in (first, second, eager):
        queue.add(one)
    assert drained(queue) == [first, eager, second]
    mine, modest, granted, beyond = request(A), request(URGENT), request(URGENT, priority=-5), request(URGENT)
    beyond = request(URGENT, priority=-100)
    for one in (mine, modest, granted, beyond):
        queue.add(one)
    assert drained(queue)[:2] == [beyond, granted]
    patient, usual = request(A, priority=7), request(B)
    queue.add(patient)
    queue.add(usual)
    assert drained(queue) == [usual, patient], "whoever may wait may say so"


def test_what_lost_its_workers_goes_first_and_is_paid_for_once() -> None:
    queue = FairQueue()
    lost = request(A, 1000)
    queue.add(lost)
    queue.add(request(A))
    queue.take(lost)
    lost.is_resumed = lost.is_charged
    queue.add(lost)
    queue.add(request(B))
    assert queue.first(PAIR) is lost
    queue.take(lost)
    assert [one.submission.client for one in drained(queue)] == [B, A]


costs = st.integers(1, 3000)
arrivals = st.lists(
    st.tuples(st.sampled_from([A, B, C, HEAVY]), costs, st.integers(-3, 3), st.integers(1, 3)), max_size=60
)


@settings(max_examples=150, deadline=None)
@given(arrivals, st.randoms(use_true_random=False))
def test_nothing_is_lost_nothing_starves_and_the_order_is_one_of_ranks(
    asked: list[tuple[Client, int, int, int]], dice: random.Random
) -> None:
    queue, waiting = FairQueue(), set[RequestState]()
    for client, cost, priority, max_tokens in asked:
        queue.add(one := request(client, cost, priority, max_tokens))
        waiting.add(one)
        roll = dice.random()
        if roll < 0.2:
            gone = dice.choice(sorted(waiting, key=lambda r: r.order))
            queue.remove(gone)
            queue.remove(gone)
            waiting.discard(gone)
        elif roll < 0.5 and (first := queue.first(tuple(Need))) is not None:
            assert first in waiting and first.rank == min(r.rank for r in waiting), "a lower rank goes first"
            queue.take(first)
            waiting.discard(first)
        assert len(queue) == len(waiting) and set(queue) == waiting
    for need in Need:
        head = queue.first((need,))
        assert (head is None) == (not any(r.need is need for r in waiting)), "it is work conserving"
    rest = drained(queue)
    assert len(rest) == len(waiting) and set(rest) == waiting
    assert queue._lanes == {} and not any(queue._heaps.values())


@settings(max_examples=100, deadline=None)
@given(st.lists(costs, min_size=30, max_size=60), st.lists(costs, min_size=30, max_size=60))
def test_backlogged_clients_get_their_shares_within_one_prompt(of_a: list[int], of_heavy: list[int]) -> None:
    queue, served = FairQueue(), Counter[str]()
    left = {A.name: len(of_a), HEAVY.name: len(of_heavy)}
    for client, costs_of in ((A, of_a), (HEAVY, of_heavy)):
        for cost in costs_of:
            queue.add(request(client, cost))
    while all(left.values()):
        first = queue.first(PAIR)
        assert first is not None
        queue.take(first)
        name = first.submission.client.name
        left[name] -= 1
        served[name] += first.cost
        assert abs(served[A.name] - served[HEAVY.name] / HEAVY.weight) <= 3000


def test_a_queue_that_is_cancelled_for_ever_keeps_nothing() -> None:
    queue = FairQueue()
    queue.add(request(A))
    for number in range(5000):
        queue.add(one := request(Client(f"c{number}"), priority=number))
        queue.remove(one)
        queue.add(same := request(A))
        queue.remove(same)
    sizes = (len(queue._lanes), sum(map(len, queue._heaps.values())), len(queue._turns._had))
    assert max(sizes) < 300 and sum(len(lane.entries) for lane in queue._lanes.values()) < 300


def test_idle_time_earns_no_credit() -> None:
    turns = Turns()
    turns.want("a")
    turns.charge("a", 5000, 1)
    turns.charge("a", 5000, 1)
    turns.want("b")
    assert turns.had("b") == 5000, "it does not get all that it never asked for"
    turns.rest("a")
    turns.want("a")
    assert turns.had("a") == 10000, "nor does resting for a moment forget what one had"
    turns.rest("a")
    turns.rest("b")
    turns.want("b")
    assert turns.had("b") == 0


def test_shares_count_places_and_weights() -> None:
    shares = Shares()
    shares.take(A, 5)
    shares.take(HEAVY, 6)
    shares.take(B, 0)
    assert (shares.total, shares.held(A), shares.held(B)) == (11, 5, 0)
    assert shares.weights_with(A) == 4 and shares.weights_with(B) == 5
    assert shares.heaviest(B) == A and shares.heaviest(A) == HEAVY and Shares().heaviest(A) is None
    shares.give(A, 5)
    shares.give(HEAVY, 6)
    assert shares.total == 0 and shares.weights_with(B) == 1


# --- in dispatch ---


def submit(d: Dispatch, client: Client, now_s: float, max_tokens: int = 500, priority: int = 0) -> list[Instruction]:
    number = next(_ids)
    sampling = SamplingParams(seed=number, max_tokens=max_tokens)
    prompt = tuple(range(100 * number, 100 * number + 6))
    return d.submit(Submission(number, prompt, sampling, 1.0, client=client, priority=priority), now_s)


def prompts(out: list[Instruction]) -> list[Prefill]:
    return [i.message for i in out if isinstance(i, Send) and isinstance(i.message, Prefill)]


def test_long_streams_of_one_client_give_way_until_the_other_has_as_many() -> None:
    d = Dispatch(cluster(num_blocks=1000, max_num_seqs=4), 3, placement_wait_s=60.0, ids=IdSource(0))
    for _ in range(20):
        submit(d, A, 0.0)
    assert (d.num_running, d.num_waiting) == (4, 16)
    for _ in range(3):
        assert prompts(submit(d, B, 1.0)) == []
    assert d.tick(1.0 + YIELD_AFTER_S / 2) == [], "it waits a moment for a place that comes free by itself"
    seen = []
    for step in range(10):
        out = d.tick(1.1 + YIELD_AFTER_S + step)
        aborted = [i for i in out if isinstance(i, Send) and isinstance(i.message, Abort)]
        seen += [(len(aborted), [p.client for p in prompts(out)])]
    assert seen[:2] == [(2, ["b"]), (2, ["b"])], "one at a time, told to both of its workers"
    assert seen[2:] == [(0, [])] * 8, "two each: nobody takes turns at taking"
    assert d._streams.held(A) == d._streams.held(B) == 2


def test_whoever_gave_way_goes_on_with_its_tokens_and_is_not_given_up() -> None:
    d = Dispatch(cluster(num_blocks=1000, max_num_seqs=2), 3, placement_wait_s=5.0, ids=IdSource(0))
    firsts = [prompts(submit(d, A, 0.0))[0] for _ in range(2)]
    d.first_token(key("p0"), first_token(firsts[1].transfer_id, row(firsts[1].request_id, 0, 0)), 0.1)
    [mine] = prompts(submit(d, B, 0.2) + d.tick(0.3 + YIELD_AFTER_S))
    assert d.tick(9.0) == [] and d.num_waiting == 1
    out = d.cancel(mine.request_id, 10.0)
    [again] = prompts(out)
    assert again.request_id == firsts[1].request_id and again.epoch == 1


def test_more_urgent_streams_do_not_give_way() -> None:
    d = Dispatch(cluster(num_blocks=1000, max_num_seqs=4), 3, placement_wait_s=60.0, ids=IdSource(0))
    for _ in range(4):
        submit(d, URGENT, 0.0, priority=-5)
    submit(d, B, 0.0)
    assert prompts(d.tick(100.0)) == []


@pytest.mark.parametrize("max_tokens", [500, 1], ids=["streams that never end", "first tokens"])
def test_a_small_client_waits_for_a_bounded_time_beside_a_flood(max_tokens: int) -> None:
    """Three requests every quarter of a second for two places; every fifth second a small one comes from another."""
    d = Dispatch(cluster(num_blocks=1000, max_num_seqs=2), 3, placement_wait_s=1e9, ids=IdSource(0))
    running, waits, asked = deque[tuple[float, Prefill]](), list[float](), dict[int, float]()

    def note(out: list[Instruction], now_s: float) -> None:
        for placed in prompts(out):
            running.append((now_s, placed))
            if placed.client == B.name:
                waits.append(now_s - asked.pop(placed.request_id))

    for step in range(400):
        now_s = 0.25 * step
        note(d.tick(now_s), now_s)
        for begun_s, placed in tuple(running):
            # What the small client asks for takes a second; the other's streams go on for ever.
            if now_s - begun_s >= 1.0 and (placed.client == B.name or max_tokens == 1):
                running.remove((begun_s, placed))
                note(d.cancel(placed.request_id, now_s), now_s)
        for _ in range(3):
            note(submit(d, A, now_s, max_tokens), now_s)
        if step % 20 == 10:
            out = submit(d, B, now_s, max_tokens)
            asked[next(reversed(d._requests))] = now_s
            note(out, now_s)
    assert len(waits) == 20 and max(waits) <= YIELD_AFTER_S + 0.5
