"""The self-test of a connection beside transfers that use the same slots."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np

from kvtransfer.config import TransferConfig
from kvtransfer.self_test import run_self_test
from kvtransfer.slots import SlotStore
from protocol.kv_layout import HostSlots


class End:
    """One end of a connection in memory, whose pool others use as soon as a slot is free."""

    agreement = SimpleNamespace(kind="host", checksum="xxh3")

    def __init__(self) -> None:
        self.store = SlotStore(HostSlots(), TransferConfig(slot_bytes=4096), 4)
        self.peer: End
        self._inbox: asyncio.Queue[Any] = asyncio.Queue()
        self._arrivals: dict[int, tuple[Any, asyncio.Future[None]]] = {}
        self.num_taken = 0

    def post(self, message: Any) -> None:
        self.peer._inbox.put_nowait(message)

    async def receive(self) -> Any:
        return await self._inbox.get()

    def post_receive(self, buffer: Any, tag: int) -> asyncio.Future[None]:
        arrival = asyncio.get_running_loop().create_future()
        self._arrivals[tag] = (buffer, arrival)
        return arrival

    def send(self, payload: Any, tag: int) -> asyncio.Future[None]:
        buffer, arrival = self.peer._arrivals.pop(tag)
        buffer[: payload.nbytes] = payload
        sent = asyncio.get_running_loop().create_future()
        for done in (arrival, sent):
            done.set_result(None)
            done.add_done_callback(lambda _: asyncio.get_running_loop().call_soon(self._use_every_slot))
        return sent

    def _use_every_slot(self) -> None:
        for end in (self, self.peer):
            pool = end.store.pool("host")
            slots = [slot for _ in range(pool.num_free) if (slot := pool.take()) is not None]
            for slot in slots:
                np.asarray(slot)[:] = 0xFF
                pool.give(slot)
            end.num_taken += len(slots)


async def test_a_slot_is_compared_before_others_write_to_it() -> None:
    ends = End(), End()
    ends[0].peer, ends[1].peer = ends[1], ends[0]
    await asyncio.gather(*(run_self_test(end, end.store) for end in ends))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    for end in ends:
        assert end.num_taken > 0 and end.store.counts == (4, 4), "all slots are back"
