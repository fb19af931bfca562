"""The predicted wait against a queue whose true pace is known."""

from __future__ import annotations

import itertools
import random

import pytest

from router.pace import REQUEST_TOKENS, Pace


def serve(pace: Pace, num_requests: int, each_s: float, now_s: float, first_id: int = 0) -> float:
    """Let so many requests of 100 tokens wait together and be served one after the other; return the time after."""
    for request_id in range(first_id, first_id + num_requests):
        pace.begin(request_id, 100, now_s)
    for request_id in range(first_id, first_id + num_requests):
        now_s += each_s
        pace.served(request_id, now_s)
    return now_s


def test_nothing_is_predicted_before_anything_was_seen_and_when_nobody_waits() -> None:
    pace = Pace()
    pace.begin(1, 100, 0.0)
    assert pace.wait_s() == 0.0
    pace.served(1, 1.0)
    assert pace.wait_s() == 0.0


@pytest.mark.parametrize("together", [1, 20])
def test_one_at_a_time_shows_the_same_pace_as_a_full_queue(together: int) -> None:
    pace, now_s = Pace(), 100.0
    for round_number in range(20 // together):
        now_s = serve(pace, together, 0.2, now_s, first_id=100 * round_number) + 7.0
    for request_id in range(5000, 5010):
        pace.begin(request_id, 100, now_s)
    assert pace.wait_s() == pytest.approx(10 * 0.2, rel=0.15)


def test_long_prompts_count_for_more() -> None:
    pace = Pace()
    now_s = serve(pace, 20, 0.2, 0.0)
    pace.begin(100, 100 + 9 * (100 + REQUEST_TOKENS), now_s)
    assert pace.wait_s() == pytest.approx(10 * 0.2, rel=0.15)


def test_a_pace_that_changes_is_followed() -> None:
    pace = Pace()
    now_s = serve(pace, 50, 0.1, 0.0)
    serve(pace, 30, 1.0, now_s, first_id=1000)
    for request_id in range(5000, 5004):
        pace.begin(request_id, 100, now_s)
    assert pace.wait_s() == pytest.approx(4.0, rel=0.2)


def test_an_outage_and_requests_that_leave_spoil_nothing_for_long() -> None:
    pace = Pace()
    now_s = serve(pace, 50, 0.1, 0.0)
    pace.begin(900, 100, now_s)
    pace.gone(900, now_s + 3600.0)
    pace.gone(900, now_s + 3600.0)
    for request_id in range(1000, 1010):
        pace.begin(request_id, 100, now_s + 3600.0)
    assert pace.wait_s() < 2.0


def test_a_bound_on_the_predicted_wait_bounds_the_true_one_at_five_times_the_load() -> None:
    dice, pace, waiting = random.Random(1), Pace(), list[tuple[int, float]]()
    now_s, free_s, waits, num_refused = 0.0, 0.0, [], 0
    for request_id in itertools.count():
        now_s += dice.expovariate(50.0)  # served are 10 a second
        while waiting and free_s <= now_s:
            first, begun_s = waiting.pop(0)
            pace.served(first, free_s)
            waits.append(free_s - begun_s)
            free_s += dice.uniform(0.05, 0.15)
        if now_s > 60:
            break
        if pace.wait_s() > 2.0:
            num_refused += 1
            continue
        if not waiting:
            free_s = now_s + 0.1
        waiting.append((request_id, now_s))
        pace.begin(request_id, 100, now_s)
    settled = waits[50:]
    assert num_refused > 1500 and len(settled) > 500
    assert max(settled) < 3.0, "the queue is bounded in time"
    assert sum(settled) / len(settled) > 1.0, "and not for want of requests"
