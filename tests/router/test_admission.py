"""Who is let in when the server is full, and who is refused when a first token would take long."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import Overloaded
from protocol.wire import Prefill, Reserve
from router.access import Client
from router.admission import Admission
from router.metrics import Metrics
from router.pace import TOLD_S, Capacity, Pace
from router.tokenizer import Tokenizer
from tests.router.cluster import add, cluster
from tests.router.tiny import byte_id
from tests.router.workers import CHAT, HI, LENGTH, config, staged

A, B, C = (Client(name, name) for name in "abc")
HEAVY = Client("heavy", "heavy", weight=3)


def admission(**fields: Any) -> Admission:
    return Admission(config(**fields), Metrics("m"))


def lets_in(ours: Admission, client: Client, count: int = 1) -> bool:
    try:
        ours.check(client, count, False, None)
    except Overloaded:
        return False
    return True


def filled(ours: Admission, client: Client) -> int:
    """Let a client take what it can get; return how many places that are."""
    while lets_in(ours, client):
        ours.places.take(client)
    return ours.places.held(client)


def test_one_client_alone_has_all_places_and_others_their_shares_beyond_them() -> None:
    ours = admission(max_num_requests=12)
    assert filled(ours, A) == 12 and not lets_in(ours, A)
    assert filled(ours, B) == 6 and not lets_in(ours, A), "who has more than its share is refused first"
    assert filled(ours, C) == 4
    assert ours.places.total <= 24
    ours.places.give(A, 10)
    assert lets_in(ours, A) and filled(ours, A) == 4, "and has its own share again"


def test_a_weight_is_a_share() -> None:
    ours = admission(max_num_requests=12)
    assert (filled(ours, A), filled(ours, HEAVY)) == (12, 9)


def test_many_clients_never_hold_more_than_twice_the_places() -> None:
    ours = admission(max_num_requests=8)
    for number in range(100):
        filled(ours, Client(f"c{number}"))
    assert ours.places.total == 16


def test_choices_and_prompts_count_one_by_one() -> None:
    ours = admission(max_num_requests=12)
    ours.places.take(A, 12)
    assert lets_in(ours, B, 6) and not lets_in(ours, B, 7)


# --- the wait ---


def test_what_workers_say_counts_from_the_first_request_on() -> None:
    ours, registry = admission(max_wait_s=15.0), cluster(num_prefills=0)
    add(registry, "p0", prompt_tokens_per_s=400.0, context_share=0.001)
    ours.told(registry.prefills)
    accepted = 0
    for number in range(30):
        if lets_in(ours, A):
            ours.pace.begin(number, 2100, 0.0, A)
            accepted += 1
    # A prompt takes 2,100 / 400 s, and as much again for its context: 11 s, so the second one is the last.
    assert accepted == 2
    ours.pace.gone(0, 0.0)
    assert lets_in(ours, A)


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_a_burst_on_a_fresh_server_waits_about_as_long_as_may_be(num_workers: int) -> None:
    """Each worker computes two prompts at once, as fast as it has said, or half as fast."""
    for truth in (1.0, 0.5):
        ours, registry = admission(max_wait_s=20.0), cluster(num_prefills=0)
        for number in range(num_workers):
            add(registry, f"p{number}", prompt_tokens_per_s=1000.0)
        ours.told(registry.prefills)
        waiting = []
        for number in range(200):
            if lets_in(ours, A):
                ours.pace.begin(number, 2000, 0.0, A)
                waiting.append(number)
        each_s, now_s = 4.0 / truth, 0.0
        while waiting:
            now_s += each_s
            for number in waiting[: 2 * num_workers]:
                ours.pace.served(number, now_s)
            del waiting[: 2 * num_workers]
        assert 18.0 / truth <= now_s <= 30.0 / truth
        for number in range(1000, 1400):
            if lets_in(ours, A):
                ours.pace.begin(number, 2000, now_s, A)
                waiting.append(number)
        assert len(waiting) / num_workers == pytest.approx(10 * truth, abs=3.5), "and the second burst is predicted"


def test_cached_tokens_are_no_work_and_silence_while_many_compute_is_no_outage() -> None:
    pace = Pace()
    pace.told(Capacity(1000.0))
    for number in range(40):
        pace.begin(number, 2000, 0.0, A, 2000 if number == 0 else 16)
    assert pace.wait_s(A) < 5.0
    for tick in range(12):
        pace.gone(99, 0.25 * tick)  # nothing of ours: time passes
    assert pace.wait_s(A) < 6.0


def test_workers_that_come_and_go_change_the_pace_by_as_much() -> None:
    pace = Pace()
    pace.told(Capacity(1000.0))
    pace.begin(1, 4000, 0.0, A)
    alone_s = pace.wait_s(A)
    pace.told(Capacity(2000.0))
    assert pace.wait_s(A) == pytest.approx(alone_s / 2)
    pace.told(Capacity(0.0))
    assert pace.wait_s(A) == pytest.approx(alone_s / 2), "nobody is there: what was seen is the best guess"
    pace.told(Capacity(1000.0))
    assert pace.wait_s(A) == pytest.approx(alone_s)


def test_what_was_told_is_forgotten_for_what_is_seen() -> None:
    pace, now_s = Pace(), 0.0
    pace.told(Capacity(100_000.0))
    for number in range(40):
        pace.begin(number, 500, now_s, A)
        now_s += 1.0
        pace.served(number, now_s)
    for number in range(100, 110):
        pace.begin(number, 500, now_s, A)
    assert pace.wait_s(A) == pytest.approx(10.0, rel=0.2) and TOLD_S < 5.0


def test_the_wait_is_that_of_the_client() -> None:
    pace = Pace()
    pace.told(Capacity(1000.0))
    for number in range(30):
        pace.begin(number, 2000, 0.0, A)
    assert pace.wait_s(A) > 60.0 and pace.wait_s(B) < 1.0
    pace.begin(30, 2000, 0.0, B)
    assert 3.0 < pace.wait_s(B) < 6.0, "its own, and as much of the other's"
    assert pace.wait_s(HEAVY) < pace.wait_s(C) < 1.0


# --- over HTTP ---


@contextmanager
def keys(tmp_path: Path) -> Iterator[dict[str, Any]]:
    file = tmp_path / "keys"
    file.write_text("ka alice\nkb bob\nkc carol priority=-5\n")
    yield {"api_key_files": (str(file),)}


def ask(stage: Any, key: str, **fields: Any) -> asyncio.Task[Any]:
    headers = {"Authorization": f"Bearer {key}", **fields.pop("headers", {})}
    return asyncio.create_task(stage.post(CHAT, {**HI, "max_tokens": 1, **fields}, headers=headers))


async def test_the_other_tenant_is_served_while_one_holds_every_place(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with keys(tmp_path) as fields:
        async with staged(tokenizer, max_num_requests=3, **fields) as stage:
            prefill, _ = await stage.pair()
            running = [ask(stage, "ka", max_tokens=2) for _ in range(3)]
            for _ in running:
                await prefill.hear(Prefill)
            status, body, headers = await ask(stage, "ka")
            assert (status, headers["Retry-After"]) == (429, "1"), body
            served = ask(stage, "kb")
            await prefill.first(byte_id("b"), LENGTH)
            assert (await served)[0] == 200
            assert (await ask(stage, "kb", n=2))[0] == 429, "two are more than its share"
            for task in running:
                task.cancel()


async def test_a_priority_counts_against_others_as_far_as_its_key_grants(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with keys(tmp_path) as fields:
        async with staged(tokenizer, **fields) as stage:
            prefill, decode = await stage.pair(max_num_seqs=1)
            first = ask(stage, "ka", max_tokens=2)
            reserve = await decode.hear(Reserve)
            late = [ask(stage, "ka")]
            await stage.until(lambda: stage.router.switchboard.dispatch.num_waiting == 1)
            for number, (key, priority) in enumerate((("kb", -(1 << 31)), ("kc", -(1 << 31))), 2):
                late.append(ask(stage, key, priority=priority))
                await stage.until(lambda: stage.router.switchboard.dispatch.num_waiting == number)  # noqa: B023
            held = await prefill.first(byte_id("a"))
            decode.emit(reserve, [byte_id("b")], finish=LENGTH)
            seen = [held.client]
            for _ in late:
                placed = await prefill.hear(Prefill)
                seen.append(placed.client)
                assert placed.rank == (-5 if placed.client == "carol" else 0)
                prefill.received.insert(0, placed)
                await prefill.first(byte_id("x"), LENGTH)
            assert seen == ["alice", "carol", "bob", "alice"] or seen == ["alice", "carol", "alice", "bob"]
            assert [(await task)[0] for task in (first, *late)] == [200] * 4
