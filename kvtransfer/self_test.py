"""The self-test of a payload connection, before anyone may use it.

    Credit(tags) both ways ──► a small payload and a whole slot both ways ──► every byte, and the checksum, compared
                           ──► Tested both ways

It runs over the slots that the connection will use: device memory is tested as device memory, and what is slow once
(a connection's first use, mapping a peer's memory) is paid at registration and not by the first request.
"""

from __future__ import annotations

import asyncio
import secrets

import numpy as np
from numpy.typing import NDArray

from kvtransfer.slots import SlotStore
from kvtransfer.transport import Buffer, Endpoint
from protocol.errors import ProtocolError, TransferError
from protocol.wire import Credit, Tested

SMALL_BYTES = 64


async def run_self_test(endpoint: Endpoint, store: SlotStore) -> None:
    """Move payload both ways and compare it. The caller bounds the time, and aborts the endpoint on any error.

    Args:
        endpoint: fresh, nothing posted on it.
        store: this end's slots.

    Raises:
        TransferError: payload did not pass, or arrived damaged here or there, or its checksum is not what a CPU makes
            of it.
        ProtocolError: the peer says something else.
    """
    pool = store.pool(endpoint.agreement.kind)
    small = store.memory.new_slots(2, SMALL_BYTES, endpoint.agreement.kind)
    whole = pool.borrow(2)
    received, sent = (small[0], whole[0]), (small[1], whole[1])
    tags = tuple(secrets.randbits(63) for _ in received)
    arrivals = [endpoint.post_receive(buffer, tag) for buffer, tag in zip(received, tags, strict=True)]
    is_sent = False
    try:
        endpoint.post(Credit(tags=tags, slot_bytes=store.slot_bytes))
        theirs = await endpoint.receive()
        if not isinstance(theirs, Credit) or len(theirs.tags) != len(tags):
            raise ProtocolError(f"expected the self-test's Credit, got {type(theirs).__name__}")
        payloads = [
            _filled(store, slot[: min(slot.nbytes, num_bytes)], tag)
            for slot, num_bytes, tag in zip(sent, (SMALL_BYTES, theirs.slot_bytes), theirs.tags, strict=True)
        ]
        sends = [endpoint.send(payload, tag) for payload, tag in zip(payloads, theirs.tags, strict=True)]
        is_sent = True
        sends[1].add_done_callback(lambda _: pool.give(whole[1]))
        largest = max(theirs.slot_bytes, SMALL_BYTES)
        expected = [(buffer[: min(buffer.nbytes, largest)], tag) for buffer, tag in zip(received, tags, strict=True)]
        await _compared(endpoint, store, [*arrivals, *sends], expected)
    finally:
        # Not before it was compared: whoever takes it next writes to it.
        arrivals[1].add_done_callback(lambda _: pool.give(whole[0]))
        if not is_sent:
            pool.give(whole[1])


async def _compared(
    endpoint: Endpoint, store: SlotStore, moves: list[asyncio.Future[None]], expected: list[tuple[Buffer, int]]
) -> None:
    """Wait for all payload, compare what came with the patterns of its tags, and for the peer's word that it did so."""
    # Read on meanwhile: a peer that leaves now may show there only.
    word = asyncio.ensure_future(endpoint.receive())
    try:
        await asyncio.wait(moves)
        for done in moves:
            done.result()
        for payload, tag in expected:
            _compare(store, payload, tag, endpoint.agreement.checksum)
        # Each end has seen one direction. Who went on without the other's word would dial the same broken way for ever.
        endpoint.post(Tested())
        if not isinstance(said := await word, Tested):
            raise ProtocolError(f"expected Tested, got {type(said).__name__}")
    finally:
        if not word.cancel() and not word.cancelled():
            word.exception()  # the endpoint has told it


def _filled(store: SlotStore, slot: Buffer, tag: int) -> Buffer:
    store.memory.write(slot, pattern_of(slot.nbytes, tag))
    return slot


def _compare(store: SlotStore, payload: Buffer, tag: int, checksum: str) -> None:
    expected = pattern_of(payload.nbytes, tag)
    if not np.array_equal(store.memory.read(payload), expected):
        raise TransferError("self-test payload arrived damaged")
    if store.memory.checksum(payload, checksum) != store.memory.checksum(expected, checksum):
        raise TransferError(f"the checksum {checksum} of self-test payload is not the one that a CPU computes")


def pattern_of(num_bytes: int, tag: int) -> NDArray[np.uint8]:
    """Return bytes that only this tag has."""
    return np.resize(np.frombuffer(tag.to_bytes(8, "little") + b"baton", np.uint8), num_bytes)
