"""With masks of real grammars the host's sampler, the tensor reference and interpreted Triton choose the same token."""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import pytest
import torch

from engine.device_queue import HostQueue
from engine.device_sampler import sample_on_device
from engine.grammar import allowed_tokens
from engine.sampler import SampleInput, sample
from kernels.table import REFERENCE, KernelTable
from tests.engine.bytes_vocabulary import EOS_ID, OBJECT, WORDS, ids_of, state_of
from tests.kernels.sampling_cases import random_logits, random_row

VOCAB = 300
PLACES = [
    (OBJECT, ""),
    (OBJECT, '{"a": 1'),
    (OBJECT, '{"a": 1, "b": "'),
    (WORDS, "a"),
    (WORDS, "abc"),
    (WORDS, "abc d"),
]


def _rows(num_rows: int) -> list[SampleInput]:
    """Draw rows: three of four with a grammar somewhere in its output."""
    generator, rows = np.random.default_rng(3), []
    for number in range(num_rows):
        row = random_row(generator, VOCAB)
        if number % 4:
            grammar, text = PLACES[generator.integers(len(PLACES))]
            sampling = msgspec.structs.replace(row.sampling, grammar=grammar, eos_token_ids=(EOS_ID,))
            state = state_of(grammar, VOCAB, ignore_eos=sampling.ignore_eos)
            state.replay(ids_of(text))
            row = SampleInput(sampling, row.prompt, ids_of(text), state)
        rows.append(row)
    return rows


def _kernels() -> list[KernelTable]:
    tables = [REFERENCE]
    if not torch.cuda.is_available():
        pytest.importorskip("triton")
        from kernels.gpu.table import triton_table

        tables.append(triton_table())
    return tables


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_host_reference_and_triton_choose_the_same_allowed_token() -> None:
    rows = _rows(32)
    logits = random_logits(len(rows), VOCAB, 5).nan_to_num(neginf=-60.0)
    chosen = [sampled.token_id for sampled in sample(logits, rows)]
    for row, token_id in zip(rows, chosen, strict=True):
        if row.grammar is not None:
            assert allowed_tokens(row.grammar.mask(), VOCAB)[token_id]
            if len(row.output) < row.sampling.min_tokens:
                assert token_id != EOS_ID
    for kernels in _kernels():
        found = sample_on_device(logits, rows, kernels, HostQueue(torch.device("cpu"))).results()
        assert [sampled.token_id for sampled in found] == chosen, kernels.name


def test_a_greedy_row_without_anything_else_obeys_too() -> None:
    state = state_of(OBJECT, VOCAB)
    row = SampleInput(msgspec.structs.replace(random_row(np.random.default_rng(0), VOCAB).sampling), [1], [], state)
    plain = dataclasses.replace(row, sampling=type(row.sampling)(seed=0, temperature=0.0, grammar=OBJECT))
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1))
    assert sample(logits, [plain])[0].token_id == ids_of("{")[0]
