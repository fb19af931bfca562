"""The KV cache as transfers see it: on a CPU, and the GPU's half of it on CPU tensors with a queue that takes notes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.device_queue import HostQueue, Mark
from engine.kv_cache import BlockKernels, DeviceBlocks, DeviceSlot, KVCache, torch_kernels, triton_kernels
from kvtransfer.config import TransferConfig
from kvtransfer.inproc import InprocTransport
from kvtransfer.receiving import ReceiveSide
from kvtransfer.sending import SendSide
from kvtransfer.transport import Identity
from protocol.errors import TransferError
from protocol.handoff import SendRange
from protocol.kv_layout import KVFingerprint, KVRegion, SlotKind, Staging

CPU = torch.device("cpu")
NUM_BLOCKS = 12


def layout(dtype: str = "bfloat16", device: str = "cpu") -> KVFingerprint:
    return KVFingerprint(
        model_hash="m", dtype=dtype, block_size=8, num_layers=3, num_kv_heads=2, head_dim=16, device=device
    )


class NotedQueue(HostQueue):
    """Notes what happens, in order; work given to `later` is done only when a mark behind it is waited for."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.notes: list[str] = []
        self.work: list[Callable[[], object]] = []

    @contextmanager
    def active(self) -> Iterator[None]:
        self.notes.append("enter")
        yield
        self.notes.append("leave")

    def mark(self) -> Mark:
        self.notes.append("mark")
        return _NotedMark(self)

    def later(self, kernel: Callable[..., Any], *args: Any) -> None:
        assert self.notes[-1] != "leave", "a kernel outside the queue"
        self.notes.append("kernel")
        self.work.append(lambda: kernel(*args))


class _NotedMark:
    def __init__(self, queue: NotedQueue) -> None:
        self.queue = queue

    def is_passed(self) -> bool:
        return not self.queue.work

    def wait(self) -> None:
        self.queue.notes.append("wait")
        for work in self.queue.work:
            work()
        self.queue.work.clear()


def on_device(dtype: str = "bfloat16", kernels: BlockKernels | None = None, queue: HostQueue | None = None) -> KVCache:
    """Return a cache whose blocks are treated as a GPU's, though they are in host memory."""
    cache = KVCache(layout(dtype, "cuda"), NUM_BLOCKS, CPU)
    cache._blocks = DeviceBlocks(cache.tensor, queue or HostQueue(CPU), kernels or torch_kernels())
    return cache


def filled(cache: KVCache, seed: int = 0) -> KVCache:
    generator = torch.Generator().manual_seed(seed)
    cache.tensor.copy_(torch.randn(cache.tensor.shape, generator=generator))
    return cache


def payload_of(cache: KVCache, block_ids: list[int], first_layer: int, num_layers: int) -> NDArray[np.uint8]:
    """Return what a gather must give, by another road."""
    part = cache.tensor[block_ids, first_layer : first_layer + num_layers].contiguous()
    return part.view(torch.uint8).flatten().numpy()


CACHES: list[Callable[[], KVCache]] = [lambda: KVCache(layout(), NUM_BLOCKS, CPU), on_device]
RANGES = [([3], 0, 3), ([7, 2, 11, 0], 0, 3), ([5, 1], 1, 2), ([9], 2, 1), (list(range(NUM_BLOCKS)), 0, 1)]


