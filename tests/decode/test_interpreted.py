"""The whole path of a GPU but its graphs, Triton's kernels interpreted on a CPU: the same tokens as plain torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.decode_runner import LaneDecodeRunner
from engine.execution import open_batch_runner, open_decode_runner
from engine.runner import DeviceRunner
from protocol.request import SamplingParams
from tests.decode.pair import Pair, params, prompt_of
from tests.engine.tiny import tiny_model

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs it compiled")


def test_prompts_in_chunks_and_steps_in_lanes_give_the_reference_tokens(tmp_path: Path) -> None:
    cases = {
        1: (prompt_of(1, 21), params(1, max_tokens=5)),
        2: (prompt_of(2, 9), SamplingParams(seed=4, temperature=1.0, top_k=20, repetition_penalty=1.3, max_tokens=4)),
    }
    plain = Pair(tiny_model(tmp_path, kernels="torch"))
    model = tiny_model(tmp_path, kernels="triton")
    assert "triton operations in float32" in model.backend
    said: list[str] = []
    pair = Pair(model)
    pair.prefill._runner = open_batch_runner(model, pair.prefill_kv)
    pair.decode._runner = open_decode_runner(model, pair.decode_kv, 4, said.append)
    assert isinstance(pair.prefill._runner, DeviceRunner) and isinstance(pair.decode._runner, LaneDecodeRunner)
    before = pair.prefill_kv.tensor.clone()
    pair.prefill._runner.rehearse()
    assert torch.equal(pair.prefill_kv.tensor, before)
    assert said == ["decode steps are launched kernel by kernel: there are no graphs on a CPU"]
    for transfer_id, (prompt, sampling) in cases.items():
        for each in (plain, pair):
            assert each.place(transfer_id, prompt, sampling, [])
    plain.run()
    pair.run()
    assert pair.tokens == plain.tokens and [len(tokens) for tokens in pair.tokens.values()] == [5, 4]
