"""What the codec carries, and what it refuses."""

from __future__ import annotations

import msgpack
import msgspec
import numpy as np
import pytest

from protocol import wire
from protocol.errors import ProtocolError
from protocol.kv_layout import KVFingerprint
from protocol.readout import Pooling, PromptLogprobs, ReadEmbedding, ReadLabels, ReadPrompt, does_answer, floats_of
from protocol.request import FinishReason, SamplingParams, TokenLogprobs, TokenRow

FINGERPRINT = KVFingerprint(model_hash="m", dtype="float32", block_size=16, num_layers=30, num_kv_heads=3, head_dim=64)
SAMPLING = SamplingParams(seed=7, temperature=0.5, logit_bias=((3, -1.5),), stop_token_ids=(4,), num_logprobs=2)
ADDRESS = wire.PeerAddress(worker_id="p0", instance=9, transport="ucx", host="127.0.0.1", port=4000)

MESSAGES = [
    wire.Challenge(version=1, nonce=b"n" * 32),
    wire.Proof(version=1, nonce=b"n" * 32, mac=b"m" * 32),
    wire.Accept(mac=b"m" * 32),
    wire.Register(
        worker_id="p0",
        instance=1,
        role=wire.Role.PREFILL,
        fingerprint=FINGERPRINT,
        num_blocks=10,
        max_num_seqs=4,
        max_model_len=100,
        address=ADDRESS,
    ),
    wire.Heartbeat(progress=5, has_work=True, stats=wire.WorkerStats(blocks_free=3, transfer_s=0.5)),
    wire.Links(peers=(("p0", 9),)),
    wire.FirstToken(
        transfer_id=1,
        row=TokenRow(1, 2, 0, 17, None, TokenLogprobs(-0.5, ((17, -0.5),), 1)),
        num_cached_tokens=0,
        queue_s=0.1,
        prefill_s=0.2,
    ),
    wire.Readings(transfer_id=1, labels=(-0.5, float("-inf")), num_cached_tokens=4, queue_s=0.0, prefill_s=0.5),
    wire.Readings(
        transfer_id=1,
        prompt=PromptLogprobs.of(0, b"12345678", b"abcdefgh"),
        num_cached_tokens=0,
        queue_s=0,
        prefill_s=0,
    ),
    wire.Readings(transfer_id=1, embedding=b"12345678", num_cached_tokens=0, queue_s=0, prefill_s=0),
    wire.Begin(transfer_id=1),
    wire.Tokens(rows=(TokenRow(1, 2, 3, 4), TokenRow(1, 2, 4, 5, FinishReason.STOP))),
    wire.Declined(transfer_id=1, reason="full"),
    wire.Preempted(transfer_id=1),
    wire.TransferFailed(transfer_id=1, reason="gone"),
    wire.GrammarFailed(transfer_id=1, reason="gone"),
    wire.Welcome(router_id="r", heartbeat_s=0.5, lease_ttl_s=3.0),
    wire.Dismissed(reason="no", is_final=True),
    wire.Pulse(),
    wire.Members(peers=(ADDRESS,)),
    wire.Reserve(
        request_id=1, transfer_id=2, epoch=1, prefill_worker_id="p0", prompt=(1, 2, 3), emitted=(4,), sampling=SAMPLING
    ),
    wire.Prefill(
        request_id=1, transfer_id=2, epoch=1, decode_worker_id=None, prompt=(1, 2), sampling=SAMPLING, deadline_s=1.0
    ),
    *(
        wire.Prefill(
            request_id=1,
            transfer_id=2,
            epoch=1,
            decode_worker_id=None,
            prompt=(1,),
            sampling=SAMPLING,
            deadline_s=1.0,
            readout=readout,
        )
        for readout in (
            ReadLabels(token_ids=(5, 6)),
            ReadPrompt(num_top=3),
            ReadEmbedding(pooling=Pooling.MEAN, normalize=False),
        )
    ),
    wire.Abort(transfer_id=1, reason="client left"),
    wire.Drain(),
    wire.PeerHello(worker_id="d0", instance=2, fingerprint=FINGERPRINT),
    wire.PeerReady(worker_id="p0", instance=1, payload_host="10.0.0.1"),
    wire.PeerPath(way="tcp,self", worker=b"w" * 200, host="10.0.0.2", proof=b"p" * 32),
    wire.PeerRefused(reason="no"),
    wire.Tested(),
    wire.Credit(tags=(1, (1 << 63) - 1), slot_bytes=4096),
    wire.Grant(transfer_id=1, num_blocks=4, num_cached_blocks=2),
    wire.Piece(
        transfer_id=1,
        tag=3,
        first_block=0,
        num_blocks=1,
        first_layer=0,
        num_layers=2,
        num_bytes=10,
        checksum=(1 << 64) - 1,
    ),
    wire.Commit(transfer_id=1, num_blocks=4, first_token_id=5),
    wire.Landed(transfer_id=1),
    wire.Resend(transfer_id=1, first_block=0, num_blocks=2, first_layer=0, num_layers=3),
    wire.PeerAbort(transfer_id=1, reason="late"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_every_message_survives_the_round_trip(message: wire.Message) -> None:
    assert wire.decode(wire.encode(message)) == message


def test_the_list_above_covers_every_message_type() -> None:
    assert {type(m) for m in MESSAGES} == set(wire.AnyMessage.__args__)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"hello",
        msgpack.packb([1, 2]),
        msgpack.packb({"type": "Unknown"}),
        msgpack.packb({"type": "Landed"}),
        msgpack.packb({"type": "Landed", "transfer_id": -1}),
        msgpack.packb({"type": "Landed", "transfer_id": True}),
        msgpack.packb({"type": "Landed", "transfer_id": 1 << 63}),
        msgpack.packb({"type": "Landed", "transfer_id": "1"}),
        msgpack.packb({"type": "Accept", "mac": b"short"}),
        msgpack.packb({"type": "Abort", "transfer_id": 1, "reason": "x" * 5000}),
        msgpack.packb({"type": "Landed", "transfer_id": msgpack.ExtType(1, b"x")}),
        msgpack.packb({1: "Landed"}),
        msgpack.packb({"type": "Abort", "transfer_id": 1, "reason": "x" * (wire.MAX_STRING_BYTES + 1)}),
        b"\x91" * 2000 + b"\x01",
        b"\xdd\xff\xff\xff\xff",
        wire.encode(wire.Landed(transfer_id=1)) + b"\x00",
    ],
    ids=lambda data: repr(data[:24]),
)
def test_malformed_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        wire.decode(data)


