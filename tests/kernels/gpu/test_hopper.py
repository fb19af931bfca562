"""Every kernel compiles for Hopper within the chip's shared memory and without spilling registers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.gpu import hopper

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Over a hundred compilations of a second or two on a small machine; nothing where Triton's cache holds them.
COMPILE_BUDGET_S = 600
# From 3.7 on Triton keeps two registers less in this one, of which a request launches one to three; 3.6 spills nowhere.
SPILLED_FROM_TRITON_3_7 = {"sampling-survey0-smollm2-135m-fp32": 8}


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Any]]:
    """Compile all cases in a process of its own: here Triton may stand in its interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.gpu.hopper"]
    root = Path(hopper.__file__).parents[3]
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=COMPILE_BUDGET_S, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {report["name"]: report for report in map(json.loads, done.stdout.splitlines())}


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("name", [case.name for case in hopper.find_cases()] if HAS_TRITON else ["none"])
def test_a_kernel_compiles_for_hopper_within_its_means(name: str, reports: dict[str, dict[str, Any]]) -> None:
    report = reports[name]
    assert not report["error"]
    assert report["shared_bytes"] <= hopper.MAX_SHARED_BYTES
    version = tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
    assert report["spilled_bytes"] == (SPILLED_FROM_TRITON_3_7.get(name, 0) if version >= (3, 7) else 0)
    assert report["blocks_per_multiprocessor"] >= 1


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_attention_keeps_copies_in_flight_and_the_tensor_cores_at_work(reports: dict[str, dict[str, Any]]) -> None:
    found = {name: report["instructions"] for name, report in reports.items() if "_attention-llama" in name}
    del found["combine_attention-llama-3.1-8b"]
    assert len(found) == 9
    for name, instructions in found.items():
        products = "wgmma.mma_async" if name.startswith("prefill") else "mma.sync"
        # Three stages of K and V, of four or eight copies of 16 bytes a thread.
        assert instructions[products] > 0 and instructions["cp.async.cg"] == 48


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_both_loops_of_prefill_attention_do_the_same_arithmetic(reports: dict[str, dict[str, Any]]) -> None:
    # Otherwise a row's bits would depend on where its prompt was cut; the interpreter, which fuses nothing, sees no
    # such thing.
    found = {name: report["loops"] for name, report in reports.items() if name.startswith("prefill_attention")}
    assert sum(bool(loops) for loops in found.values()) >= 3
    for loops in filter(None, found.values()):
        whole, cut = loops
        assert whole == cut
