"""Recorded decode steps: the same tokens as launched ones, in any company, and nothing of the host in a steady step."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.loading import LoadedModel
from protocol.request import SamplingParams
from tests.decode.pair import Pair, params, prompt_of
from tests.gpu.models import LLAMA, QWEN3, DevicePair, gpu_model

NUM_STEADY_STEPS = 32


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    shape = {"llama": LLAMA, "qwen3": QWEN3}[request.param]
    return gpu_model(tmp_path_factory.mktemp(request.param), shape)


@pytest.fixture(scope="module")
def recorded(model: LoadedModel) -> DevicePair:
    return DevicePair(model)


def _cases(num_cases: int) -> dict[int, tuple[list[int], SamplingParams]]:
    cases = {}
    for i in range(num_cases):
        kind = [
            params(i, max_tokens=40),
            params(i, max_tokens=25 + i % 7, temperature=1.0),
            SamplingParams(seed=i, temperature=0.8, top_k=20, top_p=0.9, max_tokens=33, num_logprobs=2),
            SamplingParams(seed=i, temperature=1.0, repetition_penalty=1.3, frequency_penalty=0.3, max_tokens=30),
        ][i % 4]
        cases[1000 + i] = (prompt_of(i, 5 + (37 * i) % 300), kind)
    return cases


def _run(pair: Pair, cases: dict[int, tuple[list[int], SamplingParams]], step_between: int) -> dict[int, list[int]]:
    for transfer_id, (prompt, sampling) in cases.items():
        assert pair.place(transfer_id, prompt, sampling, [])
        pair.run(num_steps=step_between)
    pair.run()
    pair.decode_pool.check(num_expected_leased=0)
    return {transfer_id: pair.tokens[transfer_id] for transfer_id in cases}


def test_graphs_and_single_launches_give_the_same_tokens(model: LoadedModel, recorded: DevicePair) -> None:
    cases = _cases(12)
    assert any("CUDA graphs in" in line for line in recorded.said)
    assert _run(recorded, cases, 3) == _run(DevicePair(model, eager=True), cases, 3)


def test_the_host_runner_with_the_same_kernels_gives_the_same_tokens(model: LoadedModel, recorded: DevicePair) -> None:
    """Run-ahead, lanes and device sampling change nothing: a runner that waits and samples on the host agrees."""
    cases = _cases(6)
    waiting = Pair(model, chunk_tokens=512)
    got = _run(recorded, {i + 5000: case for i, case in cases.items()}, 2)
    expected = _run(waiting, cases, 0)
    assert [got[i + 5000] for i in cases] == [expected[i] for i in cases]


def test_a_row_has_the_same_bits_in_every_batch_size(model: LoadedModel, recorded: DevicePair) -> None:
    sampling = SamplingParams(seed=1, temperature=0.0, max_tokens=24, num_logprobs=5)
    prompt = prompt_of(7, 130)
    seen: list[list[Any]] = []
    for number, company in enumerate([0, 1, 3, 6, 10, 15, 22, 31, 46, 63]):
        transfer_id = 10_000 * (number + 1)
        for i in range(company):
            assert recorded.place(transfer_id + 1 + i, prompt_of(100 + i, 20 + 9 * i), params(i, 60, 1.0), [])
        assert recorded.place(transfer_id, prompt, sampling, [])
        recorded.run()
        seen.append([(row.token_id, row.logprobs) for row in recorded.rows[transfer_id]])
    assert all(rows == seen[0] for rows in seen[1:])


def test_a_steady_step_neither_allocates_nor_waits_nor_launches_kernels_one_by_one(recorded: DevicePair) -> None:
    for i in range(8):
        assert recorded.place(90_000 + i, prompt_of(i, 40), params(i, max_tokens=1000), [])
    recorded.run(num_steps=20)
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    gc.disable()
    with torch.profiler.profile(activities=activities) as profile:
        recorded.run(num_steps=NUM_STEADY_STEPS)
    gc.enable()
    calls = {event.key: event.count for event in profile.key_averages()}
    graphs = calls.get("cudaGraphLaunch", 0)
    assert NUM_STEADY_STEPS // 2 - 1 <= graphs <= NUM_STEADY_STEPS + 2, "a turn launches a step, collects one, or both"
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
    takes = ("cudaMalloc", "cudaHostAlloc", "cudaFree", "cudaFreeHost", "cudaMallocAsync")
    assert not [name for name in (*waits, *takes) if calls.get(name)]
    # Tables grow every 128 tokens, a few small writes for all; a layer has more than two kernels.
    assert sum(calls.get(name, 0) for name in ("cudaLaunchKernel", "cuLaunchKernel", "cuLaunchKernelEx")) < graphs
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - allocated < graphs
    for i in range(8):
        recorded.tokens.pop(90_000 + i)


def test_recording_says_what_it_took_and_eager_is_there_for_debugging(tmp_path: Path) -> None:
    model = gpu_model(tmp_path, LLAMA, num_kv_blocks=100)
    pair = DevicePair(model, eager=True, max_lanes=4)
    assert pair.said == ["decode steps are launched kernel by kernel: no CUDA graphs were asked for"]
    assert pair.place(1, prompt_of(1, 30), params(1, max_tokens=5), [])
    pair.run()
    assert len(pair.tokens[1]) == 5
