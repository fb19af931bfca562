"""The pool's memory: backed ahead of use, without changing a byte, and not at the cost of the machine."""

from __future__ import annotations

import gc
import os
import resource
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.kv_cache import KVCache
from engine.pool_memory import keep_ahead, spare_memory
from kernels.cpu.huge_pages import HUGE_PAGE_BYTES, huge_bytes, populate
from protocol.kv_layout import KVFingerprint

MIB = 1 << 20
PLENTY = 64 << 30


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def is_supported() -> bool:
    try:
        populate(huge_bytes(4096))
    except OSError:
        return False
    return True


needs_populate = pytest.mark.skipif(not is_supported(), reason="this system cannot back memory ahead of use")


@needs_populate
def test_a_pool_costs_no_page_fault_once_it_has_been_touched_ahead() -> None:
    memory = huge_bytes(64 * MIB)
    keep_ahead(memory, lambda: PLENTY).join()
    before = faults()
    memory[::4096] = 1
    assert faults() - before < 8  # 32 huge pages, or 16,384 small ones


@needs_populate
def test_what_is_written_while_the_thread_works_stays() -> None:
    memory = huge_bytes(32 * MIB)
    thread = keep_ahead(memory, lambda: PLENTY)
    expected = np.arange(memory.nbytes // 8, dtype=np.uint64)
    memory.view(np.uint64)[:] = expected
    thread.join()
    assert np.array_equal(memory.view(np.uint64), expected)


@needs_populate
def test_the_thread_stops_where_memory_is_short_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    memory = huge_bytes(256 * MIB)
    left = iter([PLENTY, PLENTY, 63 * MIB])
    with caplog.at_level("INFO"):
        keep_ahead(memory, lambda: next(left)).join()
    assert "128 of 256 MiB of the KV pool are touched ahead of use" in caplog.text
    before = faults()
    memory[: 128 * MIB : 4096] = 1
    assert faults() - before < 8
    memory[128 * MIB :: 4096] = 1  # still there for whoever uses it


def test_the_thread_ends_when_the_pool_is_gone() -> None:
    gate = threading.Event()

    def spare() -> int:
        gate.wait(10)
        return PLENTY

    memory = huge_bytes(64 * MIB)
    thread = keep_ahead(memory, spare)
    del memory
    gc.collect()
    gate.set()
    thread.join(10)
    assert not thread.is_alive()


def test_the_thread_has_the_lowest_priority() -> None:
    seen: list[int] = []

    def spare() -> int:
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return 0

    keep_ahead(huge_bytes(HUGE_PAGE_BYTES), spare).join()
    assert seen == [19] and os.getpriority(os.PRIO_PROCESS, 0) < 19


@needs_populate
def test_the_kv_cache_of_a_cpu_is_backed_ahead() -> None:
    layout = KVFingerprint(model_hash="m", dtype="float32", block_size=16, num_layers=4, num_kv_heads=4, head_dim=64)
    cache = KVCache(layout, 32 * MIB // layout.block_bytes, torch.device("cpu"))
    for thread in threading.enumerate():
        if thread.name == "populate":
            thread.join(20)
    flat = cache.tensor.view(torch.uint8).numpy().reshape(-1)
    before = faults()
    flat[::4096] = 1
    assert faults() - before < 8


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 5 << 30),  # a quarter of 12 GiB stays free
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max\n"}, 5 << 30),
        (
            {
                "proc/self/cgroup": "3:cpu:/x\n0::/a\n",
                "sys/fs/cgroup/a/memory.max": str(3 << 30),
                "sys/fs/cgroup/a/memory.current": str(2 << 30),
                "sys/fs/cgroup/a/memory.stat": f"anon 5\ninactive_file {512 << 20}\n",
            },
            512 << 20,  # 1 GiB stays free
        ),
        (  # a container that sees itself at the top
            {
                "proc/self/cgroup": "0::/docker/b\n",
                "sys/fs/cgroup/memory.max": str(2 << 30),
                "sys/fs/cgroup/memory.current": str(1 << 30),
                "sys/fs/cgroup/memory.stat": "inactive_file 0\n",
            },
            0,
        ),
        (  # version 1
            {
                "proc/self/cgroup": "4:cpu,memory:/c\n",
                "sys/fs/cgroup/memory/c/memory.limit_in_bytes": str(6 << 30),
                "sys/fs/cgroup/memory/c/memory.usage_in_bytes": str(1 << 30),
                "sys/fs/cgroup/memory/c/memory.stat": "total_inactive_file 4096\n",
            },
            (3 << 30) + (512 << 20) + 4096,
        ),
    ],
)
def test_what_can_be_spared_is_the_least_of_machine_and_control_groups(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    files = {"proc/meminfo": f"MemTotal: {12 << 20} kB\nMemAvailable: {8 << 20} kB\n", **files}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert spare_memory(tmp_path) == expected


def test_a_quarter_of_this_machine_is_never_touched_ahead() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 <= spare_memory() <= 0.75 * total
