"""Steps launched before their predecessors are known: the tokens stay the same, and no block goes back too early."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from decode.scheduler import DecodeScheduler
from decode.stepper import DecodeStepper, DropSequence
from engine.block_pool import BlockPool
from engine.decode_runner import LaneDecodeRunner, LaneStep
from engine.execution import lane_sizes
from engine.kv_cache import KVCache
from engine.lane_state import LaneState
from engine.loading import LoadedModel
from engine.runner import DeviceRunner
from model.torch_decoder import TorchDecoder
from prefill.scheduler import PrefillScheduler
from prefill.stepper import PrefillStepper, layer_groups
from protocol.request import FinishReason, SamplingParams
from tests.decode.pair import Pair, params, prompt_of
from tests.engine.late_queue import LateQueue
from tests.engine.tiny import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"), kernels="torch")


class AheadPair(Pair):
    """A pair whose steps are in flight for a while: the classes that a GPU gets, over a CPU queue that tells late."""

    def __init__(self, model: LoadedModel, *, decode_blocks: int | None = None, max_lanes: int = 16) -> None:
        super().__init__(model, decode_blocks=decode_blocks)
        decoder = model.decoder
        assert isinstance(decoder, TorchDecoder)
        num_blocks = decode_blocks or model.num_blocks
        self.decode_pool = BlockPool(num_blocks)
        self.decode_kv = KVCache(model.fingerprint, num_blocks, model.device)
        sizes, queue = replace(lane_sizes(model, max_lanes), num_biases=4, num_endings=4), LateQueue()
        self.state = LaneState(sizes, queue)
        self.runner = LaneDecodeRunner(LaneStep(decoder, self.decode_kv, self.state, sizes), self.state, sizes, queue)
        scheduler = DecodeScheduler(self.decode_pool, 8, max_lanes, 0, 512, self.runner.growth_blocks)
        self.decode = DecodeStepper(self.runner, self.decode_pool, scheduler, self.from_decode.append)
        prefill_pool = BlockPool(model.num_blocks)
        self.prefill = PrefillStepper(
            DeviceRunner(decoder, self.prefill_kv, LateQueue()),
            prefill_pool,
            PrefillScheduler(prefill_pool, 8, 16),
            self.from_prefill.append,
            block_size=8,
            layer_groups=layer_groups(4, 2),
            layer_push_min_tokens=8,
            max_model_len=model.max_model_len,
        )


def _cases() -> dict[int, tuple[list[int], SamplingParams]]:
    lengths = [1, 7, 8, 9, 40, 100]
    kinds = [
        params(0),
        params(1, temperature=1.0),
        SamplingParams(seed=2, temperature=0.7, top_k=5, max_tokens=33),
        SamplingParams(seed=3, temperature=1.3, top_p=0.6, max_tokens=9, num_logprobs=3),
        SamplingParams(
            seed=4, temperature=1.0, repetition_penalty=1.4, frequency_penalty=0.5, presence_penalty=0.5, max_tokens=40
        ),
        SamplingParams(
            seed=5, temperature=0.0, logit_bias=((9, 30.0),), min_tokens=5, stop_token_ids=(9,), max_tokens=30
        ),
    ]
    return {i: (prompt_of(i, n), kind) for i, (n, kind) in enumerate(zip(lengths, kinds, strict=True))}


def _alone(model: LoadedModel, prompt: list[int], sampling: SamplingParams) -> tuple[list[int], FinishReason | None]:
    pair = Pair(model, chunk_tokens=512)
    assert pair.place(1, prompt, sampling, [])
    pair.run()
    return pair.tokens[1], pair.reasons[1]


def test_tokens_are_those_of_the_runner_that_waits_for_each_step(model: LoadedModel) -> None:
    pair = AheadPair(model)
    for transfer_id, (prompt, sampling) in _cases().items():
        assert pair.place(transfer_id, prompt, sampling, [])
        pair.run(num_steps=5)
    pair.run()
    for transfer_id, (prompt, sampling) in _cases().items():
        tokens, reason = _alone(model, prompt, sampling)
        assert pair.tokens[transfer_id] == tokens, transfer_id
        assert pair.reasons[transfer_id] is reason
    assert pair.reasons[5] is FinishReason.STOP and len(pair.tokens[5]) == 6
    pair.decode_pool.check(num_expected_leased=0)


def test_log_probabilities_arrive_with_their_tokens(model: LoadedModel) -> None:
    sampling = SamplingParams(seed=3, temperature=1.0, max_tokens=12, num_logprobs=4)
    ahead, plain = AheadPair(model), Pair(model)
    for pair in (ahead, plain):
        pair.place(1, prompt_of(1, 20), sampling, [])
        pair.run()
    assert [r.token_id for r in ahead.rows[1]] == [r.token_id for r in plain.rows[1]]
    for got, expected in zip(ahead.rows[1], plain.rows[1], strict=True):
        assert got.logprobs is not None and expected.logprobs is not None
        assert got.logprobs.rank == expected.logprobs.rank
        assert got.logprobs.logprob == pytest.approx(expected.logprobs.logprob, abs=1e-5)
        assert [t for t, _ in got.logprobs.top] == [t for t, _ in expected.logprobs.top]


def test_a_resumed_sequence_replays_on_the_device(model: LoadedModel) -> None:
    for prompt, sampling in _cases().values():
        tokens, _ = _alone(model, prompt, sampling)
        pair = AheadPair(model)
        emitted = tokens[: len(tokens) * 2 // 3]
        assert pair.place(1, prompt, sampling, emitted)
        pair.run()
        assert pair.tokens[1] == tokens


def test_a_preempted_sequence_resumes_token_for_token(model: LoadedModel) -> None:
    cases = {i: (prompt_of(10 + i, 20), params(i, max_tokens=60, temperature=1.0)) for i in range(3)}
    pair = AheadPair(model, decode_blocks=20)
    waiting, num_preempted = list(cases), 0
    for _ in range(50):
        while waiting and pair.place(waiting[0], *cases[waiting[0]], pair.tokens.get(waiting[0], [])):
            waiting.pop(0)
        gave_way = pair.run()
        num_preempted += len(gave_way)
        waiting.extend(gave_way)
        if not waiting:
            break
    assert num_preempted > 0
    for transfer_id, (prompt, sampling) in cases.items():
        assert pair.tokens[transfer_id] == _alone(model, prompt, sampling)[0]
    pair.decode_pool.check(num_expected_leased=0)


def test_blocks_of_a_dropped_sequence_stay_leased_while_a_step_with_it_is_in_flight(model: LoadedModel) -> None:
    pair = AheadPair(model)
    pair.place(1, prompt_of(40, 30), params(1, max_tokens=50), [])
    pair.decode.step()
    assert pair.decode.is_waiting
    pair.decode.handle(DropSequence(1))
    assert pair.decode.pool_counts.leased > 0
    pair.run()
    assert pair.decode.pool_counts.leased == 0


def test_sequences_coming_and_going_keep_their_lanes_apart(model: LoadedModel) -> None:
    """Lanes are freed in the middle, moved and taken again; every stream equals the one it has alone."""
    cases = {i: (prompt_of(i, 5 + i), params(i, max_tokens=4 + (i * 7) % 23, temperature=0.9)) for i in range(24)}
    pair = AheadPair(model, max_lanes=12)
    waiting = list(cases)
    while waiting:
        while waiting and pair.place(waiting[0], *cases[waiting[0]], []):
            waiting.pop(0)
        pair.run(num_steps=4)
    pair.run()
    for transfer_id, (prompt, sampling) in cases.items():
        assert pair.tokens[transfer_id] == _alone(model, prompt, sampling)[0], transfer_id
    pair.decode_pool.check(num_expected_leased=0)


def test_the_device_is_written_to_only_when_membership_or_tables_change(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = AheadPair(model)
    pair.place(1, prompt_of(1, 20), params(1, max_tokens=60), [])
    pair.run(num_steps=4)
    num_uploads = 0
    upload = LateQueue.upload

    def counted(self: LateQueue, array: np.ndarray[Any, Any]) -> Tensor:
        nonlocal num_uploads
        num_uploads += 1
        return upload(self, array)

    monkeypatch.setattr(LateQueue, "upload", counted)
    pair.run()
    # 60 tokens take 8 blocks of 8: one write of a table (ids and rows) while the sequence grows, none for a step.
    assert len(pair.tokens[1]) == 60 and num_uploads <= 4
