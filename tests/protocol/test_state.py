"""Leases, timelines, block names, fingerprints, end conditions."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from protocol.block_hash import block_hashes, next_block_hash, root_hash
from protocol.errors import FingerprintMismatch
from protocol.kv_layout import KVFingerprint
from protocol.lease import LeaseTable
from protocol.request import FinishReason, SamplingParams
from protocol.timeline import Timeline


def test_a_lease_runs_out_only_when_its_holder_does_not_renew() -> None:
    table = LeaseTable(ttl_s=3.0)
    table.grant(1, "a", 0.0)
    table.grant(2, "a", 1.0)
    table.grant(3, "b", 1.0)
    assert table.expire(4.0) == []
    table.renew("b", 4.0)
    assert table.expire(4.5) == [1, 2]
    assert 3 in table and 1 not in table and len(table) == 1
    assert table.expire(7.1) == [3]


def test_release_is_idempotent_and_granting_again_moves_the_key() -> None:
    table = LeaseTable(ttl_s=1.0)
    table.grant(1, "a", 0.0)
    table.grant(1, "b", 0.5)
    table.renew("a", 9.0)
    assert table.expire(2.0) == [1]
    table.release(1)
    table.release(1)
    assert len(table) == 0


def test_latencies_follow_from_the_events() -> None:
    timeline = Timeline(arrived_s=10.0)
    timeline.placed(10.1)
    assert timeline.token(10.5) is None
    assert timeline.token(10.75) == pytest.approx(0.25)
    assert timeline.token(11.5) == pytest.approx(0.75)
    assert timeline.tpot_s is None and timeline.e2e_s is None
    timeline.finished(11.5)
    assert timeline.ttft_s == pytest.approx(0.5)
    assert timeline.e2e_s == pytest.approx(1.5)
    assert timeline.tpot_s == pytest.approx(0.5)
    assert timeline.worst_gap_s == pytest.approx(0.75)


def test_one_token_has_no_tpot() -> None:
    timeline = Timeline(arrived_s=0.0)
    timeline.token(1.0)
    timeline.finished(1.0)
    assert timeline.tpot_s is None and timeline.ttft_s == 1.0


def test_block_names_chain_from_the_root_as_written_down() -> None:
    root = root_hash("model", "tenant")
    first = hashlib.sha256(root + np.array([1, 2], dtype="<u4").tobytes()).digest()
    second = hashlib.sha256(first + np.array([3, 4], dtype="<u4").tobytes()).digest()
    assert block_hashes([1, 2, 3, 4, 5], 2, root) == [first, second]
    assert next_block_hash(first, [3, 4]) == second
    assert block_hashes([1], 2, root) == []


def test_another_model_tenant_or_earlier_token_gives_other_names() -> None:
    tokens = list(range(32))
    names = block_hashes(tokens, 16, root_hash("m", "a"))
    assert names[1] != block_hashes([99, *tokens[1:]], 16, root_hash("m", "a"))[1]
    assert set(names).isdisjoint(block_hashes(tokens, 16, root_hash("m", "b")))
    assert set(names).isdisjoint(block_hashes(tokens, 16, root_hash("n", "a")))
    assert root_hash("ab", "c") != root_hash("a", "bc")


def test_fingerprints_name_what_differs() -> None:
    mine = KVFingerprint(model_hash="m", dtype="float32", block_size=16, num_layers=2, num_kv_heads=3, head_dim=64)
    mine.require_equal(mine, "peer")
    assert mine.layer_bytes == 2 * 3 * 16 * 64 * 4 and mine.block_bytes == 2 * mine.layer_bytes
    other = KVFingerprint(model_hash="m", dtype="bfloat16", block_size=32, num_layers=2, num_kv_heads=3, head_dim=64)
    with pytest.raises(FingerprintMismatch, match=r"p0 .*dtype: float32 here, bfloat16 there; block_size: 16"):
        mine.require_equal(other, "p0")


@pytest.mark.parametrize(
    ("token_id", "num_out", "room", "expected"),
    [
        (5, 1, 10, None),
        (2, 1, 10, None),
        (2, 2, 10, FinishReason.STOP),
        (7, 3, 10, FinishReason.STOP),
        (5, 4, 10, FinishReason.LENGTH),
        (5, 1, 0, FinishReason.LENGTH),
        (2, 4, 0, FinishReason.STOP),
    ],
)
def test_end_of_a_sequence(token_id: int, num_out: int, room: int, expected: FinishReason | None) -> None:
    sampling = SamplingParams(seed=0, max_tokens=4, min_tokens=2, stop_token_ids=(7,), eos_token_ids=(2,))
    assert sampling.finish_reason(token_id, num_out, room) is expected


def test_ignoring_eos_still_honours_stop_token_ids() -> None:
    sampling = SamplingParams(seed=0, max_tokens=9, ignore_eos=True, stop_token_ids=(7,), eos_token_ids=(2,))
    assert sampling.finish_reason(2, 1, 9) is None
    assert sampling.finish_reason(7, 1, 9) is FinishReason.STOP
