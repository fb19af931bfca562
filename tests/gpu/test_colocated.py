"""One GPU, both roles: two streams over one pool, with and without multiprocessors of their own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.device_queue import CudaQueue
from engine.execution import open_batch_runner, open_decode_runner
from engine.kv_cache import KVCache
from engine.loading import LoadedModel
from engine.stream_partition import RoleQueues, open_role_queues
from protocol.request import SamplingParams
from tests.baton.test_colocated import MAX_TOKENS, NUM_BLOCKS, colocated_process
from tests.decode.one_pool import OnePoolPair, OpenRunners, Runners
from tests.decode.pair import params, prompt_of
from tests.gpu.models import LLAMA, QWEN3, DevicePair, gpu_model

PREFILL_SMS = 64


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    shape = {"llama": LLAMA, "qwen3": QWEN3}[request.param]
    return gpu_model(tmp_path_factory.mktemp(request.param), shape)


@pytest.fixture(scope="module", params=[0, PREFILL_SMS], ids=["undivided", "divided"])
def queues(request: pytest.FixtureRequest) -> RoleQueues:
    found = open_role_queues(torch.device("cuda"), request.param)
    if request.param and "not divided" in found.detail:
        pytest.skip(found.detail)
    return found


def _runners(queues: RoleQueues) -> OpenRunners:
    def open_runners(model: LoadedModel, kv_cache: KVCache, max_num_seqs: int) -> Runners:
        prefill = open_batch_runner(model, kv_cache, queues.prefill)
        return Runners(prefill, open_decode_runner(model, kv_cache, max_num_seqs, print, queues.decode), True)

    return open_runners


def _cases(num_cases: int) -> dict[int, tuple[list[int], SamplingParams]]:
    shared = prompt_of(77, 200)
    cases = {}
    for i in range(num_cases):
        own = prompt_of(i, 5 + (137 * i) % 700)
        kind = [
            params(i, max_tokens=40),
            params(i, max_tokens=25 + i % 7, temperature=1.0),
            SamplingParams(seed=i, temperature=0.8, top_k=20, top_p=0.9, max_tokens=33, num_logprobs=2),
            params(i, max_tokens=1),
        ][i % 4]
        cases[i] = ([*shared, *own] if i % 3 else own, kind)
    return cases


def test_each_stream_runs_on_multiprocessors_that_the_other_never_uses() -> None:
    from tests.gpu.where import multiprocessors_used

    queues = open_role_queues(torch.device("cuda"), PREFILL_SMS)
    if "not divided" in queues.detail:
        pytest.skip(queues.detail)
    assert isinstance(queues.prefill, CudaQueue) and isinstance(queues.decode, CudaQueue)
    used = [multiprocessors_used(queue.stream) for queue in (queues.prefill, queues.decode)]
    assert len(used[0]) == PREFILL_SMS and not used[0] & used[1]
    total = torch.cuda.get_device_properties(0).multi_processor_count
    assert len(used[0]) + len(used[1]) == total


def test_a_graph_recorded_on_a_divided_stream_stays_on_its_multiprocessors() -> None:
    from tests.gpu.where import multiprocessors_used

    queues = open_role_queues(torch.device("cuda"), PREFILL_SMS)
    if "not divided" in queues.detail:
        pytest.skip(queues.detail)
    assert isinstance(queues.prefill, CudaQueue) and isinstance(queues.decode, CudaQueue)
    prefill = multiprocessors_used(queues.prefill.stream)
    assert not multiprocessors_used(queues.decode.stream, in_graph=True) & prefill


def test_tokens_are_those_of_two_pools(model: LoadedModel, queues: RoleQueues) -> None:
    cases = _cases(16)
    pair = OnePoolPair(model, _runners(queues), chunk_tokens=128, max_num_seqs=32)
    for number, case in cases.items():
        pair.submit(number, *case)
        pair.turn()
    pair.run()
    apart = DevicePair(model)
    for number, case in cases.items():
        assert apart.place(number, *case, [])
    apart.run()
    assert pair.tokens() == {number: apart.tokens[number] for number in cases}
    assert pair.num_between > 0


def test_a_small_pool_under_aborts_and_preemption_gives_the_same_tokens(model: LoadedModel, queues: RoleQueues) -> None:
    rng = random.Random(3)
    cases = _cases(16)
    pair = OnePoolPair(model, _runners(queues), num_blocks=130, chunk_tokens=64, max_num_seqs=8, watermark_blocks=4)
    for number, case in cases.items():
        pair.submit(number, *case)
        pair.submit(1000 + number, prompt_of(number, rng.randint(1, 300)), params(number, max_tokens=60))
        for _ in range(rng.randint(0, 40)):
            pair.turn()
        if rng.random() < 0.8:
            pair.abort(1000 + number)
        else:
            cases[1000 + number] = (pair.requests[1000 + number].prompt, pair.requests[1000 + number].sampling)
    pair.run()
    apart = DevicePair(model)
    for number, case in cases.items():
        assert apart.place(number, *case, [])
        apart.run()
    assert pair.tokens() == {number: apart.tokens[number] for number in cases}


def test_streams_go_on_while_a_long_prompt_is_computed(model: LoadedModel, queues: RoleQueues) -> None:
    pair = OnePoolPair(model, _runners(queues), chunk_tokens=512)
    pair.submit(1, prompt_of(1, 40), params(1, max_tokens=1000))
    while len(pair.requests[1].tokens) < 20:
        pair.turn()
    before = len(pair.requests[1].tokens)
    pair.submit(2, prompt_of(2, 1800), params(2, max_tokens=2))
    while not pair.requests[2].tokens:
        pair.turn()
    assert len(pair.requests[1].tokens) > before + 2
    pair.abort(1)
    pair.run()


@pytest.mark.parametrize("prefill_sms", [0, PREFILL_SMS])
async def test_both_workers_serve_from_one_pool_and_leave_nothing(tmp_path: Path, prefill_sms: int) -> None:
    model = gpu_model(tmp_path, LLAMA, num_kv_blocks=NUM_BLOCKS)
    options: dict[str, Any] = {"num_sms": prefill_sms}
    async with colocated_process(model, tmp_path, **options) as process:
        for transfer_id in range(1, 9):
            process.place(transfer_id, prompt_of(transfer_id, 30 * transfer_id))
        for transfer_id in range(1, 9):
            assert len(await process.rows(transfer_id)) == MAX_TOKENS
        await process.quiet()
