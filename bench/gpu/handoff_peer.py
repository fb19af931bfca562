"""The decode worker's half of a measured hand-off, in a process of its own.

python -m bench.gpu.handoff_peer
    1. The first line of standard input says, as JSON, which KV memory to make and whom to dial.
    2. Each further line `TRANSFER_ID NUM_BLOCKS` grants blocks to a transfer; the same line comes back.
    3. It ends with its input.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import msgspec
import torch
import uvloop

from bench.gpu.handoff_transfers import SENDER, new_receiver, transfer_config
from bench.gpu.rig import block_kernels
from engine.kv_cache import KVCache
from kvtransfer.transports import open_transport
from protocol.kv_layout import KVFingerprint
from protocol.wire import PeerAddress


async def run() -> None:
    """Receive until the input ends."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    told: dict[str, Any] = json.loads(await reader.readline())
    fingerprint = msgspec.convert(told["fingerprint"], KVFingerprint)
    device = torch.device(fingerprint.device)
    cache = KVCache(fingerprint, told["num_blocks"], device, block_kernels(device))
    config = transfer_config("ucx")
    transport = open_transport(config, bytes.fromhex(told["secret"]))
    side = new_receiver(cache, config, transport)
    side.set_peers([msgspec.convert(told["address"], PeerAddress)])
    try:
        while line := await reader.readline():
            transfer_id, count = map(int, line.split())
            side.open(transfer_id, SENDER, range(count), 0)
            print(f"{transfer_id} {count}", flush=True)
    finally:
        await side.close()
        await transport.close()


if __name__ == "__main__":
    uvloop.run(run())
