"""A prefill or decode worker's transfers in a process of their own, to be killed or stopped by a test.

python -m tests.contract.peer_process prefill NUM_BLOCKS
    prints the port; on each line `TRANSFER_ID` it sends blocks 0..NUM_BLOCKS-1 to decode worker d0
python -m tests.contract.peer_process decode NUM_BLOCKS PORT
    links with prefill worker p0; on each line `TRANSFER_ID` it grants all its blocks
"""

from __future__ import annotations

import asyncio
import sys

import uvloop

from kvtransfer.receiving import ReceiveSide
from kvtransfer.sending import SendSide
from kvtransfer.transport import Identity
from kvtransfer.ucx import UcxTransport
from protocol.handoff import SendRange
from protocol.wire import PeerAddress
from tests.contract.workers import PROCESS_CONFIG, PROCESS_LAYOUT, SECRET
from tests.kvtransfer.memory_region import MemoryRegion


async def lines() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


async def prefill(num_blocks: int) -> None:
    transport = UcxTransport(PROCESS_CONFIG, SECRET)
    side = SendSide(MemoryRegion(PROCESS_LAYOUT, num_blocks, seed=1), PROCESS_CONFIG, lambda transfer_id, reason: None)
    listener = await transport.listen(Identity("p0", 1, PROCESS_LAYOUT, side.slot_store), side.serve)
    print(listener.address.port, flush=True)
    reader = await lines()
    while line := await reader.readline():
        transfer_id = int(line)
        side.open(transfer_id, "d0", range(num_blocks))
        side.ready(transfer_id, SendRange(0, num_blocks, 0, PROCESS_LAYOUT.num_layers))
        side.commit(transfer_id, 5)


async def decode(num_blocks: int, port: int) -> None:
    transport = UcxTransport(PROCESS_CONFIG, SECRET)
    side = ReceiveSide(
        MemoryRegion(PROCESS_LAYOUT, num_blocks),
        PROCESS_CONFIG,
        transport,
        Identity("d0", 2, PROCESS_LAYOUT),
        lambda transfer_id, first_token_id: None,
        lambda transfer_id, reason: None,
        lambda: print("links", flush=True),
    )
    side.set_peers([PeerAddress(worker_id="p0", instance=1, transport="ucx", host="127.0.0.1", port=port)])
    reader = await lines()
    while line := await reader.readline():
        side.open(int(line), "p0", range(num_blocks), 0)


if __name__ == "__main__":
    if sys.argv[1] == "prefill":
        uvloop.run(prefill(int(sys.argv[2])))
    else:
        uvloop.run(decode(int(sys.argv[2]), int(sys.argv[3])))
