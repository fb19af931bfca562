"""Whole transfers between a SendSide and a ReceiveSide, over every transport."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from kvtransfer import sending
from kvtransfer.transport import Buffer, Completion
from protocol.errors import PeerLost
from protocol.handoff import SendRange
from protocol.wire import Begin, Commit, Credit, PeerMessage, Piece
from tests.contract.workers import Plan, Site, until
from tests.kvtransfer.memory_region import DeviceRegion, MemoryRegion, fingerprint

NUM_LAYERS = 3


@pytest.fixture(params=[MemoryRegion, DeviceRegion], ids=["host", "device"])
def region(request: pytest.FixtureRequest) -> type[MemoryRegion]:
    """Return both kinds of KV memory: nobody but a region may touch the bytes of its slots."""
    kind: type[MemoryRegion] = request.param
    return kind


def plans(rng: random.Random, num_plans: int, num_blocks: int = 64) -> Iterator[Plan]:
    free = rng.sample(range(num_blocks), num_blocks)
    for number in range(num_plans):
        if len(free) < 12:
            return
        yield Plan.draw(rng, 1000 + number, NUM_LAYERS, free)


def whole(plan_id: int, num_blocks: int, num_cached_blocks: int = 0) -> Plan:
    blocks = tuple(range(num_blocks))
    return Plan(plan_id, blocks, blocks, num_cached_blocks, (SendRange(0, num_blocks, 0, NUM_LAYERS),), 5)


@pytest.mark.parametrize("seed", range(6))
async def test_random_transfers_arrive_byte_for_byte(site: Site, seed: int) -> None:
    """Random shapes, chunks, layer groups and cached prefixes; grant before or after open; many at once."""
    rng = random.Random(seed)
    prefill = await site.prefill()
    decode = await site.decode(prefill)
    drawn = list(plans(rng, 8))
    for plan in drawn:
        if rng.random() < 0.5:
            plan.receive(decode, "p0")
            await asyncio.sleep(rng.choice([0, 0.002]))
            await plan.send(prefill, "d0", rng)
        else:
            await plan.send(prefill, "d0", rng)
            plan.receive(decode, "p0")
    await until(lambda: all(decode.is_over(p.transfer_id) and p.transfer_id in prefill.ended for p in drawn))
    for plan in drawn:
        plan.check(prefill, decode)
    assert set(prefill.ended.values()) == {None}
    num_moved = sum(len(p.target) - p.num_cached_blocks for p in drawn)
    for stats in (prefill.side.stats, decode.side.stats):
        assert stats.num_transfers == len(drawn) and stats.num_transfers_failed == 0
        assert stats.num_blocks == num_moved
        assert stats.num_bytes == num_moved * site.layout.block_bytes
        assert stats.num_blocks_skipped == sum(p.num_cached_blocks for p in drawn)
        assert stats.transfer_s > 0
    algorithm = "words64" if site.region is DeviceRegion else "xxh3"
    assert prefill.region.algorithms == decode.region.algorithms == {algorithm}


async def test_commit_is_said_after_the_last_piece(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill = await site.prefill()
    decode = await site.decode(prefill)
    endpoint, said = prefill.side._peers["d0"].endpoint, list[type[PeerMessage]]()
    post = endpoint.post

    def note(message: PeerMessage) -> None:
        said.append(type(message))
        post(message)

    monkeypatch.setattr(endpoint, "post", note)
    plan = whole(1, 64)
    await plan.send(prefill, "d0")
    plan.receive(decode, "p0")
    await until(lambda: 1 in decode.complete)
    assert said == [Begin] + [Piece] * 7 + [Commit]  # 64 blocks, ten to a slot


async def test_a_fully_cached_prompt_moves_nothing(site: Site) -> None:
    prefill = await site.prefill()
    decode = await site.decode(prefill)
    plan = whole(1, 8, num_cached_blocks=8)
    plan.receive(decode, "p0")
    await plan.send(prefill, "d0")
    await until(lambda: decode.complete == {1: 5} and prefill.ended == {1: None})
    assert decode.side.stats.num_bytes == decode.region.num_writes == 0
    assert decode.side.stats.num_blocks_skipped == 8


async def test_one_prefill_feeds_two_decodes_and_one_decode_two_prefills(site: Site) -> None:
    prefills = [await site.prefill("p0", 1), await site.prefill("p1", 2)]
    decodes = [await site.decode(*prefills, name="d0"), await site.decode(*prefills, name="d1")]
    rng, work = random.Random(1), []
    for d, decode in enumerate(decodes):
        free = list(range(64))
        for number in range(6):
            plan = Plan.draw(rng, 100 * d + number, NUM_LAYERS, free)
            work.append((plan, prefills[number % 2], decode))
            plan.receive(decode, f"p{number % 2}")
            await plan.send(prefills[number % 2], f"d{d}", rng)
            if len(free) < 12:
                break
    await until(lambda: all(d.is_over(p.transfer_id) for p, _, d in work))
    for plan, prefill, decode in work:
        plan.check(prefill, decode)


@pytest.mark.parametrize("seed", range(6))
async def test_aborts_at_random_points_leave_no_trace(site: Site, seed: int) -> None:
    """Whoever aborts, whenever: both sides end, no aborted block is written afterwards, no slot is lost."""
    rng = random.Random(100 + seed)
    prefill = await site.prefill()
    decode = await site.decode(prefill)
    frozen: dict[int, bytes] = {}

    def contents(plan: Plan) -> bytes:
        return decode.region.memory[list(plan.target)].tobytes()

    async def run(plan: Plan) -> None:
        cut_off = rng.choice(["decode", "prefill", "both", None, None])
        sender = asyncio.create_task(plan.send(prefill, "d0", rng))
        await asyncio.sleep(rng.random() * 0.004)
        plan.receive(decode, "p0")
        await asyncio.sleep(rng.random() * 0.008)
        if cut_off in ("decode", "both"):
            decode.side.abort(plan.transfer_id, "changed our mind")
            if plan.transfer_id not in decode.complete:
                frozen[plan.transfer_id] = contents(plan)
        if cut_off in ("prefill", "both"):
            prefill.side.abort(plan.transfer_id, "changed our mind")
        await sender

    drawn = list(plans(rng, 8))
    await asyncio.gather(*(run(plan) for plan in drawn))
    await until(lambda: all(p.transfer_id in prefill.ended for p in drawn))
    await until(lambda: all(decode.is_over(p.transfer_id) or p.transfer_id in frozen for p in drawn))
    for plan in drawn:
        if plan.transfer_id in decode.complete:
            plan.check(prefill, decode)
        if plan.transfer_id in frozen:
            assert contents(plan) == frozen[plan.transfer_id]
            assert plan.transfer_id not in decode.failed
    assert decode.side.num_open == prefill.side.num_open == 0
    last = whole(9999, 12)  # the connection still works, every slot and credit included
    last.receive(decode, "p0")
    await last.send(prefill, "d0")
    await until(lambda: 9999 in decode.complete)


async def test_pieces_that_arrive_after_an_abort_never_reach_the_region(site: Site) -> None:
    prefill = await site.prefill(num_blocks=500)
    decode = await site.decode(prefill, num_blocks=500)
    plan = whole(1, 500)
    plan.receive(decode, "p0")
    await plan.send(prefill, "d0")
    aborted = asyncio.Event()
    scatter = decode.region.scatter

    def scatter_and_abort(*args: Any) -> None:
        assert not aborted.is_set()
        scatter(*args)
        if decode.region.num_writes == 3:
            decode.side.abort(1, "client left")
            aborted.set()

    decode.region.scatter = scatter_and_abort  # type: ignore[method-assign,assignment]
    await aborted.wait()
    before = decode.region.memory.tobytes()
    await until(lambda: 1 in prefill.ended)
    assert prefill.ended[1] == "receiver: client left"
    await until(lambda: decode.side.stats.num_late_pieces > 0)
    await asyncio.sleep(0.05)
    assert decode.region.memory.tobytes() == before and decode.region.num_writes == 3
    assert not decode.complete and not decode.failed
    decode.region.scatter = scatter  # type: ignore[method-assign]
    again = whole(2, 64)
    again.receive(decode, "p0")
    await again.send(prefill, "d0")
    await until(lambda: 2 in decode.complete)
    again.check(prefill, decode)


@pytest.mark.parametrize("num_damaged", [1, 2])
async def test_damaged_payload_is_sent_again_and_a_second_time_ends_its_transfer_alone(
    site: Site, monkeypatch: pytest.MonkeyPatch, num_damaged: int
) -> None:
    prefill = await site.prefill()
    decode = await site.decode(prefill)
    honest, told = prefill.region.checksum, list[int]()

    def dishonest(payload: Buffer, algorithm: str) -> int:
        total = honest(payload, algorithm)
        if len(told) < 3 or (total == told[2] and told.count(total) < num_damaged):
            told.append(total)
            if len(told) > 2:
                damaged = prefill.region.read(payload).copy()
                damaged[7] ^= 1  # one bit, after the sum was taken
                prefill.region.write(payload, damaged)
        return total

    monkeypatch.setattr(prefill.region, "checksum", dishonest)
    hit, fine = whole(1, 30), Plan(2, (40, 41), (40, 41), 0, (SendRange(0, 2, 0, NUM_LAYERS),), 9)
    hit.receive(decode, "p0")
    await hit.send(prefill, "d0")
    if num_damaged == 1:
        await until(lambda: 1 in decode.complete and 1 in prefill.ended)
        hit.check(prefill, decode)
    else:
        await until(lambda: 1 in decode.failed and 1 in prefill.ended)
        assert "ChecksumMismatch" in decode.failed[1] and "ChecksumMismatch" in str(prefill.ended[1])
    fine.receive(decode, "p0")
    await fine.send(prefill, "d0")
    await until(lambda: 2 in decode.complete)
    fine.check(prefill, decode)
    assert decode.side.stats.num_corrupt_pieces == num_damaged


async def test_tags_are_random_and_never_used_twice(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    tags: list[int] = []
    take = sending.SendSide._take_credit

    def note(self: sending.SendSide, peer: sending._Peer, credit: Credit) -> None:
        tags.extend(credit.tags)
        take(self, peer, credit)

    monkeypatch.setattr(sending.SendSide, "_take_credit", note)
    prefill = await site.prefill()
    decode = await site.decode(prefill)
    for number in range(5):
        plan = whole(number, 64)
        plan.receive(decode, "p0")
        await plan.send(prefill, "d0")
        await until(lambda number=number: number in decode.complete)  # type: ignore[misc]
    assert len(tags) == len(set(tags)) > 20
    assert all(0 <= tag < 1 << 63 for tag in tags) and max(tags) > 1 << 55


async def test_lacking_credit_is_backpressure(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credits held back for a while delay a transfer and break nothing; no piece leaves without one."""
    prefill = await site.prefill()
    held: list[tuple[sending._Peer, Credit]] = []
    take = sending.SendSide._take_credit
    monkeypatch.setattr(sending.SendSide, "_take_credit", lambda self, peer, credit: held.append((peer, credit)))
    decode = await site.decode(prefill)
    plan = whole(1, 64)
    plan.receive(decode, "p0")
    await plan.send(prefill, "d0")
    await until(lambda: bool(held))
    await asyncio.sleep(0.1)
    assert prefill.side.stats.num_pieces == 0 and prefill.side.num_open == 1
    num_credits = 0
    while not decode.is_over(1):
        if held:
            peer, credit = held.pop(0)
            num_credits += len(credit.tags)
            take(prefill.side, peer, credit)
        await asyncio.sleep(0.003)
        assert prefill.side.stats.num_pieces <= num_credits
    plan.check(prefill, decode)


