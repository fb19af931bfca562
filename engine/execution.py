"""Which runner a worker gets on its device.

    native or reference kernels   Runner, HostDecodeRunner: the host waits for every step
    kernels that only enqueue     DeviceRunner, LaneDecodeRunner: the host runs ahead; on a GPU decode replays graphs

Triton's kernels in its interpreter count as the latter, so that all of it but the graphs can be run without a GPU. Each
runner has a queue (a stream) and kernels (their scratch memory) of its own, so that prefill and decode of one
process may run at the same time.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.decode_runner import Compute, DecodeRunner, HostDecodeRunner, LaneDecodeRunner, LaneStep
from engine.device_queue import CudaQueue, DeviceQueue, open_queue
from engine.graphs import GraphedStep
from engine.kv_cache import KVCache
from engine.lane_state import LaneSizes, LaneState
from engine.loading import LoadedModel
from engine.runner import BatchRunner, DeviceRunner, Runner
from engine.sequence import num_blocks_for
from model.native_decoder import NativeDecoder
from model.torch_decoder import TorchDecoder


def stays_on_device(model: LoadedModel) -> bool:
    """Tell whether steps of this model need nothing of the host."""
    return isinstance(model.decoder, TorchDecoder) and model.decoder.kernels.is_capturable


def phases_agree(model: LoadedModel) -> bool:
    """Tell whether a sequence's bits do not depend on how it is cut into prompts, chunks and steps."""
    return isinstance(model.decoder, NativeDecoder)


def open_batch_runner(model: LoadedModel, kv_cache: KVCache, queue: DeviceQueue | None = None) -> BatchRunner:
    """Give the runner of a prefill worker; `queue` None opens one. On a GPU its kernels are compiled here."""
    if not stays_on_device(model):
        return Runner(model.decoder, kv_cache)
    assert isinstance(model.decoder, TorchDecoder)
    runner = DeviceRunner(model.decoder.with_own_scratch(), kv_cache, queue or open_queue(model.device))
    if model.device.type == "cuda":
        runner.rehearse()
    return runner


def open_decode_runner(
    model: LoadedModel,
    kv_cache: KVCache,
    max_num_seqs: int,
    say: Callable[[str], None],
    queue: DeviceQueue | None = None,
) -> DecodeRunner:
    """Give the runner of a decode worker; on a GPU its graphs are recorded here, which takes seconds.

    Args:
        model: loaded.
        kv_cache: what the sequences' blocks lie in.
        max_num_seqs: sequences of one step, at most.
        say: takes a line of progress, and one on what the graphs took.
        queue: where steps run; None opens one.
    """
    if not stays_on_device(model):
        return HostDecodeRunner(Runner(model.decoder, kv_cache))
    queue = queue or open_queue(model.device)
    sizes = lane_sizes(model, max_num_seqs)
    state = LaneState(sizes, queue)
    assert isinstance(model.decoder, TorchDecoder)
    compute: Compute = LaneStep(model.decoder.with_own_scratch(), kv_cache, state, sizes)
    if model.enforce_eager or not isinstance(queue, CudaQueue):
        reason = "no CUDA graphs were asked for" if model.enforce_eager else "there are no graphs on a CPU"
        say(f"decode steps are launched kernel by kernel: {reason}")
    else:
        compute = GraphedStep(compute, queue, max_num_seqs, say)
        say(f"recorded {compute.summary}")
    return LaneDecodeRunner(compute, state, sizes, queue)


def lane_sizes(model: LoadedModel, max_num_seqs: int) -> LaneSizes:
    """Give the sizes of the tensors that hold a decode batch of this model."""
    block_size = model.fingerprint.block_size
    max_blocks = num_blocks_for(model.max_model_len, block_size)
    return LaneSizes(max_num_seqs, max_blocks, model.max_model_len, model.vocab_size, block_size)
