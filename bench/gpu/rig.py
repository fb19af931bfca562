"""What sections measure with: the device, and one model at a time on it.

1. `Stage` knows device, sizes and kernels; it measures the ceilings when they are first asked for.
2. `Stage.rig` makes a model: weights and KV memory filled with noise on the device, lanes, a queue. The one before it
   is dropped first: two of them do not fit.
3. `Rig.step` records the graphs of a decode step when it is first asked for.
4. `Rig.sequences` places sequences as if their prompts had just landed, in blocks that lie anywhere.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from bench.gpu.ceilings import Ceilings, ProbeSizes, measure_ceilings
from bench.gpu.points import Skip
from bench.gpu.shapes import BenchModel, shape_of
from bench.gpu.timing import wait_for_all
from bench.gpu.weights import make_weights
from engine.batch import BatchItem
from engine.decode_runner import Compute, LaneDecodeRunner, LaneStep
from engine.device_queue import CudaQueue, open_queue
from engine.execution import lane_sizes
from engine.graphs import GraphedStep
from engine.kv_cache import BlockKernels, KVCache, torch_kernels
from engine.lane_state import LaneState
from engine.loading import LoadedModel
from engine.placement import sequence_of
from engine.sequence import Sequence, num_blocks_for
from kernels.table import KernelTable
from model.torch_decoder import TorchDecoder
from model.weights import LoadSummary
from protocol.kv_layout import KVFingerprint
from protocol.request import SamplingParams
from protocol.wire import Reserve

MAX_BATCH: Final = 64
_KV_MEMORY_SHARE: Final = 0.85
_NUM_PROMPT_VARIANTS: Final = 251


@dataclass(frozen=True, slots=True)
class Scale:
    """How large everything is.

    Attributes:
        token_divisor: lengths are divided by this in a rehearsal.
        num_steps: decode steps of one window.
        num_warm_steps: before them, not counted.
        num_windows: of streams, at each point that has a stated target; one at the others.
        num_eager_steps: of the comparison without graphs.
        num_rounds: of a kernel's timing.
        num_prompts: that arrive while streams run.
        max_stream_steps: that those streams may take meanwhile.
        need_factor: scales how long points are expected to take; 0 where that is not known.
    """

    token_divisor: int = 1
    num_steps: int = 256
    num_warm_steps: int = 16
    num_windows: int = 3
    num_eager_steps: int = 48
    num_rounds: int = 7
    num_prompts: int = 6
    max_stream_steps: int = 1500
    block_size: int = 16
    probe: ProbeSizes = ProbeSizes()
    need_factor: float = 1.0

    def tokens(self, num_tokens: int) -> int:
        """Return a length as it is measured."""
        return max(self.block_size, num_tokens // self.token_divisor)

    @property
    def tail_tokens(self) -> int:
        """Room behind the longest context."""
        return self.num_steps + self.num_warm_steps + 96


REHEARSAL: Final = Scale(
    token_divisor=128,
    num_steps=6,
    num_warm_steps=2,
    num_windows=1,
    num_eager_steps=3,
    num_rounds=1,
    num_prompts=2,
    max_stream_steps=60,
    block_size=8,
    probe=ProbeSizes(1 << 20, 64, 2),
    need_factor=0.0,
)


class Stage:
    """The device that a run measures on. Used by one thread.

    Args:
        kernels: of the decoders.
        say: takes a line of progress.
    """

    def __init__(
        self,
        device: torch.device,
        models: Mapping[str, BenchModel],
        scale: Scale,
        kernels: KernelTable,
        say: Callable[[str], None],
    ) -> None:
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.models = models
        self.scale = scale
        self.kernels = kernels
        self.say = say
        self._rig: Rig | None = None

    @cached_property
    def ceilings(self) -> Ceilings:
        """What this GPU reads, copies and multiplies at most."""
        return measure_ceilings(open_queue(self.device), self.scale.probe)

    def rig(self, name: str) -> Rig:
        """Give the rig of a model, made anew if another one stands there."""
        if self._rig is None or self._rig.model.name != name:
            _ = self.ceilings  # while the memory is still free
            self.drop_rig()
            self._rig = Rig(self.models[name], self)
        return self._rig

    def drop_rig(self) -> None:
        """Give the memory of the model back."""
        self._rig = None
        gc.unfreeze()  # a compute thread freezes what it finds
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Rig:
    """One model with its memory.

    Attributes:
        loaded: as a worker has it.
        num_blocks: of the KV memory.
        eager: a decode step, launched kernel by kernel.
    """

    def __init__(self, model: BenchModel, stage: Stage) -> None:
        config, scale, device = model.config, stage.scale, stage.device
        self.model, self.shape, self._stage = model, shape_of(config), stage
        self.max_model_len = scale.tokens(8192) + scale.tail_tokens
        weights = make_weights(config, stage.dtype, device)
        summary = LoadSummary(weights.num_bytes(), 0.0, weights.arithmetic, str(device))
        self.decoder = TorchDecoder(config, weights, summary, self.max_model_len, "benchmark", stage.kernels)
        fingerprint = KVFingerprint(
            model_hash=f"benchmark {model.title}",
            dtype=str(stage.dtype).removeprefix("torch."),
            block_size=scale.block_size,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            arithmetic=weights.arithmetic,
            device=device.type,
        )
        self.num_blocks = self._num_blocks(fingerprint.block_bytes)
        self.loaded = LoadedModel(
            self.decoder, fingerprint, device, self.num_blocks, self.max_model_len, config.vocab_size, "benchmark"
        )
        self.queue = open_queue(device)
        self.kv_cache = self.new_kv_cache(self.num_blocks)
        wait_for_all(device)
        with self.queue.active():
            self.kv_cache.tensor.normal_()
        self.sizes = lane_sizes(self.loaded, MAX_BATCH)
        self.state = LaneState(self.sizes, self.queue)
        self.eager = LaneStep(self.decoder.with_own_scratch(), self.kv_cache, self.state, self.sizes)
        self._next_id = 1
        self._order = torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(0)).tolist()

    @cached_property
    def graphs(self) -> GraphedStep | str:
        """Record the graphs of a decode step, which takes seconds; or say why there are none."""
        if not isinstance(self.queue, CudaQueue):
            return "a CPU has no CUDA graphs"
        if not self.decoder.kernels.is_capturable:
            return f"{self.decoder.kernels.name} kernels cannot be recorded in a CUDA graph"
        try:
            return GraphedStep(self.eager, self.queue, MAX_BATCH, self._stage.say)
        except RuntimeError as error:  # torch's, for anything that CUDA says; steps can still be launched one by one
            return f"recording failed: {error}"

    @property
    def step(self) -> Compute:
        """A decode step as it is served: in graphs where there are any."""
        return self.eager if isinstance(self.graphs, str) else self.graphs

    def clear_lanes(self) -> None:
        """End every lane: nothing is computed for any of them."""
        self.state.clear(range(self.sizes.max_lanes))

    def new_runner(self, compute: Compute) -> LaneDecodeRunner:
        """Give a runner over empty lanes; only the latest one may be used."""
        self.clear_lanes()
        return LaneDecodeRunner(compute, self.state, self.sizes, self.queue)

    def new_kv_cache(self, num_blocks: int) -> KVCache:
        """Make KV memory of this model."""
        return KVCache(self.loaded.fingerprint, num_blocks, self.queue.device, block_kernels(self.queue.device))

    def sequences(self, batch: int, num_prompt_tokens: int, max_tokens: int, first_block: int = 0) -> list[Sequence]:
        """Place sequences whose prompts have landed, with blocks for all their output.

        Args:
            batch: how many.
            num_prompt_tokens: of each.
            max_tokens: each may put out so many.
            first_block: blocks taken by others.

        Raises:
            Skip: the KV memory is too small.
        """
        block_size = self.loaded.fingerprint.block_size
        num_blocks = num_blocks_for(num_prompt_tokens + max_tokens, block_size)
        if first_block + batch * num_blocks > self.num_blocks:
            raise Skip(f"{first_block + batch * num_blocks} KV blocks needed, there is room for {self.num_blocks}")
        placed = [self.sequence(num_prompt_tokens, max_tokens) for _ in range(batch)]
        for index, sequence in enumerate(placed):
            sequence.tokens.append(3)
            sequence.num_computed_tokens = num_prompt_tokens
            first = first_block + index * num_blocks
            sequence.add_blocks(self._order[first : first + num_blocks])
        return placed

    def block_tables(self, batch: int, context_tokens: int) -> Tensor:
        """Give block tables `[batch, max_blocks]` int32, as wide as a decode step's, of blocks that lie anywhere.

        Raises:
            Skip: the KV memory is too small.
        """
        num_blocks = num_blocks_for(context_tokens, self.loaded.fingerprint.block_size)
        if batch * num_blocks > self.num_blocks:
            raise Skip(f"{batch * num_blocks} KV blocks needed, there is room for {self.num_blocks}")
        tables = torch.zeros(batch, self.sizes.max_blocks, dtype=torch.int32)
        tables[:, :num_blocks] = torch.tensor(self._order[: batch * num_blocks]).view(batch, num_blocks)
        return tables.to(self.queue.device)

    def sequence(self, num_prompt_tokens: int, max_tokens: int) -> Sequence:
        """Make a sequence without blocks; no two have a prompt in common."""
        return sequence_of(self.reserve(num_prompt_tokens, max_tokens), self.loaded)

    def reserve(self, num_prompt_tokens: int, max_tokens: int) -> Reserve:
        """Make a placement of a prompt that no other one equals; greedy, to its very end."""
        number = self._next_id
        self._next_id += 1
        # The first token tells prompts apart, since a block's name follows from all tokens up to its end.
        prompt = [3 + (number + i * 31) % _NUM_PROMPT_VARIANTS for i in range(num_prompt_tokens)]
        prompt[: 2 if num_prompt_tokens > 1 else 0] = [3 + number % 251, 3 + number // 251 % 251]
        sampling = SamplingParams(seed=number, temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        return Reserve(
            request_id=number,
            transfer_id=number,
            epoch=1,
            prefill_worker_id="bench",
            prompt=tuple(prompt),
            emitted=(),
            sampling=sampling,
        )

    def _num_blocks(self, block_bytes: int) -> int:
        """Give as many blocks as the largest point needs, or as the device has room for."""
        wanted = MAX_BATCH * num_blocks_for(self.max_model_len, self._stage.scale.block_size)
        if self._stage.device.type != "cuda":
            return wanted
        free_bytes = torch.cuda.mem_get_info(self._stage.device)[0]
        return min(wanted, int(free_bytes * _KV_MEMORY_SHARE) // block_bytes)


def decode_items(sequences: list[Sequence]) -> list[BatchItem]:
    """Ask for the next token of each sequence."""
    return [BatchItem(sequence, sequence.num_computed_tokens, 1, wants_logits=True) for sequence in sequences]


def block_kernels(device: torch.device) -> BlockKernels | None:
    """Give what moves blocks: Triton's on a GPU, or torch's where those are not there."""
    if device.type == "cpu":
        return None
    try:
        from engine.kv_cache import triton_kernels

        return triton_kernels()
    except ImportError:
        return torch_kernels()
