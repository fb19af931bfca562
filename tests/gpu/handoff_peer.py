"""A decode worker's transfers in a process of their own, its KV on the GPU: the other half of test_handoff.py.

python -m tests.gpu.handoff_peer LAYOUT NUM_BLOCKS STAGING PORT
    links with prefill worker p0 and prints one JSON object for each thing that happens; on each line `TRANSFER_ID` it
    grants blocks NUM_BLOCKS-1 .. 0, in this order, so that no block keeps its number
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from typing import Any, cast

import msgspec
import torch
import uvloop

from engine.kv_cache import KVCache
from kvtransfer.config import TransferConfig
from kvtransfer.receiving import ReceiveSide
from kvtransfer.transport import Identity
from kvtransfer.ucx import UcxTransport
from protocol.kv_layout import KVFingerprint, Staging
from protocol.wire import PeerAddress
from tests.contract.peer_process import lines
from tests.contract.workers import SECRET

# What a block of Llama-3.1-8B, Qwen3-1.7B and SmolLM2-135M looks like.
LAYOUTS = {
    "llama": KVFingerprint("llama", "bfloat16", 16, 32, 8, 128, "bfloat16"),
    "qwen": KVFingerprint("qwen", "bfloat16", 16, 28, 8, 128, "bfloat16"),
    "smollm": KVFingerprint("smollm", "bfloat16", 16, 30, 3, 64, "bfloat16"),
}


def config_of(staging: Staging) -> TransferConfig:
    """Return the defaults, with budgets for a process that compiles kernels meanwhile."""
    return TransferConfig(kv_staging=staging, connect_s=60.0, progress_s=10.0)


def digest(cache: KVCache, block_ids: Sequence[int]) -> str:
    """Return a digest of the bytes of some blocks, in this order."""
    blocks = cache.tensor[list(block_ids)].contiguous().view(torch.uint8).cpu()
    return hashlib.sha256(blocks.numpy().tobytes()).hexdigest()


def tell(**what: Any) -> None:
    """Say what happened."""
    print(json.dumps(what), flush=True)


async def decode(layout: KVFingerprint, num_blocks: int, staging: Staging, port: int) -> None:
    cache = KVCache(layout, num_blocks, torch.device("cuda"))
    block_ids = range(num_blocks - 1, -1, -1)

    def landed(transfer_id: int, first_token_id: int) -> None:
        tell(event="landed", id=transfer_id, token=first_token_id, digest=digest(cache, block_ids))
        cache.tensor.zero_()
        torch.cuda.synchronize()

    def links() -> None:
        agreed = [(link.endpoint.agreement.kind, link.endpoint.agreement.checksum) for link in side._links.values()]
        tell(event="links", agreed=agreed)

    side = ReceiveSide(
        cache,
        config_of(staging),
        UcxTransport(config_of(staging), SECRET),
        Identity("d0", 2, layout),
        landed,
        lambda transfer_id, reason: tell(event="failed", id=transfer_id, reason=reason),
        links,
    )
    side.set_peers([PeerAddress(worker_id="p0", instance=1, transport="ucx", host="127.0.0.1", port=port)])
    reader = await lines()
    while line := await reader.readline():
        side.open(int(line), "p0", block_ids, 0)


if __name__ == "__main__":
    name, num_blocks, staging, port = sys.argv[1:]
    layout = msgspec.structs.replace(LAYOUTS[name], device="cuda")
    uvloop.run(decode(layout, int(num_blocks), cast(Staging, staging), int(port)))
