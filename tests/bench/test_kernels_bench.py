"""The kernel benchmark: floors by hand, and a run on a tiny shape."""

import json
import math
from pathlib import Path

import pytest

from bench.kernels.__main__ import main
from bench.kernels.ceilings import Ceilings
from tests.kernels.native_cases import kernels_for

TINY = "--hidden 64 --intermediate 96 --num-layers 2 --num-heads 4 --num-kv-heads 2 --head-dim 16 --vocab 160"


def test_a_floor_is_the_larger_of_bytes_and_operations() -> None:
    peaks = Ceilings(10.0, 100.0, 400.0, "")
    assert peaks.floor_s(1e9, 1e9, is_integer=False) == pytest.approx(0.1)
    assert peaks.floor_s(1e6, 1e9, is_integer=False) == pytest.approx(0.01)
    assert peaks.floor_s(1e6, 1e9, is_integer=True) == pytest.approx(0.0025)
    assert Ceilings(10.0, None, None, "").floor_s(1e9, 1e15, is_integer=True) == pytest.approx(0.1)


@pytest.mark.slow
def test_a_quick_run_measures_every_kind_of_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernels_for()
    path = tmp_path / "kernels.json"
    assert main([*TINY.split(), "--quick", "--rounds", "1", "--json", str(path)]) == 0
    found = json.loads(path.read_text())["cpu"]
    assert found["peaks"]["read_gb_s"] > 0.5
    names = [timing["name"] for timing in found["timings"]]
    assert len(names) == len(set(names)) >= 20
    for kind in ("linear", "attention decode", "attention prefill", "rms_norm", "silu_mul", "rope", "step q4_1"):
        assert any(kind in name for name in names), kind
    for timing in found["timings"]:
        assert timing["time_s"] > 0 and timing["floor_s"] > 0 and math.isfinite(timing["time_s"])
    assert "time / floor" in capsys.readouterr().out
