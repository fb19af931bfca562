"""Both steppers with a real (tiny) model: the hand-off changes no token, nor do batches, chunks or preemption."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from decode.scheduler import DecodeScheduler
from decode.stepper import (
    DecodeEmission,
    DecodeStepper,
    DropSequence,
    GaveWay,
    Granted,
    JoinBatch,
    NoRoom,
    ReserveBlocks,
    StepRows,
)
from engine.block_pool import BlockPool
from engine.kv_cache import KVCache
from engine.loading import LoadedModel
from engine.placement import refusal_of, sequence_of
from engine.runner import Runner
from prefill.scheduler import PrefillJob, PrefillScheduler
from prefill.stepper import (
    CellsReady,
    FirstTokenReady,
    PrefillEmission,
    PrefillStepper,
    Started,
    Submit,
    TransferEnded,
    layer_groups,
)
from protocol.request import FinishReason, SamplingParams
from protocol.wire import Prefill, Reserve
from tests.engine.tiny import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


class Pair:
    """A prefill and a decode stepper, and the copying in between, without threads or sockets."""

    def __init__(self, model: LoadedModel, *, chunk_tokens: int = 16, decode_blocks: int | None = None) -> None:
        self.model = model
        self.from_prefill: list[PrefillEmission] = []
        self.from_decode: list[DecodeEmission] = []
        self.prefill_kv, pool = model.new_kv_cache(), BlockPool(model.num_blocks)
        self.prefill = PrefillStepper(
            Runner(model.decoder, self.prefill_kv),
            pool,
            PrefillScheduler(pool, 8, chunk_tokens),
            self.from_prefill.append,
            block_size=8,
            layer_groups=layer_groups(4, 2),
            layer_push_min_tokens=8,
            max_model_len=model.max_model_len,
        )
        self.decode_kv = KVCache(model.fingerprint, decode_blocks or model.num_blocks, torch.device("cpu"))
        self.decode_pool = BlockPool(decode_blocks or model.num_blocks)
        scheduler = DecodeScheduler(self.decode_pool, 8, 16, 0)
        self.decode = DecodeStepper(
            Runner(model.decoder, self.decode_kv), self.decode_pool, scheduler, self.from_decode.append, 512
        )
        self.tokens: dict[int, list[int]] = {}
        self.reasons: dict[int, FinishReason | None] = {}

    def place(self, transfer_id: int, prompt: list[int], sampling: SamplingParams, emitted: list[int]) -> bool:
        """Prefill a prompt, copy what decode lacks, and let it join; False when decode has no room."""
        reserve = Reserve(
            request_id=transfer_id, transfer_id=transfer_id, epoch=1, prefill_worker_id="p", prompt=tuple(prompt),
            emitted=tuple(emitted), sampling=sampling,
        )  # fmt: skip
        self.decode.handle(ReserveBlocks(sequence_of(reserve, self.model), "p"))
        granted = self.from_decode.pop()
        if isinstance(granted, NoRoom):
            return False
        assert isinstance(granted, Granted)
        message = Prefill(
            request_id=transfer_id, transfer_id=transfer_id, epoch=1, decode_worker_id="d", prompt=tuple(prompt),
            sampling=sampling, deadline_s=1.0,
        )  # fmt: skip
        now_s = time.monotonic()
        self.prefill.handle(Submit(PrefillJob(sequence_of(message, self.model), "d", now_s, now_s + 1)))
        while self.prefill.step():
            pass
        first = self._copy(granted)
        self.tokens.setdefault(transfer_id, first if not emitted else list(emitted))
        self.prefill.handle(TransferEnded(transfer_id))
        self.decode.handle(JoinBatch(transfer_id, first[0]))
        return True

    def _copy(self, granted: Granted) -> list[int]:
        started, cells = None, []
        first: list[int] = []
        for emission in self.from_prefill:
            if isinstance(emission, Started):
                started = emission
            elif isinstance(emission, CellsReady):
                cells.append(emission.cells)
            elif isinstance(emission, FirstTokenReady):
                first.append(emission.row.token_id)
        self.from_prefill.clear()
        assert started is not None
        covered = np.zeros((len(started.block_ids), 4), dtype=int)
        for c in cells:
            blocks = range(c.first_block, c.first_block + c.num_blocks)
            covered[c.first_block : c.first_block + c.num_blocks, c.first_layer : c.first_layer + c.num_layers] += 1
            slab = np.zeros(c.num_blocks * c.num_layers * self.model.fingerprint.layer_bytes, np.uint8)
            self.prefill_kv.gather([started.block_ids[b] for b in blocks], c.first_layer, c.num_layers, slab)
            keep = [b for b in blocks if b >= granted.reserved.num_cached_blocks]
            rows = slab.reshape(c.num_blocks, -1)[c.num_blocks - len(keep) :]
            self.decode_kv.scatter(
                [granted.reserved.block_ids[b] for b in keep], c.first_layer, c.num_layers, rows.reshape(-1)
            )
        assert (covered == 1).all(), "every cell is announced exactly once"
        return first

    def run(self, num_steps: int = 10_000) -> list[int]:
        """Step decode until idle; return the transfers that gave way."""
        gave_way = []
        for _ in range(num_steps):
            if not self.decode.step():
                break
            for emission in self.from_decode:
                if isinstance(emission, GaveWay):
                    gave_way.append(emission.transfer_id)
                elif isinstance(emission, StepRows):
                    for transfer_id, row in emission.rows:
                        assert row.index == len(self.tokens[transfer_id])
                        self.tokens[transfer_id].append(row.token_id)
                        self.reasons[transfer_id] = row.finish_reason
            self.from_decode.clear()
        return gave_way


def _prompt(seed: int, length: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, 256, length)]


def _params(seed: int, max_tokens: int = 20, temperature: float = 0.0) -> SamplingParams:
    return SamplingParams(seed=seed, temperature=temperature, max_tokens=max_tokens)


def _reference(model: LoadedModel, prompt: list[int], sampling: SamplingParams) -> list[int]:
    pair = Pair(model, chunk_tokens=512)
    assert pair.place(1, prompt, sampling, [])
    pair.run()
    return pair.tokens[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_chunks_and_batches_change_no_token(model: LoadedModel, temperature: float) -> None:
    cases = {i: (_prompt(i, n), _params(i, temperature=temperature)) for i, n in enumerate([1, 7, 8, 9, 40, 100])}
    pair = Pair(model, chunk_tokens=11)
    for transfer_id, (prompt, sampling) in cases.items():
        assert pair.place(transfer_id, prompt, sampling, [])
        pair.run(num_steps=2)
    pair.run()
    for transfer_id, (prompt, sampling) in cases.items():
        assert pair.tokens[transfer_id] == _reference(model, prompt, sampling), transfer_id
        assert pair.reasons[transfer_id] is FinishReason.LENGTH
    pair.decode_pool.check(num_expected_leased=0)


def test_a_preempted_sequence_resumes_token_for_token(model: LoadedModel) -> None:
    cases = {i: (_prompt(10 + i, 20), _params(i, max_tokens=30, temperature=1.0)) for i in range(3)}
    pair = Pair(model, decode_blocks=14)
    waiting = list(cases)
    num_preempted = 0
    for _ in range(50):
        while waiting:
            transfer_id = waiting[0]
            if not pair.place(transfer_id, *cases[transfer_id], pair.tokens.get(transfer_id, [])):
                break
            waiting.pop(0)
        gave_way = pair.run()
        num_preempted += len(gave_way)
        waiting.extend(gave_way)
        if not waiting and not gave_way:
            break
    assert num_preempted > 0
    for transfer_id, (prompt, sampling) in cases.items():
        assert pair.tokens[transfer_id] == _reference(model, prompt, sampling)


def test_a_shared_prefix_is_computed_and_copied_once(model: LoadedModel) -> None:
    pair, shared = Pair(model), _prompt(30, 64)
    pair.place(1, shared + [5, 6, 7], _params(1), [])
    pair.run()
    before = pair.prefill.counters.num_computed_tokens
    assert pair.place(2, shared + [9, 10], _params(2), [])
    assert pair.prefill.counters.num_computed_tokens - before == 2
    pair.run()
    assert pair.tokens[2] == _reference(model, shared + [9, 10], _params(2))


def test_dropping_a_sequence_between_steps_frees_its_blocks(model: LoadedModel) -> None:
    pair = Pair(model)
    pair.place(1, _prompt(40, 30), _params(1), [])
    pair.run(num_steps=3)
    pair.decode.handle(DropSequence(1))
    pair.decode.handle(DropSequence(1))
    assert not pair.decode.step()
    assert pair.decode.pool_counts.leased == 0


def test_layer_groups_cover_every_layer_once() -> None:
    assert layer_groups(30, 3) == [(0, 10), (10, 10), (20, 10)]
    assert layer_groups(2, 5) == [(0, 1), (1, 1)]
    assert layer_groups(7, 3) == [(0, 2), (2, 2), (4, 3)]


@pytest.mark.parametrize(
    ("prompt", "sampling", "words"),
    [
        ((), _params(0), "0 tokens"),
        ((1,) * 512, _params(0), "512 tokens"),
        ((1, 256), _params(0), "token id 256"),
        ((1,), SamplingParams(seed=0, logit_bias=((300, 1.0),)), "token id 300"),
        ((1,), SamplingParams(seed=0, stop_token_ids=(999,)), "token id 999"),
        ((1, 2), _params(0), None),
    ],
)
def test_a_worker_refuses_what_would_break_it(
    model: LoadedModel, prompt: tuple[int, ...], sampling: SamplingParams, words: str | None
) -> None:
    message = Prefill(
        request_id=1, transfer_id=1, epoch=1, decode_worker_id=None, prompt=prompt, sampling=sampling, deadline_s=1.0
    )
    refusal = refusal_of(message, model)
    assert refusal is None if words is None else words in str(refusal)
