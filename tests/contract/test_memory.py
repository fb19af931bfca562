"""Where slots lie: what two ends agree on, what each kind of memory moves, and what happens where one does not work."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from kvtransfer.transport import Endpoint
from protocol.errors import ConfigError
from protocol.handoff import SendRange
from protocol.kv_layout import KVFingerprint, SlotBuffer, Staging
from tests.contract.workers import DecodeWorker, Plan, PrefillWorker, Site, until
from tests.kvtransfer.memory_region import DeviceRegion, MemoryRegion, OpaqueSlot, fingerprint

pytestmark = pytest.mark.usefixtures("pretended_device")
over_ucx = pytest.mark.parametrize("transport_name", [pytest.param("ucx", marks=pytest.mark.ucx)])  # only it has tests
NUM_LAYERS = 3


def whole(transfer_id: int, num_blocks: int = 30) -> Plan:
    blocks = tuple(range(num_blocks))
    return Plan(transfer_id, blocks, blocks, 0, (SendRange(0, num_blocks, 0, NUM_LAYERS),), 5)


async def start(
    site: Site, prefill: tuple[type[MemoryRegion], Staging], decode: tuple[type[MemoryRegion], Staging]
) -> tuple[PrefillWorker, DecodeWorker]:
    """Start two workers that are linked, each with a kind of memory and a staging."""
    sender = await site.prefill(region=prefill[0], config=replace(site.config, kv_staging=prefill[1]))
    receiver = await site.decode(sender, region=decode[0], config=replace(site.config, kv_staging=decode[1]))
    return sender, receiver


def ends(prefill: PrefillWorker, decode: DecodeWorker) -> tuple[Endpoint, Endpoint]:
    return prefill.side._peers["d0"].endpoint, decode.side._links["p0"].endpoint


async def passes(prefill: PrefillWorker, decode: DecodeWorker, transfer_id: int) -> None:
    """Assert that a transfer arrives byte for byte."""
    plan = whole(transfer_id)
    plan.receive(decode, "p0")
    await plan.send(prefill, "d0")
    await until(lambda: decode.is_over(transfer_id) and transfer_id in prefill.ended)
    plan.check(prefill, decode)


@pytest.mark.parametrize(
    ("prefill", "decode", "expected"),
    [
        ((DeviceRegion, "auto"), (DeviceRegion, "auto"), ("cuda", "cuda", "words64")),
        ((DeviceRegion, "device"), (DeviceRegion, "auto"), ("cuda", "cuda", "words64")),
        ((DeviceRegion, "auto"), (DeviceRegion, "host"), ("host", "host", "xxh3")),
        ((DeviceRegion, "host"), (DeviceRegion, "auto"), ("host", "host", "xxh3")),
        ((MemoryRegion, "auto"), (DeviceRegion, "auto"), ("host", "host", "xxh3")),
        ((DeviceRegion, "auto"), (MemoryRegion, "auto"), ("host", "host", "xxh3")),
        ((DeviceRegion, "device"), (MemoryRegion, "auto"), ("cuda", "host", "words64")),
        ((MemoryRegion, "host"), (DeviceRegion, "device"), ("host", "cuda", "words64")),
        ((DeviceRegion, "device"), (DeviceRegion, "host"), ("cuda", "host", "words64")),
    ],
)
async def test_two_ends_agree_on_memory_and_checksum(
    site: Site,
    prefill: tuple[type[MemoryRegion], Staging],
    decode: tuple[type[MemoryRegion], Staging],
    expected: tuple[str, str, str],
) -> None:
    sender, receiver = await start(site, prefill, decode)
    sending, receiving = (end.agreement for end in ends(sender, receiver))
    assert (sending.kind, receiving.kind, sending.checksum) == expected
    assert receiving.checksum == sending.checksum
    await passes(sender, receiver, 1)
    assert sender.region.algorithms == receiver.region.algorithms == {expected[2]}
    taken = receiver.side._links["p0"].posted.values()
    assert {isinstance(posted.slot, OpaqueSlot) for posted in taken} == {expected[1] == "cuda"}


async def test_one_prefill_serves_both_kinds_of_memory_at_once(site: Site) -> None:
    sender = await site.prefill(region=DeviceRegion)
    on_device = await site.decode(sender, name="d0", region=DeviceRegion)
    on_host = await site.decode(sender, name="d1")
    for decode, name in ((on_device, "d0"), (on_host, "d1")):
        plan = whole(int(name[1]))
        plan.receive(decode, "p0")
        await plan.send(sender, name)
    await until(lambda: 0 in on_device.complete and 1 in on_host.complete)
    whole(0).check(sender, on_device)
    whole(1).check(sender, on_host)
    assert sender.region.algorithms == {"xxh3", "words64"}


async def test_a_checksum_that_one_end_lacks_is_refused_on_both_sides(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    class OldRegion(MemoryRegion):
        """Knows xxh3 only."""

        @property
        def checksums(self) -> tuple[str, ...]:
            return ("xxh3",)

    fine = await site.decode(await site.prefill(region=OldRegion), region=DeviceRegion)  # yields to host memory
    assert len(fine.side.links) == 1
    insisting = replace(site.config, kv_staging="device")
    other = await site.prefill("p1", 3, region=OldRegion)
    with caplog.at_level(logging.WARNING):
        decode = await site.decode(name="d9", region=DeviceRegion, config=insisting)
        decode.side.set_peers([other.address])
        await until(lambda: "no link with prefill worker p1" in caplog.text)
    assert "worker p1 and d9 need the checksum words64" in caplog.text
    assert "there: xxh3, words64; here: xxh3" in caplog.text
    assert decode.side.links == ()


async def test_a_difference_of_device_alone_refuses_nobody(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    sender = await site.prefill()
    layout = fingerprint(NUM_LAYERS, device="cuda")
    receiver = await site.decode(layout=layout, region=DeviceRegion)
    receiver.side.set_peers([sender.address])
    await until(lambda: len(receiver.side.links) == 1)
    await passes(sender, receiver, 1)
    other: KVFingerprint = fingerprint(NUM_LAYERS, "other", device="cuda")
    with caplog.at_level(logging.ERROR, logger="kvtransfer.linking"):
        stranger = await site.decode(layout=other, name="d1", region=DeviceRegion)
        stranger.side.set_peers([sender.address])
        await until(lambda: bool(caplog.records))
    assert "model_hash: other here, model there; device: cuda here, cpu there" in caplog.text
    assert stranger.side.links == ()


@over_ucx
@pytest.mark.parametrize("broken", ["write", "read", "checksum", "new_slots"])
@pytest.mark.parametrize("at_prefill", [True, False], ids=["prefill", "decode"])
async def test_where_device_memory_fails_its_self_test_the_host_takes_over(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str, at_prefill: bool
) -> None:
    class Broken(DeviceRegion):
        pass

    kinds = (Broken, DeviceRegion) if at_prefill else (DeviceRegion, Broken)
    with caplog.at_level(logging.WARNING):
        sender = await site.prefill(region=kinds[0])
        monkeypatch.setattr(Broken, "broken", broken)
        receiver = await site.decode(sender, region=kinds[1])
    assert [end.agreement.kind for end in ends(sender, receiver)] == ["host", "host"]
    told = [record.getMessage() for record in caplog.records if record.name in ("kvtransfer.ucx", "kvtransfer.slots")]
    assert sum("host memory" in line for line in told) == 1, told
    await passes(sender, receiver, 1)
    ends(sender, receiver)[1].abort("cable")
    caplog.clear()
    await until(lambda: not receiver.side.links)
    await until(lambda: len(receiver.side.links) == 1)
    assert "host memory" not in caplog.text  # remembered: the next connection begins where this one passed
    await passes(sender, receiver, 2)


@over_ucx
@pytest.mark.parametrize("what", ["payload", "sum"])
async def test_the_self_test_compares_bytes_and_checksums(
    site: Site, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    class Wrong(DeviceRegion):
        """Loses a byte on its way out of device memory, or adds up otherwise than a CPU."""

        def read(self, slot: SlotBuffer) -> NDArray[np.uint8]:
            data = super().read(slot)
            data[-1] ^= isinstance(slot, OpaqueSlot) and what == "payload"
            return data

        def checksum(self, payload: SlotBuffer, algorithm: str) -> int:
            return super().checksum(payload, algorithm) ^ (isinstance(payload, OpaqueSlot) and what == "sum")

    with caplog.at_level(logging.WARNING):
        sender = await site.prefill(region=DeviceRegion)
        receiver = await site.decode(sender, region=Wrong)
    assert ("arrived damaged" if what == "payload" else "not the one that a CPU computes") in caplog.text
    await passes(sender, receiver, 1)
    assert receiver.side._links["p0"].endpoint.agreement.checksum == "xxh3"


@over_ucx
async def test_who_insists_on_device_memory_gets_no_link_without_it(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(DeviceRegion):
        pass

    sender = await site.prefill(region=DeviceRegion)
    receiver = await site.decode(region=Broken, config=replace(site.config, kv_staging="device"))
    Broken.broken = "read"
    with caplog.at_level(logging.WARNING, logger="kvtransfer.linking"):
        receiver.side.set_peers([sender.address])
        await until(lambda: "the device cannot read" in caplog.text)
    assert receiver.side.links == ()


async def test_device_memory_that_does_not_exist_is_said_at_the_start(site: Site) -> None:
    class Broken(DeviceRegion):
        broken = "new_slots"

    insisting = replace(site.config, kv_staging="device")
    with pytest.raises(ConfigError, match="no slots in device memory: the device cannot new_slots"):
        await site.prefill(region=Broken, config=insisting)
    with pytest.raises(ConfigError, match="KV blocks are in host memory"):
        await site.prefill(config=insisting)


@pytest.mark.parametrize("broken", ["gather", "checksum", "scatter"])
async def test_a_device_that_fails_later_ends_its_transfer_and_loses_no_slot(
    site: Site, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    class Sometimes(DeviceRegion):
        pass

    sender, receiver = await start(site, (Sometimes, "auto"), (Sometimes, "auto"))
    await passes(sender, receiver, 1)
    monkeypatch.setattr(Sometimes, "broken", broken)
    plan = whole(2)
    plan.receive(receiver, "p0")
    await plan.send(sender, "d0")
    await until(lambda: 2 in sender.ended and 2 in receiver.failed)
    assert f"the device cannot {broken}" in str(sender.ended[2])
    assert f"the device cannot {broken}" in receiver.failed[2]
    assert receiver.side.stats.num_corrupt_pieces == 0
    monkeypatch.undo()
    await asyncio.sleep(0.05)
    await passes(sender, receiver, 3)