@pytest.mark.parametrize("make", CACHES, ids=["host", "device"])
@pytest.mark.parametrize(("block_ids", "first_layer", "num_layers"), RANGES)
def test_cells_go_into_any_slot_and_back(
    make: Callable[[], KVCache], block_ids: list[int], first_layer: int, num_layers: int
) -> None:
    source: KVRegion = (cache := filled(make()))
    expected = payload_of(cache, block_ids, first_layer, num_layers)
    kinds: list[SlotKind] = ["host", "cuda"] if source.slot_kind == "cuda" else ["host"]
    for kind in kinds:
        target = make()
        (slot,) = source.new_slots(1, expected.nbytes + 100, kind)
        payload, behind = slot[: expected.nbytes], source.read(slot)[expected.nbytes :].copy()
        source.gather(block_ids, first_layer, num_layers, payload)
        assert (source.read(payload) == expected).all()
        assert (source.read(slot)[expected.nbytes :] == behind).all()
        target.scatter(block_ids, first_layer, num_layers, payload)
        assert (payload_of(target, block_ids, first_layer, num_layers) == expected).all()
        untouched = torch.ones(NUM_BLOCKS, 3, dtype=torch.bool)
        untouched[block_ids, first_layer : first_layer + num_layers] = False
        assert not target.tensor[untouched].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_blocks_of_both_devices_have_the_same_bytes(dtype: str) -> None:
    host, device = filled(KVCache(layout(dtype), NUM_BLOCKS, CPU)), filled(on_device(dtype))
    (theirs,), (ours,) = (cache.new_slots(1, 4 * layout(dtype).block_bytes, "host") for cache in (host, device))
    for cache, slot in ((host, theirs), (device, ours)):
        cache.gather([4, 0, 8, 1], 0, 3, slot)
    assert (host.read(theirs) == device.read(ours)).all()