def test_unknown_fields_are_ignored_so_that_a_newer_peer_can_add_one() -> None:
    plain = msgspec.to_builtins(wire.Landed(transfer_id=4)) | {"added_later": 1}
    assert wire.decode(msgpack.packb(plain)) == wire.Landed(transfer_id=4)


def test_a_message_over_the_size_limit_is_refused_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    data = wire.encode(wire.Abort(transfer_id=1, reason="x" * 200))
    monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 100)
    with pytest.raises(ProtocolError, match="exceeds"):
        wire.encode(wire.Abort(transfer_id=1, reason="x" * 200))
    with pytest.raises(ProtocolError, match="exceeds"):
        wire.decode(data)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.5), ("max_tokens", 0), ("seed", -1), ("num_logprobs", 21)],
)
def test_sampling_out_of_bounds_is_refused(field: str, value: float) -> None:
    plain = msgspec.to_builtins(next(m for m in MESSAGES if isinstance(m, wire.Reserve)))
    plain["sampling"][field] = value
    with pytest.raises(ProtocolError, match=field):
        wire.decode(msgpack.packb(plain))


def test_rows_of_a_prompt_are_cut_and_joined_as_they_were() -> None:
    values, integers = np.arange(60_000, dtype="<f4") / 8, np.arange(60_000, dtype="<i4")
    packed = PromptLogprobs.of(2, values.tobytes(), integers.tobytes())
    assert len(packed.values) > 1 and packed.num_rows == 20_000
    rows = packed.rows()
    assert rows[1] == TokenLogprobs(3 / 8, ((4, 4 / 8), (5, 5 / 8)), 3) and len(rows) == 20_000
    assert does_answer(ReadPrompt(num_top=2), 20_001, (), packed, b"")
    assert not does_answer(ReadPrompt(num_top=2), 20_000, (), packed, b"")
    assert not does_answer(ReadPrompt(), 3, (), PromptLogprobs.of(0, b"1234" * 2, b"1234"), b"")
    with pytest.raises(ValueError, match="rows of 2"):
        PromptLogprobs.of(1, b"1234" * 3, b"1234" * 3).rows()


def test_an_answer_must_be_of_the_kind_that_was_asked_for() -> None:
    labels = ReadLabels(token_ids=(1, 2))
    assert does_answer(labels, 5, (-0.1, float("-inf")), None, b"")
    assert not does_answer(labels, 5, (-0.1,), None, b"")
    assert not does_answer(labels, 5, (-0.1, float("nan")), None, b"")
    assert not does_answer(ReadEmbedding(pooling=Pooling.LAST), 5, (), None, b"")
    assert floats_of(np.array([0.5, -2.0], "<f4").tobytes()) == [0.5, -2.0]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_the_bytes_are_those_of_plain_messagepack(message: wire.Message) -> None:
    plain = msgspec.to_builtins(message, builtin_types=(bytes,))
    assert wire.encode(message) == msgpack.packb(plain, use_bin_type=True)
