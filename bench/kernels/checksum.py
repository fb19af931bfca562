"""What a piece's checksum costs beside the copy that any hand-off needs: `python -m bench.kernels.checksum`.

1. A slot's worth of blocks is copied out of memory much larger than a cache, as the sender's gather does.
2. The slot is summed up, by each checksum. 3. Both in turns, on one thread's CPU time; medians, and the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Final

import numpy as np
import xxhash

from kernels.checksum import checksum as words64

MIB: Final = 1 << 20
POOL_SLOTS: Final = 64


def busy_us(call: Callable[[], object]) -> float:
    """Return the CPU time of one call in microseconds."""
    begin_s = time.thread_time()
    call()
    return (time.thread_time() - begin_s) * 1e6


def main() -> int:
    """Measure and print a line for each."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.checksum", description="The cost of checksums.")
    parser.add_argument("--slot-mib", type=int, default=2, help="size of a slot (2)")
    parser.add_argument("--rounds", type=int, default=200, help="turns of each (200)")
    parser.add_argument("--token-bytes", type=int, default=23_040, help="KV of one token (SmolLM2 in float16: 23040)")
    args = parser.parse_args()
    num_bytes = args.slot_mib * MIB
    pool = np.random.default_rng(0).integers(0, 256, POOL_SLOTS * num_bytes, np.uint8).reshape(POOL_SLOTS, -1)
    slot = np.empty(num_bytes, np.uint8)
    calls: dict[str, Callable[[], object]] = {
        "xxh3": lambda: xxhash.xxh3_64_intdigest(slot.data),
        "words64": lambda: words64(slot),
    }
    times: dict[str, list[float]] = {name: [] for name in ("copy", *calls)}
    for number in range(args.rounds):
        source = pool[number * 37 % POOL_SLOTS]
        times["copy"].append(busy_us(lambda source=source: np.copyto(slot, source)))  # type: ignore[misc]
        for name, call in calls.items():
            times[name].append(busy_us(call))
    copy_us = statistics.median(times["copy"])
    print(f"slots of {args.slot_mib} MiB, {args.rounds} turns, medians of CPU time")
    for name, found in times.items():
        median_us = statistics.median(found)
        per_token_us = median_us * args.token_bytes / num_bytes
        print(f"{name:8} {median_us / args.slot_mib:7.1f} us/MiB  {median_us / copy_us:5.2f} x copy  "
              f"{per_token_us:5.2f} us a token")  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
