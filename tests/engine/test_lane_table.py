"""Lanes of the decode batch: dense, apart, and in the smallest batch size that covers them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.lane_table import LaneTable, bucket_sizes


@pytest.mark.parametrize(
    ("max_lanes", "expected"),
    [
        (1, (1,)),
        (6, (1, 2, 4, 6)),
        (64, (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)),
        (150, (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 150)),
    ],
)
def test_batch_sizes_end_with_the_largest_batch(max_lanes: int, expected: tuple[int, ...]) -> None:
    assert bucket_sizes(max_lanes) == expected


def test_holes_are_filled_first_and_lanes_move_only_for_a_smaller_batch() -> None:
    table = LaneTable(16)
    assert [table.assign(i) for i in range(9)] == list(range(9)) and table.bucket() == 12
    assert table.release(3) == 3
    moves = table.compact()
    assert [(m.source, m.target) for m in moves] == [(8, 3)] and table.lane(8) == 3 and table.bucket() == 8
    table.release(0)
    assert table.compact() == [], "seven lanes need the batch of eight all the same"
    assert table.assign(100) == 0


@given(st.lists(st.tuples(st.sampled_from(["join", "leave", "compact"]), st.integers(0, 1 << 16)), max_size=200))
def test_no_two_placements_share_a_lane_and_moves_are_disjoint(events: list[tuple[str, int]]) -> None:
    table = LaneTable(20)
    lanes: dict[int, int] = {}
    for number, (kind, pick) in enumerate(events):
        if kind == "join" and len(lanes) < 20:
            lanes[number] = table.assign(number)
        elif kind == "leave" and lanes:
            gone = sorted(lanes)[pick % len(lanes)]
            assert table.release(gone) == lanes.pop(gone)
        elif kind == "compact":
            moves = table.compact()
            sources, targets = {m.source for m in moves}, {m.target for m in moves}
            assert not sources & targets and sources <= set(lanes.values()) and not targets & set(lanes.values())
            by_source = {m.source: m.target for m in moves}
            lanes = {i: by_source.get(lane, lane) for i, lane in lanes.items()}
        assert len(set(lanes.values())) == len(lanes) == len(table)
        assert all(table.lane(i) == lane for i, lane in lanes.items())
        assert all(lane < table.bucket() for lane in lanes.values())
        assert sorted(table.others([])) == sorted(lanes)
