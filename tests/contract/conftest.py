"""Every test of this folder runs on each transport and on both event loops; real processes on uvloop, as workers do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
import uvloop

from kvtransfer.config import TransferConfig
from tests.contract.workers import Site


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Name the event loops."""
    if item.path.name == "test_processes.py":
        return {"uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(params=["inproc", pytest.param("ucx", marks=pytest.mark.ucx)])
def transport_name(request: pytest.FixtureRequest) -> str:
    """Return the transport under test."""
    return str(request.param)


@pytest_asyncio.fixture
async def site(transport_name: str) -> AsyncIterator[Site]:
    """Return a place where prefill and decode workers can be started; it closes them."""
    site = Site(TransferConfig(transport=transport_name, slot_bytes=16384, num_slots=4))
    yield site
    await site.close()
