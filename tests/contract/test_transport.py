"""What every transport promises, see kvtransfer/transport.py."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import msgspec
import numpy as np
import pytest

from kvtransfer.transport import Endpoint, Identity
from protocol.errors import FingerprintMismatch, PeerLost, ProtocolError, TransferError
from protocol.wire import Credit, Grant, Landed, PeerAbort, PeerMessage
from tests.contract.workers import BUDGET_S, Site
from tests.kvtransfer.memory_region import fingerprint


def random_bytes(num_bytes: int, seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)


async def done(*completions: asyncio.Future[None]) -> None:
    await asyncio.wait(completions, timeout=BUDGET_S)
    for completion in completions:
        completion.result()


async def test_messages_keep_their_order_both_ways(site: Site) -> None:
    dialer, acceptor = await site.endpoints()
    for number in range(200):
        dialer.post(Grant(transfer_id=number, num_blocks=1, num_cached_blocks=0))
        acceptor.post(Landed(transfer_id=number))
    for number in range(200):
        assert await acceptor.receive() == Grant(transfer_id=number, num_blocks=1, num_cached_blocks=0)
        assert await dialer.receive() == Landed(transfer_id=number)


async def test_both_ends_know_each_other(site: Site) -> None:
    dialer, acceptor = await site.endpoints()
    assert (dialer.peer_id[0], dialer.peer_instance) == ("p", 1)
    assert (acceptor.peer_id[0], acceptor.peer_instance) == ("d", 2)


@pytest.mark.parametrize("num_bytes", [1, 100, 8192, 65536, 3 << 20])
async def test_payload_arrives_byte_for_byte_both_ways(site: Site, num_bytes: int) -> None:
    for source, target in (pair := await site.endpoints(), reversed(pair)):
        sent, received = random_bytes(num_bytes), np.zeros(num_bytes + 1, np.uint8)
        await done(target.post_receive(received, 7), source.send(sent, 7))
        assert (received[:-1] == sent).all() and received[-1] == 0


async def test_payload_finds_its_tag_whatever_the_order(site: Site) -> None:
    dialer, acceptor = await site.endpoints()
    tags = [(1 << 63) - 1 - n for n in range(30)]
    sent = {tag: random_bytes(20000, seed=n) for n, tag in enumerate(tags)}
    received = {tag: np.zeros(20000, np.uint8) for tag in tags}
    early = [dialer.post_receive(received[tag], tag) for tag in tags[:15]]
    sends = [acceptor.send(sent[tag], tag) for tag in reversed(tags)]
    await asyncio.sleep(0.02)
    late = [dialer.post_receive(received[tag], tag) for tag in tags[15:]]
    await done(*early, *late, *sends)
    assert all((received[tag] == sent[tag]).all() for tag in tags)


async def test_payload_longer_than_its_receive_is_an_error_of_the_receive_only(site: Site) -> None:
    dialer, acceptor = await site.endpoints()
    short = np.zeros(100, np.uint8)
    receiving = dialer.post_receive(short[:50], 1)
    sending = acceptor.send(random_bytes(100), 1)
    with pytest.raises(TransferError, match="receive"):
        await asyncio.wait_for(asyncio.shield(receiving), BUDGET_S)
    assert not short[50:].any()
    await asyncio.wait({sending}, timeout=BUDGET_S)
    later = np.zeros(100, np.uint8)
    await done(dialer.post_receive(later, 2), acceptor.send(random_bytes(100), 2))
    assert not dialer.lost.done()


async def test_a_cancelled_waiter_does_not_free_the_buffer(site: Site) -> None:
    dialer, acceptor = await site.endpoints()
    buffer = np.zeros(50000, np.uint8)
    completion = dialer.post_receive(buffer, 9)

    async def wait() -> None:
        await completion

    waiter = asyncio.create_task(wait())
    await asyncio.sleep(0)
    waiter.cancel()
    await asyncio.sleep(0.02)
    assert not completion.cancel()
    assert not completion.done() and not waiter.done()
    await done(acceptor.send(random_bytes(50000), 9), completion)
    assert (buffer == random_bytes(50000)).all()
    with pytest.raises(asyncio.CancelledError):
        await waiter


@pytest.mark.parametrize("who", [0, 1])
async def test_abort_ends_both_sides_and_every_completion(site: Site, who: int) -> None:
    ends = await site.endpoints()
    pending = [end.post_receive(np.zeros(1000, np.uint8), 100 + n) for n in range(4) for end in ends]
    readers = [asyncio.create_task(end.receive()) for end in ends]
    await asyncio.sleep(0.01)
    started_s = time.perf_counter()
    ends[who].abort("enough")
    ends[who].abort("again")
    assert await ends[who].lost == "enough"
    everything: list[asyncio.Future[Any]] = [*readers, *pending, *(end.lost for end in ends)]
    await asyncio.wait(everything, timeout=BUDGET_S)
    assert time.perf_counter() - started_s < 1
    for reader in readers:
        with pytest.raises(PeerLost):
            reader.result()
    for completion in [*pending, ends[1 - who].send(random_bytes(9), 1), ends[who].post_receive(random_bytes(9), 1)]:
        with pytest.raises(TransferError):
            await asyncio.wait_for(asyncio.shield(completion), BUDGET_S)
    ends[who].post(Landed(transfer_id=1))
    ends[1 - who].post(Landed(transfer_id=1))


@pytest.mark.parametrize("who", [0, 1])
async def test_abort_with_payload_in_flight_frees_every_buffer(site: Site, who: int) -> None:
    ends = await site.endpoints()
    big = 8 << 20
    receives = [ends[0].post_receive(np.zeros(big, np.uint8), n) for n in range(4)]
    sends = [ends[1].send(random_bytes(big), n) for n in range(6)]  # two without a receive
    readers = [asyncio.create_task(end.receive()) for end in ends]  # as everybody who has an endpoint does
    await asyncio.sleep(0.001)
    ends[who].abort("enough")
    everything: list[asyncio.Future[Any]] = [*receives, *sends, *readers]
    _, pending = await asyncio.wait(everything, timeout=2)
    assert not pending
    assert all(isinstance(reader.exception(), PeerLost) for reader in readers)


async def test_the_end_of_one_connection_leaves_the_others_alone(site: Site) -> None:
    """Tags are matched per worker and not per connection, and receives of one peer must survive another peer."""
    accepted: asyncio.Queue[Endpoint] = asyncio.Queue()
    listening, dialing = site.transport(), site.transport()
    listener = await listening.listen(Identity("p", 1, site.layout), accepted.put_nowait)
    pairs = []
    for number in range(3):
        dialer = await dialing.dial(listener.address, Identity(f"d{number}", 2, site.layout))
        pairs.append((dialer, await accepted.get()))
        site.bare.append(dialer)
    buffers = [np.zeros(30000, np.uint8) for _ in pairs]
    receives = [dialer.post_receive(b, 70 + n) for n, ((dialer, _), b) in enumerate(zip(pairs, buffers, strict=True))]
    pairs[0][0].abort("enough")
    await asyncio.wait({receives[0]}, timeout=BUDGET_S)
    await asyncio.wait({pairs[0][1].lost}, timeout=BUDGET_S)
    await asyncio.sleep(0.05)
    assert not receives[1].done() and not receives[2].done()
    for number in (1, 2):
        await done(pairs[number][1].send(random_bytes(30000), 70 + number), receives[number])
        assert (buffers[number] == random_bytes(30000)).all()
        pairs[number][0].post(Landed(transfer_id=number))
        assert await pairs[number][1].receive() == Landed(transfer_id=number)


async def test_close_delivers_messages_first(site: Site) -> None:
    dialer, acceptor = await site.endpoints()
    for number in range(50):
        dialer.post(Landed(transfer_id=number))
    closing = asyncio.create_task(dialer.close())
    for number in range(50):
        assert await acceptor.receive() == Landed(transfer_id=number)
    with pytest.raises(PeerLost):
        await acceptor.receive()
    await closing
    assert dialer.lost.done()


async def test_closing_the_listener_ends_its_connections_and_refuses_new_ones(site: Site) -> None:
    accepted: asyncio.Queue[Endpoint] = asyncio.Queue()
    listener = await site.transport().listen(Identity("p", 1, site.layout), accepted.put_nowait)
    dialing = site.transport()
    dialer = await dialing.dial(listener.address, Identity("d", 1, site.layout))
    await listener.close()
    with pytest.raises(PeerLost):
        await asyncio.wait_for(dialer.receive(), BUDGET_S)
    with pytest.raises(PeerLost):
        await dialing.dial(listener.address, Identity("d", 1, site.layout))


async def test_another_model_is_refused_with_a_reason_on_both_sides(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    accepted: asyncio.Queue[Endpoint] = asyncio.Queue()
    listener = await site.transport().listen(Identity("p", 1, fingerprint(3)), accepted.put_nowait)
    with caplog.at_level(logging.WARNING):
        with pytest.raises(FingerprintMismatch) as told:
            await site.transport().dial(listener.address, Identity("d", 1, fingerprint(4, "other")))
        await asyncio.sleep(0.05)
    assert "worker p" in str(told.value)
    assert "num_layers: 4 here, 3 there" in str(told.value)
    assert "model_hash: other here, model there" in str(told.value)
    assert "num_layers" in caplog.text
    assert accepted.empty()


@pytest.mark.parametrize("change", [{"worker_id": "q"}, {"instance": 2}])
async def test_another_worker_or_instance_at_the_address_is_refused(site: Site, change: dict[str, object]) -> None:
    accepted: asyncio.Queue[Endpoint] = asyncio.Queue()
    listener = await site.transport().listen(Identity("p", 1, site.layout), accepted.put_nowait)
    address = msgspec.structs.replace(listener.address, **change)
    with pytest.raises((ProtocolError, PeerLost), match="instance"):
        await site.transport().dial(address, Identity("d", 1, site.layout))
    assert accepted.empty()


async def test_long_words_pass_and_the_reader_may_be_cancelled(site: Site) -> None:
    dialer, acceptor = await site.endpoints()
    reader = asyncio.create_task(acceptor.receive())
    await asyncio.sleep(0)
    reader.cancel()
    await asyncio.wait({reader})
    messages: list[PeerMessage] = [
        PeerAbort(transfer_id=1, reason="x" * 4096),
        Credit(tags=tuple(range(4096)), slot_bytes=1),
    ]
    for message in messages:
        dialer.post(message)
    assert [await acceptor.receive() for _ in messages] == messages
