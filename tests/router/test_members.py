"""Who is taken in, who is refused, and who counts as dead."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from protocol.wire import Role
from router.members import Refusal, Registry
from tests.router.cluster import FINGERPRINT, add, beat, cluster, key, link_all, registration


@pytest.fixture
def registry() -> Registry:
    """An empty registry."""
    return Registry(lease_ttl_s=3.0, stall_s=20.0)


def test_ready_means_a_linked_pair(registry: Registry) -> None:
    assert registry.missing() == ["no prefill worker", "no decode worker"]
    add(registry, "p0")
    assert registry.missing() == ["no decode worker"]
    add(registry, "d0")
    assert registry.missing() == ["no decode worker is linked with a prefill worker yet"]
    registry.set_links(key("d0"), [("p0", 2)])
    assert registry.missing(), "linked with an earlier instance"
    link_all(registry)
    assert not registry.missing()
    registry.heartbeat(key("p0"), beat(is_draining=True), 1.0)
    assert registry.missing() == ["no prefill worker"]


def test_another_model_is_refused_for_good_and_told_why(registry: Registry) -> None:
    add(registry, "p0")
    other = msgspec.structs.replace(FINGERPRINT, model_hash="other", num_layers=3)
    refusal = registry.register(registration("d0", fingerprint=other), 0.0)
    assert isinstance(refusal, Refusal) and refusal.is_final
    assert "d0 holds a different model or KV layout" in refusal.reason
    assert "model_hash" in refusal.reason and "num_layers" in refusal.reason


def test_the_model_may_change_once_nobody_is_left(registry: Registry) -> None:
    add(registry, "p0")
    registry.remove(key("p0"))
    other = msgspec.structs.replace(FINGERPRINT, model_hash="other")
    add(registry, "d0", fingerprint=other)
    assert registry.fingerprint == other


def test_the_shortest_context_counts_and_outlives_its_workers(registry: Registry) -> None:
    add(registry, "p0", max_model_len=100)
    add(registry, "d0", max_model_len=80)
    assert registry.max_model_len == 80
    registry.remove(key("d0"))
    assert registry.max_model_len == 100
    registry.remove(key("p0"))
    assert registry.max_model_len == 100


def test_a_name_in_use_is_refused_for_now(registry: Registry) -> None:
    add(registry, "p0")
    refusal = registry.register(registration("p0", instance=2), 0.0)
    assert isinstance(refusal, Refusal) and not refusal.is_final


def test_registrations_that_make_no_sense_are_refused(registry: Registry) -> None:
    for bad in (registration("p0", address=None), registration("x", role=Role.ROUTER)):
        refusal = registry.register(bad, 0.0)
        assert isinstance(refusal, Refusal) and refusal.is_final


def test_silence_makes_overdue() -> None:
    registry = cluster()
    registry.heartbeat(key("d0"), beat(), 2.0)
    assert registry.overdue(2.9) == []
    assert [(k.worker_id, hopeless) for k, _, hopeless in registry.overdue(3.1)] == [("p0", False)]


def _beats(registry: Registry, worker_id: str, until_s: int, **stats: Any) -> None:
    for second in range(until_s + 1):
        other = "p0" if worker_id == "d0" else "d0"
        registry.heartbeat(key(other), beat(), second)
        registry.heartbeat(key(worker_id), beat(progress=7, has_work=True, **stats), second)


def test_work_without_progress_makes_hopeless_and_bars_the_instance() -> None:
    registry = cluster()
    _beats(registry, "d0", 20, num_running=1)
    assert registry.overdue(20) == []
    _beats(registry, "d0", 21, num_running=1)
    found = registry.overdue(21)
    assert [(k.worker_id, hopeless) for k, _, hopeless in found] == [("d0", True)]
    assert "no progress" in found[0][1]
    registry.remove(key("d0"))
    refusal = registry.register(registration("d0"), 22)
    assert isinstance(refusal, Refusal) and refusal.is_final
    add(registry, "d0", instance=2)


def test_waiting_for_somebody_else_is_no_stall() -> None:
    registry = cluster()
    _beats(registry, "d0", 60, num_waiting=3)  # reserved, KV not there yet
    assert registry.overdue(60) == []
    _beats(registry, "p0", 60, num_running=3)  # computed, KV on its way
    assert registry.overdue(60) == []
    registry = cluster()
    _beats(registry, "p0", 60, queued_tokens=3)
    assert [k.worker_id for k, _, _ in registry.overdue(60)] == ["p0"]


def test_messages_of_an_earlier_instance_change_nothing() -> None:
    registry = cluster()
    registry.remove(key("d0"))
    add(registry, "d0", instance=2, now_s=1.0)
    assert registry.heartbeat(key("d0", 1), beat(is_draining=True), 5.0) is None
    assert registry.set_links(key("d0", 1), [("p0", 1)]) is None
    assert registry.remove(key("d0", 1)) is None
    worker = registry.get("d0")
    assert worker is not None and worker.heard_s == 1.0 and not worker.is_draining and not worker.links


def test_decode_workers_are_told_where_prefill_workers_are() -> None:
    assert [a.worker_id for a in cluster(2, 1).addresses] == ["p0", "p1"]
