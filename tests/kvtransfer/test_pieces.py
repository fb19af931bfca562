"""Cutting ranges into pieces, and the slots and tombstones around them."""

from __future__ import annotations

import asyncio
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer import tombstones
from kvtransfer.config import TransferConfig
from kvtransfer.pieces import cut, require_slot_holds_layer
from kvtransfer.sending import SendSide
from kvtransfer.slots import Slots
from kvtransfer.tombstones import Ending, Tombstones
from kvtransfer.transport import Completion
from protocol.errors import ConfigError, TransferError
from protocol.handoff import SendRange
from protocol.kv_layout import HostSlots
from tests.kvtransfer.memory_region import MemoryRegion, fingerprint


def cells_of(piece: SendRange) -> set[tuple[int, int]]:
    return {
        (block, layer)
        for block in range(piece.first_block, piece.first_block + piece.num_blocks)
        for layer in range(piece.first_layer, piece.first_layer + piece.num_layers)
    }


@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5), st.integers(1, 9)), min_size=1, max_size=4),
    max_cells=st.integers(1, 40),
)
def test_pieces_cover_every_cell_once_and_fit_a_slot(shapes: list[tuple[int, int, int]], max_cells: int) -> None:
    ranges, wanted = deque[SendRange](), set()
    for number, (num_blocks, first_layer, num_layers) in enumerate(shapes):
        ranges.append(SendRange(100 * number, num_blocks, first_layer, num_layers))
        wanted |= cells_of(ranges[-1])
    covered: set[tuple[int, int]] = set()
    while ranges:
        piece = cut(ranges, max_cells)
        cells = cells_of(piece)
        assert 0 < len(cells) <= max_cells
        assert piece.num_blocks == 1 or max_cells >= piece.num_layers
        assert not cells & covered
        covered |= cells
    assert covered == wanted


def test_pieces_are_as_large_as_the_slot_allows() -> None:
    ranges = deque([SendRange(0, 10, 0, 4)])
    assert [cut(ranges, 12) for _ in range(4)] == [SendRange(b, min(3, 10 - b), 0, 4) for b in (0, 3, 6, 9)]
    ranges = deque([SendRange(5, 2, 1, 7)])
    expected = [(5, 1, 3), (5, 4, 3), (5, 7, 1), (6, 1, 3), (6, 4, 3), (6, 7, 1)]
    assert [cut(ranges, 3) for _ in expected] == [SendRange(b, 1, layer, n) for b, layer, n in expected]


def test_a_slot_too_small_for_one_layer_of_a_block_is_a_configuration_error() -> None:
    region = MemoryRegion(fingerprint(head_dim=64), 2)
    assert region.fingerprint.layer_bytes == 8192
    with pytest.raises(ConfigError, match=r"slot_bytes 4096 .* \(8192 bytes\)"):
        SendSide(region, TransferConfig(slot_bytes=4096), lambda transfer_id, reason: None)
    require_slot_holds_layer(8192, 8192)


def test_slots_are_lent_and_resized() -> None:
    slots = Slots(HostSlots(), "host", 4096, 2)
    first, second = slots.take(), slots.take()
    assert first is not None and second is not None and slots.take() is None
    slots.resize(3)
    assert (slots.num_free, slots.num_total) == (1, 3)
    slots.resize(0)
    assert (slots.num_free, slots.num_total) == (0, 2)  # the lent ones stay until they come back
    slots.give(first)
    slots.give(second)
    assert slots.take() is second  # warm in cache
    slots.resize(0)
    assert (slots.num_free, slots.num_total) == (0, 1)


async def test_tombstones_keep_the_first_ending_and_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tombstones, "MAX_TOMBSTONES", 3)
    gone = Tombstones(0.05)
    first = Ending("first", is_failure=False)
    gone.add(1, first)
    gone.add(1, Ending("second"))
    assert gone.ending(1) == first and gone.ending(2) is None and 1 in gone
    for transfer_id in range(2, 5):
        gone.add(transfer_id, Ending(""))
    assert 1 not in gone and len(gone) == 3
    await asyncio.sleep(0.06)
    gone.add(9, Ending(""))
    gone.expire()
    assert len(gone) == 1 and 9 in gone


async def test_a_completion_is_finished_once_and_never_cancelled() -> None:
    done = Completion()
    assert not done.cancel() and not done.done()
    done.finish(TransferError("broken"))
    done.finish()
    with pytest.raises(TransferError, match="broken"):
        await done