async def test_a_stuck_receiver_neither_starves_the_others_nor_stays(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = await site.prefill(config=replace(site.config, progress_s=0.5))
    stuck, fine = await site.decode(prefill, name="d0"), await site.decode(prefill, name="d1")
    endpoint = prefill.side._peers["d0"].endpoint
    never: list[Completion] = []

    def send_never(buffer: Buffer, tag: int) -> Completion:
        never.append(Completion())
        return never[-1]

    monkeypatch.setattr(endpoint, "send", send_never)
    for name, plan, decode in (("d0", whole(1, 64), stuck), ("d1", whole(2, 64), fine)):
        plan.receive(decode, "p0")
        await plan.send(prefill, name)
    await until(lambda: 2 in fine.complete)
    assert 1 not in prefill.ended  # long before the stuck one's budget is spent
    await until(lambda: 1 in prefill.ended and 1 in stuck.failed)
    assert "a piece made no progress" in str(prefill.ended[1])
    assert endpoint.lost.done()
    for completion in never:
        completion.finish(PeerLost("closed"))
    await until(lambda: prefill.side.slots == (4, 4))


async def test_transfers_take_turns(site: Site) -> None:
    """A short prompt behind a long one does not wait for the whole of it."""
    prefill = await site.prefill(num_blocks=600)
    decode = await site.decode(prefill, num_blocks=600)
    order: list[int] = []
    complete = decode.on_complete
    decode.side._on_complete = lambda i, t: (order.append(i), complete(i, t))[1]  # type: ignore[func-returns-value]
    long, short = whole(1, 500), Plan(2, (590,), (590,), 0, (SendRange(0, 1, 0, NUM_LAYERS),), 5)
    for plan in (long, short):
        plan.receive(decode, "p0")
        await plan.send(prefill, "d0")
    await until(lambda: len(order) == 2)
    assert order == [2, 1]


async def test_without_a_link_a_transfer_fails_soon_and_not_inside_the_call(site: Site) -> None:
    prefill = await site.prefill()
    decode = await site.decode(prefill)
    decode.side.open(1, "nobody", [1, 2], 0)
    decode.side.open(2, "nobody", [1, 2], 0)
    decode.side.abort(2, "never mind")
    assert decode.failed == {}
    await until(lambda: 1 in decode.failed)
    assert "no link with prefill worker nobody" in decode.failed[1]
    assert 2 not in decode.failed


async def test_an_abort_that_overtakes_the_opening_is_remembered(site: Site) -> None:
    prefill = await site.prefill()
    decode = await site.decode(prefill)
    prefill.side.abort(1, "client left")
    prefill.side.open(1, "d0", [1])
    decode.side.abort(2, "client left")
    decode.side.open(2, "p0", [1], 0)
    await until(lambda: 1 in prefill.ended and 2 in decode.failed)
    assert "client left" in str(prefill.ended[1]) and "client left" in decode.failed[2]
    prefill.side.open(3, "d0", [1, 2])
    whole(3, 2).receive(decode, "p0")
    await asyncio.sleep(0.02)
    prefill.side.abort(3, "declined")
    await until(lambda: 3 in decode.failed)
    assert decode.failed[3] == "sender: declined"
    for stats in (prefill.side.stats, decode.side.stats):
        assert (stats.num_transfers_failed, stats.num_transfers_cancelled) == (0, 2)


@pytest.mark.parametrize("who", ["sender", "receiver"])
async def test_what_is_called_off_is_no_failure_on_either_side_and_what_breaks_is(site: Site, who: str) -> None:
    prefill = await site.prefill(num_blocks=80)
    decode = await site.decode(prefill, num_blocks=80)
    for transfer_id in (1, 2, 3):
        prefill.side.open(transfer_id, "d0", [transfer_id])
        decode.side.open(transfer_id, "p0", [transfer_id], 0)
    await asyncio.sleep(0.02)
    for transfer_id in (1, 2):
        (prefill if who == "sender" else decode).side.abort(transfer_id, "its client left")
    sides = (prefill.side, decode.side)
    await until(lambda: all(side.stats.num_transfers_cancelled == 2 for side in sides))
    assert [side.stats.num_transfers_failed for side in sides] == [0, 0]
    prefill.side._peers["d0"].endpoint.abort("cable")
    await until(lambda: all(side.num_open == 0 for side in sides))
    counts = [(side.stats.num_transfers_failed, side.stats.num_transfers_cancelled) for side in sides]
    assert counts == [(1, 2), (1, 2)]


async def test_a_grant_that_no_prefill_follows_is_given_back(site: Site) -> None:
    prefill = await site.prefill(config=replace(site.config, grant_wait_s=0.2))
    decode = await site.decode(prefill)
    whole(1, 2).receive(decode, "p0")
    await until(lambda: 1 in decode.failed)
    assert "no prefill within 0.2 s" in decode.failed[1]
    assert prefill.ended == {}


async def test_a_prompt_that_begins_says_so_and_the_answer_is_its_grant(site: Site) -> None:
    prefill = await site.prefill()
    decode = await site.decode(prefill)
    sent = asyncio.create_task(whole(1, 2).send(prefill, "d0"))
    await until(lambda: decode.begun == [("p0", 1)])
    whole(1, 2).receive(decode, "p0")
    await until(lambda: 1 in decode.complete)
    await sent
    whole(2, 2).receive(decode, "p0")  # granted before it began: there is nothing to ask for
    await asyncio.sleep(0.02)
    await whole(2, 2).send(prefill, "d0")
    await until(lambda: 2 in decode.complete)
    assert decode.begun == [("p0", 1)]


async def test_a_prompt_that_began_without_a_link_says_so_on_the_next(site: Site) -> None:
    prefill = await site.prefill()
    sent = asyncio.create_task(whole(1, 2).send(prefill, "d0"))
    await asyncio.sleep(0.02)
    decode = await site.decode(prefill)
    await until(lambda: decode.begun == [("p0", 1)])
    whole(1, 2).receive(decode, "p0")
    await until(lambda: 1 in decode.complete)
    await sent


async def test_early_grants_are_bounded_and_the_oldest_is_given_back(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "MAX_EARLY_GRANTS", 3)
    prefill = await site.prefill()
    decode = await site.decode(prefill)
    for number in range(4):
        whole(number, 2).receive(decode, "p0")
    await until(lambda: 0 in decode.failed)
    assert "too many grants" in decode.failed[0]
    await whole(3, 2).send(prefill, "d0")
    await until(lambda: 3 in decode.complete)
    assert set(decode.failed) == {0}


async def test_closing_ends_every_transfer_once(site: Site) -> None:
    prefill = await site.prefill()
    decode = await site.decode(prefill)
    for number in range(3):
        whole(number, 2).receive(decode, "p0")
        prefill.side.open(number, "d0", [1, 2])
    await asyncio.sleep(0.02)
    await prefill.side.close()
    assert prefill.ended == dict.fromkeys(range(3), "sender closed")
    await until(lambda: set(decode.failed) == {0, 1, 2})
    decode.side.open(7, "p0", [1], 0)
    await decode.side.close()
    assert 7 in decode.failed and decode.side.links == ()


async def test_a_commit_that_no_grant_follows_ends(site: Site) -> None:
    prefill = await site.prefill(config=replace(site.config, grant_wait_s=0.2))
    await site.decode(prefill)
    prefill.side.open(1, "d0", [1, 2])
    await asyncio.sleep(0.4)
    assert prefill.ended == {}  # computing may take long; the wait counts from the commit
    prefill.side.commit(1, 5)
    await until(lambda: 1 in prefill.ended)
    assert "no grant within 0.2 s" in str(prefill.ended[1])


async def test_a_grant_of_another_size_ends_the_connection(site: Site) -> None:
    prefill = await site.prefill()
    decode = await site.decode(prefill)
    prefill.side.open(1, "d0", [1, 2, 3])
    decode.side.open(1, "p0", [1, 2], 0)
    await until(lambda: 1 in decode.failed and 1 in prefill.ended)
    assert "GRANT of 2 blocks" in str(prefill.ended[1])


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("tag", 12345, "tag that awaits none"),
        ("num_bytes", 3, "PIECE of 3 bytes"),
        ("first_block", 60, "outside the grant"),
        ("first_layer", 1, "outside the grant"),
    ],
)
async def test_a_malformed_piece_ends_the_connection_and_writes_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch, field: str, value: int, reason: str
) -> None:
    prefill = await site.prefill()
    decode = await site.decode(prefill)
    endpoint = prefill.side._peers["d0"].endpoint
    post = endpoint.post

    def tamper(message: PeerMessage) -> None:
        post(msgspec.structs.replace(message, **{field: value}) if isinstance(message, Piece) else message)

    monkeypatch.setattr(endpoint, "post", tamper)
    plan = whole(1, 4)
    plan.receive(decode, "p0")
    await plan.send(prefill, "d0")
    await until(lambda: 1 in decode.failed and 1 in prefill.ended)
    assert reason in decode.failed[1]
    assert decode.region.num_writes == 0
    monkeypatch.undo()
    await until(lambda: len(decode.side.links) == 1)  # dialled again
    fresh = whole(2, 4)
    fresh.receive(decode, "p0")
    await fresh.send(prefill, "d0")
    await until(lambda: 2 in decode.complete)


