"""KV on a GPU: the cache's copies, and hand-offs between two processes that share one GPU."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import msgspec
import pytest
import pytest_asyncio
import torch

from engine.kv_cache import DeviceSlot, KVCache, torch_kernels
from kvtransfer.sending import SendSide
from kvtransfer.tombstones import Ending
from kvtransfer.transport import Buffer, Identity
from kvtransfer.transports import open_transport
from protocol.handoff import SendRange
from protocol.kv_layout import SlotKind, Staging
from tests.contract.workers import SECRET, until
from tests.gpu.handoff_peer import LAYOUTS, config_of, digest

pytestmark = pytest.mark.slow
cuda: Any = torch.cuda  # some of it has no types
BUDGET_S = 120.0
NUM_BLOCKS = 64


def filled(name: str, device: str, seed: int = 0) -> KVCache:
    layout = msgspec.structs.replace(LAYOUTS[name], device=device)
    cache = KVCache(layout, NUM_BLOCKS, torch.device(device))
    cache.tensor.copy_(torch.randn(cache.tensor.shape, generator=torch.Generator().manual_seed(seed)))
    if device == "cuda":
        torch.cuda.synchronize()
    return cache


# --- one process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(LAYOUTS))
@pytest.mark.parametrize("kind", ["cuda", "host"])
def test_gather_and_scatter_are_those_of_a_cpu(name: str, kind: SlotKind) -> None:
    gpu, cpu = filled(name, "cuda"), filled(name, "cpu")
    layout, block_ids = gpu.fingerprint, [17, 3, 60, 0]
    target = KVCache(layout, NUM_BLOCKS, torch.device("cuda"))
    for first_layer, num_layers in ((0, layout.num_layers), (5, 1), (layout.num_layers - 3, 3)):
        num_bytes = len(block_ids) * num_layers * layout.layer_bytes
        (ours,), (theirs,) = gpu.new_slots(1, num_bytes, kind), cpu.new_slots(1, num_bytes, "host")
        gpu.gather(block_ids, first_layer, num_layers, ours)
        cpu.gather(block_ids, first_layer, num_layers, theirs)
        assert (gpu.read(ours) == cpu.read(theirs)).all()
        assert gpu.checksum(ours, "words64") == cpu.checksum(theirs, "words64")
        target.tensor.zero_()
        torch.cuda.synchronize()
        target.scatter([1, 2, 5, 63], first_layer, num_layers, ours)
        layers = slice(first_layer, first_layer + num_layers)
        assert torch.equal(target.tensor[[1, 2, 5, 63], layers], gpu.tensor[block_ids, layers])
        assert int(torch.count_nonzero(target.tensor)) <= num_bytes // 2
        assert not target.tensor[0].any() and not target.tensor[6:63].any()


def test_triton_and_torch_move_the_same() -> None:
    triton = filled("smollm", "cuda")
    torchs = KVCache(triton.fingerprint, NUM_BLOCKS, torch.device("cuda"), torch_kernels())
    torchs.tensor.copy_(triton.tensor)
    torch.cuda.synchronize()
    num_bytes = 2 * triton.fingerprint.block_bytes
    (ours,), (theirs,) = (cache.new_slots(1, num_bytes, "cuda") for cache in (triton, torchs))
    for cache, slot in ((triton, ours), (torchs, theirs)):
        cache.gather([9, 4], 0, 30, slot)
        cache.scatter([1, 2], 0, 30, slot)
    assert torch.equal(triton.tensor, torchs.tensor)
    assert triton.checksum(ours, "words64") == torchs.checksum(theirs, "words64")


@pytest.mark.parametrize("num_bytes", [8, 64, 4096, 4 << 20])
def test_one_bit_changes_the_checksum(num_bytes: int) -> None:
    cache = filled("smollm", "cuda")
    (slot,) = cache.new_slots(1, num_bytes, "cuda")
    data = cache.read(slot)
    total = cache.checksum(slot, "words64")
    assert total == cache.checksum(data, "words64")
    for place in (0, num_bytes // 2, num_bytes - 1):
        for bit in (0, 7):
            changed = data.copy()
            changed[place] ^= 1 << bit
            cache.write(slot, changed)
            assert cache.checksum(slot, "words64") == cache.checksum(changed, "words64") != total


def test_slots_are_aligned_parts_of_one_slab_with_pointers_for_ucx() -> None:
    slots = filled("smollm", "cuda").new_slots(4, 100_000, "cuda")
    tensors = [slot.tensor for slot in slots if isinstance(slot, DeviceSlot)]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == 1
    for slot, tensor in zip(slots, tensors, strict=True):
        interface: dict[str, Any] = slot.__cuda_array_interface__  # type: ignore[attr-defined]
        assert interface["data"][0] == tensor.data_ptr() and tensor.data_ptr() % 512 == 0
        assert (interface["shape"], interface["typestr"]) == ((100_000,), "|u1")


@pytest.mark.parametrize("kind", ["cuda", "host"])
def test_copies_run_beside_the_compute_stream_and_are_seen_by_what_is_launched_later(kind: SlotKind) -> None:
    source, target = filled("qwen", "cuda"), KVCache(LAYOUTS["qwen"], NUM_BLOCKS, torch.device("cuda"))
    (slot,) = source.new_slots(1, source.fingerprint.block_bytes, kind)
    compute, seen = cuda.Stream(), cuda.Stream()
    with torch.cuda.stream(compute):
        cuda._sleep(4_000_000_000)  # two seconds of a busy compute stream
    for number in range(50):
        source.gather([number], 0, source.fingerprint.num_layers, slot)
        target.scatter([number + 1], 0, source.fingerprint.num_layers, slot)
        with torch.cuda.stream(seen):
            assert torch.equal(target.tensor[number + 1], source.tensor[number])
    assert not compute.query(), "the copies waited for the compute stream"
    compute.synchronize()


def test_cells_handed_over_behind_an_event_are_the_computed_ones() -> None:
    cache = filled("qwen", "cuda")
    (slot,) = cache.new_slots(1, cache.fingerprint.block_bytes, "cuda")
    compute, done = cuda.Stream(), cuda.Event()
    for number in range(5):
        with torch.cuda.stream(compute):
            cuda._sleep(20_000_000)
            cache.tensor[7].fill_(float(number + 1))
            done.record(compute)
        done.synchronize()  # what the contract asks of whoever hands cells over
        cache.gather([7], 0, cache.fingerprint.num_layers, slot)
        values = torch.from_numpy(cache.read(slot)).view(torch.bfloat16)
        assert bool((values == number + 1).all())


# --- two processes ---------------------------------------------------------------------------------------------------


class Prefill:
    """A prefill worker's transfers here, and a decode worker's in a child."""

    def __init__(self, cache: KVCache, staging: Staging) -> None:
        self.cache = cache
        self.config = config_of(staging)
        self.transport = open_transport(self.config, SECRET)
        self.ended: dict[int, Ending | None] = {}
        self.side = SendSide(cache, self.config, self.ended.__setitem__)
        self.child: asyncio.subprocess.Process

    async def start(self, name: str, staging: Staging) -> dict[str, Any]:
        """Start both; return the child's first word, which is that they are linked."""
        identity = Identity("p0", 1, self.cache.fingerprint, self.side.slot_store)
        listener = await self.transport.listen(identity, self.side.serve)
        arguments = [name, NUM_BLOCKS, staging, listener.address.port]
        self.child = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "tests.gpu.handoff_peer", *map(str, arguments)],
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        return await self.word()

    async def word(self) -> dict[str, Any]:
        """Return the child's next word."""
        assert self.child.stdout is not None
        word: dict[str, Any] = json.loads(await asyncio.wait_for(self.child.stdout.readline(), BUDGET_S))
        return word

    def push(self, transfer_id: int, num_groups: int = 4) -> None:
        """Hand every block over, a group of layers at a time, as a prefill does."""
        assert self.child.stdin is not None
        self.child.stdin.write(f"{transfer_id}\n".encode())
        self.side.open(transfer_id, "d0", range(NUM_BLOCKS))
        num_layers = self.cache.fingerprint.num_layers
        edges = [num_layers * group // num_groups for group in range(num_groups + 1)]
        for first, last in zip(edges, edges[1:], strict=False):
            self.side.ready(transfer_id, SendRange(0, NUM_BLOCKS, first, last - first))
        self.side.commit(transfer_id, 42)

    async def close(self) -> None:
        """Close both; every slot is free then."""
        with suppress(ProcessLookupError):
            self.child.kill()
        await self.child.wait()
        await self.side.close()
        await self.transport.close()
        await asyncio.sleep(0.05)
        assert self.side.slots[0] == self.side.slots[1]


@pytest_asyncio.fixture
async def start() -> AsyncIterator[Callable[..., Any]]:
    """Return what starts a pair: (KV cache here, its staging, the child's) -> the pair and its first word."""
    pytest.importorskip("ucxx", reason="needs ucxx")
    pairs: list[Prefill] = []

    async def make(cache: KVCache, ours: Staging, theirs: Staging) -> tuple[Prefill, dict[str, Any]]:
        pairs.append(pair := Prefill(cache, ours))
        return pair, await pair.start(cache.fingerprint.model_hash, theirs)

    yield make
    for pair in pairs:
        await pair.close()


@pytest.mark.parametrize("name", list(LAYOUTS))
@pytest.mark.parametrize(
    ("staging", "agreed"), [("device", ["cuda", "words64"]), ("auto", ["cuda", "words64"]), ("host", ["host", "xxh3"])]
)
async def test_blocks_arrive_byte_for_byte(
    start: Callable[..., Any], name: str, staging: Staging, agreed: list[str], record_property: Callable[..., None]
) -> None:
    pair, linked = await start(filled(name, "cuda"), staging, staging)
    assert linked == {"event": "links", "agreed": [agreed]}
    expected = digest(pair.cache, range(NUM_BLOCKS))
    for transfer_id in range(3):
        before_s = pair.side.stats.transfer_s
        pair.push(transfer_id)
        word = await pair.word()
        assert word == {"event": "landed", "id": transfer_id, "token": 42, "digest": expected}
        await until(lambda transfer_id=transfer_id: transfer_id in pair.ended)  # type: ignore[misc]
        assert pair.ended[transfer_id] is None
        num_bytes = NUM_BLOCKS * pair.cache.fingerprint.block_bytes
        rate = num_bytes / (pair.side.stats.transfer_s - before_s) / 1e9
        record_property(f"GB_per_s_{transfer_id}", rate)
        print(f"{name}, {staging}: {num_bytes >> 20} MiB at {rate:.2f} GB/s")


@pytest.mark.parametrize("name", ["qwen", "smollm"])
async def test_a_cpu_prefill_worker_feeds_a_gpu_decode_worker(start: Callable[..., Any], name: str) -> None:
    pair, linked = await start(filled(name, "cpu", seed=5), "auto", "auto")
    assert linked == {"event": "links", "agreed": [["host", "xxh3"]]}
    pair.push(1)
    assert (await pair.word())["digest"] == digest(pair.cache, range(NUM_BLOCKS))


@pytest.mark.parametrize("staging", ["device", "host"])
async def test_one_flipped_bit_is_found_and_the_piece_sent_again(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, staging: Staging
) -> None:
    pair, _ = await start(filled("smollm", "cuda"), staging, staging)
    honest, num_pieces = pair.cache.checksum, 0

    def dishonest(payload: Buffer, algorithm: str) -> int:
        nonlocal num_pieces
        num_pieces += 1
        total: int = honest(payload, algorithm)
        if num_pieces == 3:
            damaged = pair.cache.read(payload).copy()
            damaged[-1] ^= 0x40
            pair.cache.write(payload, damaged)
        return total

    monkeypatch.setattr(pair.cache, "checksum", dishonest)
    pair.push(1)
    assert (await pair.word())["digest"] == digest(pair.cache, range(NUM_BLOCKS))
    await until(lambda: 1 in pair.ended)
    assert pair.ended[1] is None and caplog.text.count("arrived damaged and is sent again") == 1


@pytest.mark.parametrize("staging", ["device", "host"])
async def test_a_decode_worker_killed_in_a_transfer_leaves_no_slot_behind(
    start: Callable[..., Any], staging: Staging
) -> None:
    pair, _ = await start(filled("llama", "cuda"), staging, staging)
    pair.push(1)
    await until(lambda: pair.side.stats.num_pieces >= 4)
    pair.child.send_signal(signal.SIGKILL)
    killed_s = time.monotonic()
    await until(lambda: 1 in pair.ended)
    assert "decode worker d0 lost" in str(pair.ended[1])
    await until(lambda: pair.side.slots[0] == pair.side.slots[1])
    assert time.monotonic() - killed_s < 5
    block = pair.cache.tensor[0].clone()  # the GPU still works here
    assert torch.equal(block, pair.cache.tensor[0])
