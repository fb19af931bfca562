"""Every test of this folder runs on each transport and on both event loops; real processes on uvloop, as workers do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
import uvloop

from kvtransfer import ucx_driver
from kvtransfer.config import TransferConfig
from tests.contract.workers import Site
from tests.kvtransfer.memory_region import DeviceRegion, MemoryRegion


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Name the event loops."""
    if item.path.name == "test_processes.py":
        return {"uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what says nothing new: opaque slots on the slower of the two event loops."""
    here = Path(__file__).parent
    items[:] = [i for i in items if i.path.parent != here or not ("asyncio-" in i.name and "-device" in i.name)]


@pytest.fixture(params=["inproc", pytest.param("ucx", marks=pytest.mark.ucx)])
def transport_name(request: pytest.FixtureRequest) -> str:
    """Return the transport under test."""
    return str(request.param)


@pytest.fixture
def region() -> type[MemoryRegion]:
    """Return what the KV memory of workers is; test_sessions.py has it both ways."""
    return MemoryRegion


@pytest.fixture
def pretended_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let UCX pass for one with CUDA's transports. It takes opaque slots for host memory, which on a CPU they are."""
    monkeypatch.setattr(ucx_driver, "offered_device_transports", lambda context: frozenset({"cuda_copy", "cuda_ipc"}))


@pytest_asyncio.fixture
async def site(transport_name: str, region: type[MemoryRegion], request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    """Return a place where prefill and decode workers can be started; it closes them."""
    if region is DeviceRegion:
        request.getfixturevalue("pretended_device")
    site = Site(TransferConfig(transport=transport_name, slot_bytes=16384, num_slots=4), region)
    yield site
    await site.close()