async def test_a_lost_link_fails_its_transfers_and_is_dialled_again(site: Site) -> None:
    prefill = await site.prefill()
    decode = await site.decode(prefill)
    whole(1, 4).receive(decode, "p0")
    prefill.side.open(1, "d0", [1, 2, 3, 4])
    prefill.side.open(2, "elsewhere", [5])
    await asyncio.sleep(0.02)
    prefill.side._peers["d0"].endpoint.abort("cable")
    await until(lambda: 1 in decode.failed and 1 in prefill.ended)
    assert "lost" in decode.failed[1] and "lost" in str(prefill.ended[1])
    assert 2 not in prefill.ended
    assert decode.side.links == ()
    await until(lambda: decode.side.links == (("p0", 1),))
    plan = whole(3, 64)
    plan.receive(decode, "p0")
    await plan.send(prefill, "d0")
    await until(lambda: 3 in decode.complete)
    plan.check(prefill, decode)


async def test_a_new_instance_replaces_the_old_one(site: Site) -> None:
    old, new = await site.prefill("p0", 1), await site.prefill("p0", 2)
    decode = await site.decode(old)
    whole(1, 4).receive(decode, "p0")
    decode.side.set_peers([new.address])
    await until(lambda: decode.side.links == (("p0", 2),))
    assert "lost" in decode.failed[1]
    plan = whole(2, 4)
    plan.receive(decode, "p0")
    await plan.send(new, "d0")
    await until(lambda: 2 in decode.complete)
    plan.check(new, decode)
    decode.side.set_peers([])
    await until(lambda: decode.side.links == ())