@pytest.mark.parametrize("num_bytes", [8, 64, 1000, 1 << 16])
def test_checksums_are_the_same_wherever_they_are_computed(num_bytes: int) -> None:
    host, device = KVCache(layout(), 2, CPU), on_device()
    data = np.random.default_rng(num_bytes).integers(0, 256, num_bytes, dtype=np.uint8)
    (slot,) = device.new_slots(1, num_bytes, "cuda")
    device.write(slot, data)
    total = host.checksum(data, "words64")
    assert device.checksum(slot, "words64") == device.checksum(data, "words64") == total
    assert host.checksum(data, "xxh3") == device.checksum(data, "xxh3")
    data[num_bytes // 2] ^= 4
    device.write(slot, data)
    assert device.checksum(slot, "words64") == host.checksum(data, "words64") != total
    assert 0 <= total < 1 << 64


def test_device_slots_are_aligned_parts_of_one_piece_of_memory() -> None:
    slots = on_device().new_slots(5, 1000, "cuda")
    tensors = [slot.tensor for slot in slots if isinstance(slot, DeviceSlot)]
    assert len(tensors) == 5 and len({t.untyped_storage().data_ptr() for t in tensors}) == 1
    starts = [t.storage_offset() for t in tensors]
    assert starts == [0, 1024, 2048, 3072, 4096]
    assert [(slot.nbytes, slot[:96].nbytes) for slot in slots] == [(1000, 96)] * 5


def test_a_copy_between_device_slots_stays_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = on_device()
    first, second = cache.new_slots(2, 512, "cuda")
    cache.write(first, np.arange(512, dtype=np.uint8))
    monkeypatch.setattr(Tensor, "cpu", None)
    cache.write(second, first)
    monkeypatch.undo()
    assert (cache.read(second) == np.arange(512, dtype=np.uint8)).all()


@pytest.mark.parametrize("kind", ["host", "cuda"])
def test_every_call_returns_when_the_device_is_done(kind: SlotKind) -> None:
    queue, plain = NotedQueue(), torch_kernels()
    kernels = BlockKernels(
        lambda *args: queue.later(plain.gather, *args), lambda *args: queue.later(plain.scatter, *args), plain.words64
    )
    cache = filled(on_device(kernels=kernels, queue=queue))
    (slot,) = cache.new_slots(1, layout().block_bytes, kind)
    queue.notes.clear()
    cache.gather([3], 0, 3, slot)
    assert queue.notes == ["enter", "kernel", "leave", "mark", "wait"]
    if kind == "cuda":
        assert (cache.read(slot) == payload_of(cache, [3], 0, 3)).all()
    else:
        cache.write(slot, payload_of(cache, [3], 0, 3))
    queue.notes.clear()
    cache.scatter([5], 0, 3, slot)
    assert queue.notes == ["enter", "kernel", "leave", "mark", "wait"]
    assert torch.equal(cache.tensor[5], cache.tensor[3])
    for call in (lambda: cache.checksum(slot, "words64"), lambda: cache.read(slot), lambda: cache.write(slot, slot)):
        queue.notes.clear()
        call()
        assert queue.notes[-2:] == (["mark", "wait"] if kind == "cuda" else [])


def test_what_the_device_says_is_an_error_of_the_transfer() -> None:
    def broken(*args: object) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    cache, fine = on_device(), torch_kernels()
    (slot,) = cache.new_slots(1, layout().block_bytes, "cuda")
    assert isinstance(cache._blocks, DeviceBlocks)
    cache._blocks._kernels = BlockKernels(broken, fine.scatter, broken)
    with pytest.raises(TransferError, match="blocks not gathered: CUDA out of memory"):
        cache.gather([0], 0, 3, slot)
    with pytest.raises(TransferError, match="checksum not computed"):
        cache.checksum(slot, "words64")


def test_host_slots_that_cannot_be_pinned_are_plain(caplog: pytest.LogCaptureFixture) -> None:
    class Unpinned(HostQueue):
        def host_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            raise RuntimeError("too much locked memory")

    cache = filled(on_device(queue=Unpinned(CPU)))
    (slot,) = cache.new_slots(1, layout().block_bytes, "host")
    assert "could not be pinned" in caplog.text
    cache.gather([2], 0, 3, slot)
    assert (cache.read(slot) == payload_of(cache, [2], 0, 3)).all()


@pytest.mark.parametrize("staging", ["auto", "host", "device"])
@pytest.mark.parametrize("makers", [CACHES, CACHES[::-1], [on_device, on_device]], ids=["up", "down", "across"])
async def test_a_prompt_moves_between_devices(makers: list[Callable[[], KVCache]], staging: Staging) -> None:
    """A CPU prefill worker feeds a GPU decode worker, and the other way round: the bytes of a block are the same."""
    source, target = filled(makers[0](), seed=3), makers[1]()
    configs = [
        TransferConfig(
            transport="inproc", slot_bytes=4096, num_slots=2, kv_staging=staging if c.slot_kind == "cuda" else "auto"
        )
        for c in (source, target)
    ]
    transport, done = InprocTransport(), asyncio.get_running_loop().create_future()
    sender = SendSide(source, configs[0], lambda transfer_id, reason: None)
    listener = await transport.listen(Identity("p", 1, source.fingerprint, sender.slot_store), sender.serve)
    linked = asyncio.Event()
    receiver = ReceiveSide(
        target,
        configs[1],
        transport,
        Identity("d", 2, target.fingerprint),
        lambda transfer_id, first_token_id: done.set_result(first_token_id),
        lambda transfer_id, reason: done.set_exception(AssertionError(reason)),
        linked.set,
    )
    receiver.set_peers([listener.address])
    await asyncio.wait_for(linked.wait(), 5)
    receiver.open(1, "p", [6, 2, 9, 4, 0], 0)
    sender.open(1, "d", [1, 2, 3, 4, 5])
    sender.ready(1, SendRange(0, 5, 0, 3))
    sender.commit(1, 77)
    assert await asyncio.wait_for(done, 5) == 77
    assert torch.equal(target.tensor[[6, 2, 9, 4, 0]], source.tensor[[1, 2, 3, 4, 5]])
    await receiver.close()
    await sender.close()
    await transport.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU tests/gpu does this with compiled kernels")
def test_tritons_kernels_do_what_torchs_do() -> None:
    plain, triton = filled(on_device()), filled(on_device(kernels=triton_kernels()))
    (ours,), (theirs,) = (cache.new_slots(1, 2 * layout().block_bytes, "cuda") for cache in (plain, triton))
    for cache, slot in ((plain, ours), (triton, theirs)):
        cache.gather([9, 4], 0, 3, slot)
        cache.scatter([1, 2], 0, 3, slot)
    assert (plain.read(ours) == triton.read(theirs)).all()
    assert plain.checksum(ours, "words64") == triton.checksum(theirs, "words64")
    assert torch.equal(plain.tensor, triton.tensor)
