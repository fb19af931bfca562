"""Channels inside one process keep the promises of those over the network."""

from __future__ import annotations

import asyncio

import pytest

from protocol.errors import PeerLost
from protocol.local_channel import MAX_QUEUED_MESSAGES, LocalChannel, dial_local, listen, local_pair
from protocol.wire import Abort, Drain, Pulse


async def test_messages_arrive_in_order_and_close_lets_them_be_read() -> None:
    one, other = local_pair()
    for i in range(3):
        one.post(Abort(transfer_id=i, reason=""))
    await one.close()
    assert [await other.receive() for _ in range(3)] == [Abort(transfer_id=i, reason="") for i in range(3)]
    for end in (other, other, one):
        with pytest.raises(PeerLost):
            await end.receive()
    assert one.is_lost and other.is_lost
    one.post(Drain())
    other.post(Drain())


async def test_abort_drops_what_is_queued_and_wakes_both_readers() -> None:
    one, other = local_pair()
    other.post(Pulse())
    assert await one.receive() == Pulse()
    reading = asyncio.create_task(one.receive())
    await asyncio.sleep(0)
    one.post(Drain())
    other.abort("enough")
    other.abort("said before")
    with pytest.raises(PeerLost, match="closed by peer: enough"):
        await reading
    with pytest.raises(PeerLost, match="enough"):
        await other.receive()


async def test_a_cancelled_receive_loses_nothing() -> None:
    one, other = local_pair()
    reading = asyncio.create_task(other.receive())
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    one.post(Drain())
    assert await other.receive() == Drain()


async def test_who_does_not_read_is_cut() -> None:
    one, other = local_pair()
    for _ in range(MAX_QUEUED_MESSAGES + 1):
        one.post(Pulse())
    assert one.is_lost and other.is_lost
    with pytest.raises(PeerLost, match="does not read"):
        await other.receive()


async def test_dialling_finds_who_listens() -> None:
    accepted: list[LocalChannel] = []
    end = listen("inproc://here", accepted.append)
    dial_local("inproc://here").post(Drain())
    assert await accepted[0].receive() == Drain()
    end()
    with pytest.raises(PeerLost, match="nobody listens"):
        dial_local("inproc://here")