async def test_a_restarted_decode_replaces_its_old_endpoint(site: Site) -> None:
    prefill = await site.prefill()
    await site.decode(prefill, name="d0")
    prefill.side.open(1, "d0", [1, 2])
    again = await site.decode(prefill, name="d0")
    await until(lambda: 1 in prefill.ended)
    plan = whole(2, 4)
    await asyncio.sleep(0.02)
    if not again.side.links:
        await until(lambda: bool(again.side.links))
    plan.receive(again, "p0")
    await plan.send(prefill, "d0")
    await until(lambda: again.is_over(2))


async def test_another_model_is_not_linked_and_said_once(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    prefill = await site.prefill()
    fine = await site.decode(prefill, name="d0")
    with caplog.at_level(logging.ERROR, logger="kvtransfer.linking"):
        other = await site.decode(prefill, name="d1", layout=fingerprint(NUM_LAYERS, "other"))
        await until(lambda: bool(caplog.records))
        await asyncio.sleep(0.5)
    assert len(caplog.records) == 1 and "model_hash: other here, model there" in caplog.text
    assert other.side.links == ()
    plan = whole(1, 4)
    plan.receive(fine, "p0")
    await plan.send(prefill, "d0")
    await until(lambda: 1 in fine.complete)


@pytest.mark.parametrize("sender_slot_bytes", [4096, 8192, 65536])
async def test_sides_with_different_slots_agree(site: Site, sender_slot_bytes: int) -> None:
    """The smallest slot holds one layer of one block: pieces are cut within a block."""
    site.layout = fingerprint(num_layers=5, head_dim=32)
    assert site.layout.layer_bytes == 4096
    prefill = await site.prefill(config=replace(site.config, slot_bytes=sender_slot_bytes))
    decode = await site.decode(prefill)
    plan = Plan(1, tuple(range(20)), tuple(range(20, 40)), 3, (SendRange(0, 20, 0, 5),), 5)
    plan.receive(decode, "p0")
    await plan.send(prefill, "d0")
    await until(lambda: 1 in decode.complete)
    plan.check(prefill, decode)
    assert site.config.slot_bytes is not None
    num_layers_per_piece = min(sender_slot_bytes, site.config.slot_bytes) // 4096
    assert decode.side.stats.num_pieces == 17 * -(-5 // num_layers_per_piece)
