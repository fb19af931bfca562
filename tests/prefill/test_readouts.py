"""What prefill workers read off prompts, against one plain forward in float32; and how readouts queue."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.grammar import GrammarSettled
from engine.loading import LoadedModel, load
from engine.placement import refusal_of, sequence_of
from engine.runner import BatchRunner, DeviceRunner, Runner
from engine.sequence import Sequence
from model.batch import ForwardBatch
from model.source import resolve
from model.torch_decoder import TorchDecoder
from prefill.scheduler import MAX_LOGIT_ROWS, PrefillJob, PrefillScheduler
from prefill.self_test import PromptPace
from prefill.stepper import (
    AbortJob,
    FirstTokenReady,
    Measure,
    PrefillEmission,
    PrefillStepper,
    ReadingsReady,
    Submit,
)
from protocol.block_hash import block_hashes, root_hash
from protocol.readout import Pooling, ReadEmbedding, ReadLabels, Readout, ReadPrompt
from protocol.request import SamplingParams
from protocol.wire import Prefill
from tests.engine.late_queue import LateQueue
from tests.engine.tiny import tiny_model

SAMPLING = SamplingParams(seed=0, max_tokens=1)
PROMPT = [(7 * i * i + 3 * i) % 250 + 3 for i in range(45)]


def _message(transfer_id: int, prompt: list[int], readout: Readout | None, deadline_s: float = 1.0) -> Prefill:
    return Prefill(
        request_id=transfer_id, transfer_id=transfer_id, epoch=0, decode_worker_id=None, prompt=tuple(prompt),
        sampling=SAMPLING, deadline_s=deadline_s, readout=readout,
    )  # fmt: skip


class Bench:
    """A prefill stepper over a model, and what it said."""

    def __init__(self, model: LoadedModel, runner: Callable[[LoadedModel], BatchRunner], chunk_tokens: int) -> None:
        self.model = model
        self.pool = BlockPool(model.num_blocks)
        block_size = model.fingerprint.block_size
        self.said: list[PrefillEmission] = []
        self.stepper = PrefillStepper(
            runner(model),
            self.pool,
            PrefillScheduler(self.pool, block_size, chunk_tokens),
            self.said.append,
            block_size=block_size,
            layer_groups=[(0, model.fingerprint.num_layers)],
            layer_push_min_tokens=1 << 20,
            max_model_len=model.max_model_len,
        )

    def submit(self, transfer_id: int, prompt: list[int], readout: Readout | None) -> None:
        message = _message(transfer_id, prompt, readout)
        assert refusal_of(message, self.model) is None
        now_s = time.monotonic()
        self.stepper.handle(Submit(PrefillJob(sequence_of(message, self.model), None, now_s, now_s + 1)))

    def run(self) -> None:
        while self.stepper.step() or self.stepper.is_waiting:
            pass

    def read(self, transfer_id: int, prompt: list[int], readout: Readout) -> ReadingsReady:
        self.submit(transfer_id, prompt, readout)
        self.run()
        found = [s for s in self.said if isinstance(s, ReadingsReady) and s.transfer_id == transfer_id]
        assert len(found) == 1
        return found[0]


def _host(model: LoadedModel) -> BatchRunner:
    return Runner(model.decoder, model.new_kv_cache())


def _device(model: LoadedModel) -> BatchRunner:
    assert isinstance(model.decoder, TorchDecoder)
    return DeviceRunner(model.decoder, model.new_kv_cache(), LateQueue())


def _reference(model: LoadedModel, prompt: list[int]) -> Tensor:
    """Return the log probabilities after every token of a prompt `[n, vocab]`, by one forward of a float32 decoder."""
    num_tokens, block_size = len(prompt), model.fingerprint.block_size
    kv_cache = model.new_kv_cache().tensor
    num_blocks = -(-num_tokens // block_size)
    batch = ForwardBatch(
        token_ids=torch.tensor(prompt),
        positions=torch.arange(num_tokens),
        slot_mapping=torch.arange(num_tokens),
        query_start=torch.tensor([0, num_tokens], dtype=torch.int32),
        seq_lens=torch.tensor([num_tokens], dtype=torch.int32),
        block_tables=torch.arange(num_blocks, dtype=torch.int32).unsqueeze(0),
        logits_indices=torch.arange(num_tokens),
        is_decode=False,
    )
    with torch.inference_mode():
        return torch.log_softmax(model.decoder.forward(batch, kv_cache).double(), dim=-1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_model(tmp_path_factory.mktemp("plain"), kernels="torch")


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_model(tmp_path_factory.mktemp("native"))


def _benches(plain: LoadedModel, native: LoadedModel, chunk_tokens: int) -> list[Bench]:
    return [Bench(native, _host, chunk_tokens), Bench(plain, _host, chunk_tokens), Bench(plain, _device, chunk_tokens)]


@pytest.mark.parametrize("event", [Measure(), GrammarSettled()])
def test_no_event_writes_blocks_that_are_in_use(
    plain: LoadedModel, native: LoadedModel, event: Measure | GrammarSettled
) -> None:
    labels = ReadLabels(token_ids=(5, 200))
    for bench in _benches(plain, native, 16):
        before = bench.read(1, PROMPT, labels)
        bench.submit(2, PROMPT[::-1], None)
        bench.stepper.step()
        assert bench.pool.num_leased_blocks > 0
        counts = bench.pool.counts()
        bench.stepper.handle(event)
        paces = [said for said in bench.said if isinstance(said, PromptPace)]
        assert len(paces) == isinstance(event, Measure) and bench.pool.counts().leased == counts.leased
        bench.run()
        again = bench.read(3, PROMPT, labels)
        assert again.num_cached_tokens > 0 and again.labels == pytest.approx(before.labels, abs=1e-5)
        # Whatever was computed meanwhile is right, too.
        other, fresh = bench.read(4, PROMPT[::-1], labels), Bench(bench.model, _host, 64).read(1, PROMPT[::-1], labels)
        assert other.num_cached_tokens > 0 and other.labels == pytest.approx(fresh.labels, abs=1e-4)


@pytest.mark.parametrize("chunk_tokens", [7, 16, 64])
def test_labels_are_log_probabilities_of_the_whole_vocabulary(
    plain: LoadedModel, native: LoadedModel, chunk_tokens: int
) -> None:
    expected = _reference(plain, PROMPT)[-1]
    for bench in _benches(plain, native, chunk_tokens):
        ready = bench.read(1, PROMPT, ReadLabels(token_ids=(5, 200, 5)))
        assert ready.labels == pytest.approx([float(expected[i]) for i in (5, 200, 5)], abs=1e-4)
        assert ready.prompt is None and ready.num_cached_tokens == 0
        again = bench.read(2, PROMPT, ReadLabels(token_ids=(5, 200, 5)))
        assert again.labels == pytest.approx(ready.labels, abs=1e-5) and again.num_cached_tokens == 40
        bench.pool.check(num_expected_leased=0)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64])
def test_every_prompt_token_is_read_whatever_the_chunks_and_the_cache(
    plain: LoadedModel, native: LoadedModel, chunk_tokens: int
) -> None:
    expected = _reference(plain, PROMPT)
    top_values, top_ids = expected.topk(2, dim=-1)
    for bench in _benches(plain, native, chunk_tokens):
        bench.read(1, PROMPT, ReadLabels(token_ids=(5,)))
        ready = bench.read(2, PROMPT, ReadPrompt(num_top=2))
        assert ready.num_cached_tokens == 0 and ready.prompt is not None
        rows = ready.prompt.rows()
        assert len(rows) == len(PROMPT) - 1
        for i, row in enumerate(rows):
            assert row.logprob == pytest.approx(float(expected[i, PROMPT[i + 1]]), abs=1e-4)
            assert row.rank == int((expected[i] > expected[i, PROMPT[i + 1]] + 1e-9).sum()) + 1
            assert [value for _, value in row.top] == pytest.approx(top_values[i].tolist(), abs=1e-4)
            assert [token_id for token_id, _ in row.top] == top_ids[i].tolist()
        bench.pool.check(num_expected_leased=0)


def test_a_prompt_of_one_token_has_nothing_before_it(plain: LoadedModel, native: LoadedModel) -> None:
    for bench in _benches(plain, native, 16):
        ready = bench.read(1, [9], ReadPrompt(num_top=3))
        assert ready.prompt is not None and ready.prompt.rows() == []


def test_readouts_and_first_tokens_share_a_batch_and_change_nothing_for_each_other(
    plain: LoadedModel, native: LoadedModel
) -> None:
    for bench in _benches(plain, native, 64):
        alone = bench.read(1, PROMPT[:20], ReadLabels(token_ids=(8,)))
        bench.submit(2, PROMPT[5:30], None)
        bench.run()
        first_alone = next(s for s in bench.said if isinstance(s, FirstTokenReady))
        bench.said.clear()
        bench.submit(3, PROMPT[7:33], ReadPrompt())
        bench.submit(4, PROMPT[5:30], None)
        bench.submit(5, PROMPT[:20], ReadLabels(token_ids=(8,)))
        bench.run()
        first = next(s for s in bench.said if isinstance(s, FirstTokenReady))
        assert (first.transfer_id, first.row.token_id) == (4, first_alone.row.token_id)
        read = {s.transfer_id: s for s in bench.said if isinstance(s, ReadingsReady)}
        assert read[5].labels == pytest.approx(alone.labels, abs=1e-5) and len(read[3].prompt.rows()) == 25  # type: ignore[union-attr]


def test_an_aborted_readout_says_nothing_and_holds_nothing(native: LoadedModel) -> None:
    bench = Bench(native, _host, 8)
    bench.submit(1, PROMPT, ReadPrompt())
    bench.stepper.step()
    bench.stepper.handle(AbortJob(1))
    bench.run()
    assert not any(isinstance(s, ReadingsReady) for s in bench.said)
    bench.pool.check(num_expected_leased=0)


def test_forty_questions_compute_their_state_once(native: LoadedModel) -> None:
    bench = Bench(native, _host, 64)
    state = PROMPT[:40]
    for i in range(40):
        bench.submit(i, [*state, 3 + i, 4 + i, 5 + i], ReadLabels(token_ids=(8, 9)))
    bench.run()
    assert sum(isinstance(s, ReadingsReady) for s in bench.said) == 40
    assert bench.stepper.counters.num_computed_tokens == 40 + 40 * 3


def test_a_worker_refuses_what_it_cannot_read(native: LoadedModel) -> None:
    assert "256" in (refusal_of(_message(1, [3], ReadLabels(token_ids=(256,))), native) or "")
    assert "encoders" in (refusal_of(_message(1, [3], ReadEmbedding(pooling=Pooling.CLS)), native) or "")


def test_the_real_model_reads_what_a_float32_forward_gives(cache_dir: Path) -> None:
    path = resolve("smollm2", cache_dir, print).path
    sizes = {"num_kv_blocks": 64, "device": "cpu", "quantization": "none"}
    native = load(EngineConfig(model=str(path), **sizes), lambda line: None, cache_dir)  # type: ignore[arg-type]
    plain = load(EngineConfig(model=str(path), kernels="torch", **sizes), lambda line: None, cache_dir)  # type: ignore[arg-type]
    prompt = [(9973 * i) % 40_000 + 100 for i in range(70)]
    expected = _reference(plain, prompt)
    bench = Bench(native, _host, 32)
    ready = bench.read(1, prompt, ReadPrompt(num_top=1))
    assert ready.prompt is not None
    for i, row in enumerate(ready.prompt.rows()):
        assert row.logprob == pytest.approx(float(expected[i, prompt[i + 1]]), abs=1e-3)
        assert row.top[0][1] == pytest.approx(float(expected[i].max()), abs=1e-3)
    labels = bench.read(2, prompt, ReadLabels(token_ids=(1000, 2000))).labels
    assert labels == pytest.approx([float(expected[-1, 1000]), float(expected[-1, 2000])], abs=1e-3)


# --- the queue, on paper ---


def _job(transfer_id: int, num_tokens: int, readout: Readout | None, first: int = 0) -> PrefillJob:
    message = _message(transfer_id, [first + i for i in range(num_tokens)], readout)
    return PrefillJob(_sequence(message), None, 0.0, float(transfer_id))


def _sequence(message: Prefill) -> Sequence:
    root = root_hash("model")
    return Sequence(
        request_id=message.request_id,
        transfer_id=message.transfer_id,
        epoch=0,
        tokens=list(message.prompt),
        num_prompt_tokens=len(message.prompt),
        sampling=SAMPLING,
        root=root,
        names=block_hashes(list(message.prompt), 4, root),
        readout=message.readout,
    )


def _queue(num_blocks: int = 1000, chunk_tokens: int = 16) -> PrefillScheduler:
    return PrefillScheduler(BlockPool(num_blocks), 4, chunk_tokens)


def _step(scheduler: PrefillScheduler) -> dict[int, int]:
    items = scheduler.schedule(0.0)
    scheduler.launched(items)
    scheduler.landed(items)
    return {item.sequence.transfer_id: item.num_tokens for item in items}


LABELS = ReadLabels(token_ids=(1,))


def test_readouts_get_a_quarter_while_first_tokens_are_owed_and_all_else() -> None:
    scheduler = _queue()
    scheduler.submit(_job(1, 100, LABELS))
    assert _step(scheduler) == {1: 16}
    scheduler.submit(_job(2, 18, None, first=500))
    assert _step(scheduler) == {2: 12, 1: 4}
    assert _step(scheduler) == {2: 6, 1: 10}
    assert _step(scheduler) == {1: 16}


def test_a_readout_takes_no_blocks_that_a_first_token_waits_for() -> None:
    scheduler = _queue(num_blocks=10)
    scheduler.submit(_job(1, 16, None, first=100))
    assert _step(scheduler) == {1: 16}
    scheduler.submit(_job(2, 18, LABELS, first=300))
    assert _step(scheduler) == {2: 16}
    scheduler.submit(_job(3, 30, None, first=500))
    scheduler.submit(_job(4, 4, LABELS, first=700))
    assert _step(scheduler) == {2: 2}, "the small readout does not overtake the prompt that lacks blocks"
    assert set(_step(scheduler)) == {3, 4} or set(_step(scheduler)) == {3}


def test_a_first_token_that_waits_for_a_readouts_block_lifts_it() -> None:
    scheduler = _queue()
    scheduler.submit(_job(9, 64, LABELS))
    _step(scheduler)
    scheduler.submit(_job(1, 64, None))  # the same prompt
    scheduler.submit(_job(2, 200, None, first=500))
    done: list[int] = []
    while scheduler.get(1) is not None:
        done += [transfer_id for transfer_id in _step(scheduler) if transfer_id == 2]
    computed = scheduler.get(2)
    assert computed is not None and computed.num_left > 100, "the long prompt has not taken the steps meanwhile"


def test_rows_with_logits_are_bounded_in_every_step() -> None:
    scheduler = _queue(num_blocks=4000, chunk_tokens=2048)
    for i in range(3):
        scheduler.submit(_job(i, 1500, ReadPrompt(), first=10_000 * i))
    num_steps = 0
    while scheduler.num_jobs:
        assert 0 < sum(_step(scheduler).values()) <= MAX_LOGIT_ROWS
        num_steps += 1
    assert num_steps >= 4500 // MAX_LOGIT_ROWS


def test_readouts_never_starve_under_a_flood_of_first_tokens() -> None:
    scheduler = _queue(num_blocks=4000)
    scheduler.submit(_job(1, 40, LABELS, first=90_000))
    for step in range(100):
        scheduler.submit(_job(100 + step, 40, None, first=100 * step))
        _step(scheduler)
        if scheduler.get(1) is None:
            break
    assert scheduler.get(1) is None


def test_a_prompt_that_fills_the_context_is_read_and_no_longer_one(native: LoadedModel) -> None:
    prompt = [3 + i % 200 for i in range(native.max_model_len)]
    ready = Bench(native, _host, 64).read(1, prompt, ReadPrompt(num_top=0))
    assert ready.prompt is not None and ready.prompt.num_rows == len(prompt) - 1
    assert refusal_of(_message(2, [*prompt, 3], ReadPrompt(num_top=0)), native)
    assert refusal_of(_message(2, prompt, None), native), "a token must follow"
