"""Readouts on a GPU: labels and the prompt's own tokens, against one forward of the model with every row's logits."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from engine.batch import BatchItem, build_batch
from engine.placement import sequence_of
from prefill.scheduler import PrefillJob
from prefill.stepper import ReadingsReady, Submit
from protocol.readout import ReadLabels, Readout, ReadPrompt
from protocol.request import SamplingParams
from protocol.wire import Prefill
from tests.decode.pair import prompt_of
from tests.gpu.models import BLOCK, LLAMA, DevicePair, gpu_model


def _placement(transfer_id: int, prompt: list[int], readout: Readout) -> Prefill:
    return Prefill(
        request_id=transfer_id, transfer_id=transfer_id, epoch=0, decode_worker_id=None, prompt=tuple(prompt),
        sampling=SamplingParams(seed=0, max_tokens=1), deadline_s=1.0, readout=readout,
    )  # fmt: skip


def _read(pair: DevicePair, message: Prefill) -> ReadingsReady:
    now_s = time.monotonic()
    pair.prefill.handle(Submit(PrefillJob(sequence_of(message, pair.model), None, now_s, now_s + 1)))
    while pair.prefill.step() or pair.prefill.is_waiting:
        pass
    found = [e for e in pair.from_prefill if isinstance(e, ReadingsReady) and e.transfer_id == message.transfer_id]
    assert len(found) == 1
    return found[0]


def test_readouts_on_the_device_are_those_of_one_forward(tmp_path: Path) -> None:
    model = gpu_model(tmp_path, LLAMA, dtype="float32")
    pair, prompt = DevicePair(model, eager=True), prompt_of(3, 700)
    whole = sequence_of(_placement(9, prompt, ReadPrompt()), model)
    whole.add_blocks(list(range(-(-len(prompt) // BLOCK))))
    batch = build_batch([BatchItem(whole, 0, len(prompt), True)], BLOCK, lambda a: torch.from_numpy(a).cuda())
    with torch.inference_mode():
        logits = model.decoder.forward(batch, model.new_kv_cache().tensor)
        expected = torch.log_softmax(logits.double(), dim=-1).cpu()
    ready = _read(pair, _placement(1, prompt, ReadPrompt(num_top=2)))
    assert ready.prompt is not None
    rows = ready.prompt.rows()
    assert len(rows) == len(prompt) - 1 == len(expected)
    for i, row in enumerate(rows):
        assert row.logprob == pytest.approx(float(expected[i, prompt[i + 1]]), abs=1e-2)
        assert row.top[0][1] == pytest.approx(float(expected[i].max()), abs=1e-2)
    labels = _read(pair, _placement(2, prompt[:500], ReadLabels(token_ids=(7, 4000)))).labels
    assert labels == pytest.approx([float(expected[499, 7]), float(expected[499, 4000])], abs=1e-2)
