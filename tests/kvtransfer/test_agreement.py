"""What two workers settle by their first words, and the ways between them."""

from __future__ import annotations

import itertools

import msgpack
import pytest

from kvtransfer.agreement import check_hello, check_ready, hello_of, ready_of
from kvtransfer.config import TransferConfig
from kvtransfer.slots import SlotStore
from kvtransfer.transport import Agreement, Identity
from kvtransfer.ways import CUDA_IPC, CUDA_OVER_TCP, SHARED_MEMORY, TCP_ONLY, Way, ways_to
from protocol.errors import ConfigError, FingerprintMismatch, ProtocolError
from protocol.kv_layout import HostSlots, Staging
from protocol.wire import PeerAddress, PeerHello, PeerReady, decode
from tests.kvtransfer.memory_region import DeviceRegion, MemoryRegion, fingerprint

STAGINGS: tuple[Staging, ...] = ("host", "auto", "device")
THERE = PeerAddress(worker_id="p0", instance=1, transport="ucx")


def identity(name: str, instance: int, region: type[MemoryRegion] = DeviceRegion) -> Identity:
    memory = region(fingerprint(), 2)
    return Identity(name, instance, memory.fingerprint, SlotStore(memory, TransferConfig(slot_bytes=4096)))


@pytest.mark.parametrize(("ours", "theirs"), list(itertools.product(STAGINGS, STAGINGS)))
def test_both_ends_come_to_the_same(ours: Staging, theirs: Staging) -> None:
    dialer, acceptor = identity("d0", 2), identity("p0", 1)
    there = check_hello(acceptor, theirs, hello_of(dialer, ours))
    here = check_ready(THERE, dialer, ours, ready_of(acceptor, theirs, there.checksum))
    assert here.checksum == there.checksum == ("words64" if "cuda" in (here.kind, there.kind) else "xxh3")
    for mine, other, agreed in ((ours, theirs, here), (theirs, ours, there)):
        assert agreed.kind == ("cuda" if mine == "device" or (mine == "auto" and other != "host") else "host")


def test_one_who_says_nothing_of_memory_has_it_in_the_host_with_xxh3() -> None:
    plain = {"type": "PeerHello", "worker_id": "d0", "instance": 2}
    layout = {"model_hash": "model", "dtype": "float32", "block_size": 16, "num_layers": 3, "num_kv_heads": 1}
    hello = decode(msgpack.packb({**plain, "fingerprint": {**layout, "head_dim": 4}}))
    assert isinstance(hello, PeerHello) and hello.fingerprint.device == "cpu"
    acceptor = identity("p0", 1)
    assert check_hello(acceptor, "auto", hello) == Agreement("host", "xxh3")
    with pytest.raises(FingerprintMismatch, match="need the checksum words64"):
        check_hello(acceptor, "device", hello)
    ready = decode(msgpack.packb({"type": "PeerReady", "worker_id": "p0", "instance": 1}))
    assert isinstance(ready, PeerReady)
    assert check_ready(THERE, identity("d0", 2), "auto", ready) == Agreement("host", "xxh3")


def test_a_checksum_that_does_not_fit_the_memory_is_a_breach() -> None:
    dialer, acceptor = identity("d0", 2), identity("p0", 1)
    for staging, checksum in (("auto", "xxh3"), ("host", "words64"), ("host", "sha256")):
        with pytest.raises(ProtocolError, match=f"chose the checksum {checksum}"):
            check_ready(THERE, dialer, "auto", ready_of(acceptor, staging, checksum))  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"worker_id": "p1"}, {"instance": 2}])
def test_another_one_at_the_address_is_a_breach(change: dict[str, object]) -> None:
    words = {"worker_id": "p0", "instance": 1, **change}
    ready = PeerReady(**words)  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match="answers there"):
        check_ready(THERE, identity("d0", 2), "host", ready)


def test_the_device_is_told_but_need_not_agree() -> None:
    gpu, cpu = fingerprint(device="cuda"), fingerprint()
    gpu.require_equal(cpu, "p0")
    with pytest.raises(FingerprintMismatch, match=r"num_layers: 4 here, 3 there; device: cuda here, cpu there"):
        fingerprint(4, device="cuda").require_equal(cpu, "p0")
    with pytest.raises(FingerprintMismatch) as told:
        fingerprint(4).require_equal(cpu, "p0")
    assert "device" not in str(told.value)


def test_ways_of_one_host_begin_with_the_gpu_and_end_with_tcp() -> None:
    for host in ("127.0.0.1", "localhost", "127.3.2.1"):
        assert ways_to(host, "auto", is_users_choice=False) == [
            Way("auto", CUDA_IPC), Way("host", SHARED_MEMORY), Way("host", TCP_ONLY)
        ]  # fmt: skip
        assert ways_to(host, "host", is_users_choice=False) == [Way("host", SHARED_MEMORY), Way("host", TCP_ONLY)]
        assert ways_to(host, "device", is_users_choice=False) == [Way("device", CUDA_IPC)]


def test_between_hosts_gpu_memory_is_for_those_who_ask() -> None:
    for staging in ("auto", "host"):
        assert ways_to("10.0.0.7", staging, is_users_choice=False) == [Way("host", TCP_ONLY)]
    assert ways_to("node7", "device", is_users_choice=False) == [Way("device", CUDA_OVER_TCP)]


def test_transports_that_the_user_names_are_used_for_both_memories() -> None:
    for host in ("127.0.0.1", "10.0.0.7"):
        assert ways_to(host, "auto", is_users_choice=True) == [Way("auto"), Way("host")]
        assert ways_to(host, "device", is_users_choice=True) == [Way("device")]
        assert ways_to(host, "host", is_users_choice=True) == [Way("host")]


def test_slots_of_a_store_lie_where_staging_says() -> None:
    host, device = HostSlots(), DeviceRegion(fingerprint(), 2)
    assert SlotStore(host, TransferConfig(slot_bytes=4096), 3).counts == (3, 3)
    assert SlotStore(device, TransferConfig(slot_bytes=4096)).preferred_kind == "cuda"
    assert SlotStore(device, TransferConfig(slot_bytes=4096)).counts == (2, 2)  # for the first self-test
    assert SlotStore(device, TransferConfig(slot_bytes=4096, kv_staging="host")).preferred_kind == "host"
    with pytest.raises(ConfigError, match="device was asked for"):
        SlotStore(host, TransferConfig(kv_staging="device"))
    with pytest.raises(ConfigError, match="kv_staging must be"):
        TransferConfig(kv_staging="gpu")  # type: ignore[arg-type]


def test_slots_are_as_large_as_the_memory_of_the_blocks_allows_unless_somebody_says() -> None:
    host, device = HostSlots(), DeviceRegion(fingerprint(), 2)
    for memory, layer_bytes, expected in ((host, 4096, 1 << 20), (host, 3 << 20, 3 << 20), (device, 4096, 4 << 20)):
        assert SlotStore(memory, TransferConfig(), layer_bytes=layer_bytes).slot_bytes == expected
    assert SlotStore(device, TransferConfig(slot_bytes=8192), layer_bytes=8192).slot_bytes == 8192


def test_borrowed_slots_are_free_ones_first_and_stay_for_the_next() -> None:
    pool = SlotStore(DeviceRegion(fingerprint(), 2), TransferConfig(slot_bytes=4096)).pool("cuda")
    borrowed = pool.borrow(3)
    assert (pool.num_free, pool.num_total) == (0, 3)
    for slot in borrowed:
        pool.give(slot)
    assert {id(slot) for slot in pool.borrow(3)} == {id(slot) for slot in borrowed}
