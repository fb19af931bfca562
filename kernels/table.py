"""The kernels that a decoder in torch calls, as one table for each implementation.

`REFERENCE` is plain torch, on any device. `kernels.gpu.table` gives Triton's. Signatures, shapes, dtypes and meaning
are those of `kernels.reference`, `kernels.lanes` and `kernels.sampling`, whoever computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kernels import lanes, reference, sampling
from kernels.reference import Matrix


@dataclass(frozen=True, slots=True)
class KernelTable:
    """One implementation of every kernel.

    `linear` and `linear_silu` are for prompts, `decode_linear` and `decode_linear_silu` for decode steps: they mean the
    same, and each keeps a row's bits whatever the number of rows, but the two may differ in the last bit.

    Attributes:
        name: how logs call it.
        is_capturable: no kernel synchronises, so that a CUDA graph can record them.
        fresh: gives a table whose kernels share no scratch memory with this one's, for use at the same time.
    """

    name: str
    is_capturable: bool
    fresh: Callable[[], KernelTable]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rope_store: Callable[..., Tensor]
    linear: Callable[[Tensor, Matrix, Tensor | None], Tensor]
    linear_silu: Callable[[Tensor, Matrix], Tensor]
    decode_linear: Callable[[Tensor, Matrix, Tensor | None], Tensor]
    decode_linear_silu: Callable[[Tensor, Matrix], Tensor]
    paged_decode_attention: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
    paged_prefill_attention: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]
    choose_tokens: Callable[[Tensor, sampling.SamplingTensors], Tensor]
    sample_tokens: Callable[[Tensor, sampling.SamplingTensors], Tensor]
    count_tokens: Callable[[Tensor, Tensor, Tensor], None]
    begin_step: Callable[[lanes.LaneTensors, int], None]
    end_step: Callable[[lanes.LaneTensors, Tensor], None]


REFERENCE: KernelTable = KernelTable(
    name="torch",
    is_capturable=False,
    fresh=lambda: REFERENCE,
    rms_norm=reference.rms_norm,
    add_rms_norm=reference.add_rms_norm,
    rope_store=reference.rope_store,
    linear=reference.linear,
    linear_silu=reference.linear_silu,
    decode_linear=reference.linear,
    decode_linear_silu=reference.linear_silu,
    paged_decode_attention=reference.paged_decode_attention,
    paged_prefill_attention=reference.paged_prefill_attention,
    choose_tokens=sampling.choose_tokens,
    sample_tokens=sampling.sample_tokens,
    count_tokens=sampling.count_tokens,
    begin_step=lanes.begin_step,
    end_step=lanes.end_step,
)
