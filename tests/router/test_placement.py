"""Which workers take a request, and the books that the choice rests on."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.load import Demand, Loads
from router.members import Registry
from router.placement import BlockLedger, DecodeCandidate, Pair, PrefillCandidate, PrefixMemory, choose
from tests.router.cluster import beat, cluster, key


def prefill(worker_id: str, queued: int = 0, cached: int = 0) -> PrefillCandidate:
    return PrefillCandidate(worker_id, queued, cached)


def decode(worker_id: str, used: int = 0, needed: int = 2, num: int = 0, linked: str = "p0 p1") -> DecodeCandidate:
    return DecodeCandidate(worker_id, 20, used, needed, num, 8, frozenset(linked.split()))


def test_the_shortest_queue_wins() -> None:
    assert choose(10, [prefill("p0", 50), prefill("p1", 20)], [decode("d0")]) == Pair("p1", "d0")


def test_a_cached_prefix_outweighs_a_slightly_longer_queue() -> None:
    assert choose(100, [prefill("p0", 0), prefill("p1", 50, cached=80)], [decode("d0")]) == Pair("p1", "d0")
    assert choose(100, [prefill("p0", 0), prefill("p1", 90, cached=80)], [decode("d0")]) == Pair("p0", "d0")


def test_the_emptiest_decode_worker_wins_by_blocks_and_by_sequences() -> None:
    assert choose(1, [prefill("p0")], [decode("d0", used=10), decode("d1", used=4)]) == Pair("p0", "d1")
    assert choose(1, [prefill("p0")], [decode("d0", num=3), decode("d1", num=2)]) == Pair("p0", "d1")
    assert choose(1, [prefill("p0")], [decode("d0", needed=8), decode("d1", needed=2)]) == Pair("p0", "d1")


def test_only_linked_workers_make_a_pair() -> None:
    decodes = [decode("d0", linked="p1"), decode("d1", used=15, linked="p0")]
    assert choose(1, [prefill("p0"), prefill("p1", 5)], decodes) == Pair("p0", "d1")
    assert choose(1, [prefill("p0"), prefill("p1", 5)], [decodes[0]]) == Pair("p1", "d0")
    assert choose(1, [prefill("p0")], [decodes[0]]) is None


def test_a_full_decode_worker_is_no_candidate_but_an_empty_one_always_is() -> None:
    assert choose(1, [prefill("p0")], [decode("d0", used=19, num=1)]) is None
    assert choose(1, [prefill("p0")], [decode("d0", used=15, num=4)]) is None, "each sequence may grow by a block"
    assert choose(1, [prefill("p0")], [decode("d0", used=14, num=4)]) is not None
    assert choose(1, [prefill("p0")], [decode("d0", num=8)]) is None
    assert choose(1, [prefill("p0")], [decode("d0", needed=50)]) is not None


def test_without_decode_only_a_prefill_worker_is_needed() -> None:
    assert choose(1, [prefill("p0", 3), prefill("p1", 2)], None) == Pair("p1", None)
    assert choose(1, [], None) is None and choose(1, [], [decode("d0")]) is None


def test_ties_go_to_the_first_name_whatever_the_order() -> None:
    assert choose(1, [prefill("p1"), prefill("p0")], [decode("d1"), decode("d0")]) == Pair("p0", "d0")


# --- memory of prefixes ---

A, B, C, D = b"a", b"b", b"c", b"d"


def test_memory_counts_leading_blocks_only() -> None:
    memory = PrefixMemory(10)
    memory.note([A, B, C])
    assert memory.num_held([A, B, C, D]) == 3
    assert memory.num_held([A, D, C]) == 1
    assert memory.num_held([D]) == 0 == memory.num_held([])


def test_memory_is_bounded_and_forgets_the_end_of_old_prefixes_first() -> None:
    memory = PrefixMemory(3)
    memory.note([A, B, C])
    memory.note([D])
    assert memory.num_held([A, B, C]) == 2
    memory.note([A])
    memory.note([C])
    assert memory.num_held([D]) == 1 and memory.num_held([A, B]) == 1


# --- ledger ---


def test_a_shared_prefix_counts_once() -> None:
    ledger = BlockLedger()
    ledger.add(1, [A, B], 4)
    assert ledger.needed([A, B, C], 5) == 3
    ledger.add(2, [A, B, C], 5)
    assert ledger.num_blocks == 3 + 2 + 2
    ledger.grow(1, 6)
    ledger.grow(1, 5)
    assert ledger.num_blocks == 3 + 4 + 2
    ledger.remove(1)
    ledger.remove(1)
    assert ledger.num_blocks == 5 and len(ledger) == 1
    ledger.remove(2)
    assert ledger.num_blocks == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(0, 5), st.booleans())))
def test_the_ledger_is_empty_when_everything_has_ended(steps: list[tuple[int, int, int, bool]]) -> None:
    ledger, live = BlockLedger(), set[int]()
    for transfer_id, num_names, extra, ends in steps:
        if ends:
            assert ledger.remove(transfer_id) == (transfer_id in live)
            live.discard(transfer_id)
        elif transfer_id in live:
            ledger.grow(transfer_id, num_names + extra)
        else:
            ledger.add(transfer_id, [bytes([i]) for i in range(num_names)], num_names + extra)
            live.add(transfer_id)
        assert ledger.num_blocks >= 0 and len(ledger) == len(live)
    for transfer_id in live:
        ledger.remove(transfer_id)
    assert ledger.num_blocks == 0


# --- loads ---


def demand(num_tokens: int = 8, names: tuple[bytes, ...] = (A, B), num_blocks: int = 3) -> Demand:
    return Demand(num_tokens, names, num_blocks, needs_decode=True)


def test_placements_count_at_once_and_until_they_end() -> None:
    registry = cluster(2, 2)
    loads = Loads(registry)
    assert loads.choose(demand(), ()) == Pair("p0", "d0")
    loads.placed(1, demand(), key("p0"), key("d0"))
    other = demand(names=(C, D))
    assert loads.choose(other, ()) == Pair("p1", "d1")
    assert loads.choose(demand(), ()) == Pair("p1", "d1"), "p0 has the prefix, but 8 tokens to compute first"
    loads.computed(1, key("p0"))
    assert loads.choose(demand(), ()) == Pair("p0", "d1")
    loads.ended(1, key("p0"))
    loads.ended(1, key("d0"))
    assert loads.choose(other, ()) == Pair("p0", "d0")


def test_what_others_do_counts_from_heartbeats() -> None:
    registry = cluster(2, 2)
    loads = Loads(registry)
    registry.heartbeat(key("p0"), beat(queued_tokens=100), 1.0)
    registry.heartbeat(key("d0"), beat(blocks_leased=50, blocks_total=100), 1.0)
    for worker in registry:
        loads.heartbeat(worker)
    assert loads.choose(demand(), ()) == Pair("p1", "d1")


def test_excluded_and_draining_workers_are_passed_over() -> None:
    registry: Registry = cluster(2, 2)
    loads = Loads(registry)
    assert loads.choose(demand(), {"p0", "d1"}) == Pair("p1", "d0")
    registry.heartbeat(key("d0"), beat(is_draining=True), 1.0)
    assert loads.choose(demand(), ()) == Pair("p0", "d1")
    assert loads.choose(demand(), {"d1"}) is None


def test_a_prefill_worker_holds_no_more_than_it_said() -> None:
    registry = cluster(1, 1, max_num_seqs=1)
    loads = Loads(registry)
    loads.placed(1, demand(), key("p0"), None)
    assert loads.choose(demand(), ()) is None
    loads.ended(1, key("p0"))
    assert loads.choose(demand(), ()) == Pair("p0", "d0")
