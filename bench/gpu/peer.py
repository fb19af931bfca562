"""The peer that is there wherever transformers is: its continuous batching, on the same GPU, in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Final

from bench.gpu.points import Figures, Point, Section, Skip
from bench.gpu.rig import Stage
from bench.gpu.shapes import step_bytes

PROGRAM: Final = Path(__file__).with_name("transformers_peer.py")
_BATCHES: Final = (1, 8, 32, 64)
_CONTEXT_TOKENS: Final = 1024
_NUM_STEPS, _NUM_WARM_STEPS = 96, 8
_MAX_BATCH_TOKENS, _PAGE_TOKENS = 2048, 256
_BUDGET_S: Final = 60.0
_SHOWN_ERROR_LINES: Final = 3


def section(stage: Stage, name: str, share_s: float, python: str = sys.executable) -> Section:
    """Give one point: all batches at 1k, measured by the Python that has transformers."""
    keys: Figures = {"context_tokens": _CONTEXT_TOKENS}
    need_s = 0.4 * _BUDGET_S * stage.scale.need_factor
    point = Point("batches 1 to 64, context 1k", keys, need_s, partial(_measure, stage, name, python))
    return Section("transformers", name, share_s, (point,))


def _measure(stage: Stage, name: str, python: str) -> Figures:
    peaks = stage.ceilings
    stage.drop_rig()
    scale, model = stage.scale, stage.models[name]
    is_real = scale.token_divisor == 1
    asked = {
        "config": dict(model.hugging_face),
        "device": stage.device.type,
        "dtype": str(stage.dtype).removeprefix("torch."),
        "batches": _BATCHES if is_real else _BATCHES[:2],
        "context_tokens": scale.tokens(_CONTEXT_TOKENS),
        "num_steps": _NUM_STEPS if is_real else scale.num_steps + 4,
        "num_warm_steps": _NUM_WARM_STEPS if is_real else 1,
        "max_batch_tokens": _MAX_BATCH_TOKENS,
        "page_tokens": _PAGE_TOKENS,
    }
    # -I: neither this folder nor PYTHONPATH, so that transformers finds no `kernels` of ours.
    command = [python, "-I", str(PROGRAM), json.dumps(asked)]
    lines, error = _lines_of(command, _BUDGET_S)
    said: dict[str, Any] = {}
    rows: list[dict[str, float | int | str]] = []
    for line in lines:
        if "skip" in line:
            raise Skip(line["skip"])
        if "batch" not in line:
            said |= line
            continue
        floor_s = step_bytes(model.shape, line["batch"], scale.tokens(_CONTEXT_TOKENS)) / peaks.copy_bytes_per_s
        over: dict[str, float] = {"over_floor": line["itl_p50_ms"] / (floor_s * 1e3)} if "itl_p50_ms" in line else {}
        rows.append(line | over)
    if not any("itl_p50_ms" in row for row in rows):
        raise Skip(f"transformers measured nothing: {error or [row.get('error') for row in rows]}")
    return {"version": said.get("loaded"), "attention": said.get("attention"), "rows": rows, "error": error}


def _lines_of(command: list[str], budget_s: float) -> tuple[list[dict[str, Any]], str]:
    """Run a program; return the JSON lines that it printed, and what went wrong, if anything did."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=budget_s)
        out, error = done.stdout, "" if done.returncode == 0 else _last_lines(done.stderr.splitlines())
    except subprocess.TimeoutExpired as timeout:
        out = timeout.stdout.decode() if isinstance(timeout.stdout, bytes) else timeout.stdout or ""
        error = f"ended after {budget_s:.0f} s"
    except OSError as failure:
        return [], f"cannot be started: {failure}"
    return [json.loads(line) for line in out.splitlines() if line.startswith("{") and line.endswith("}")], error


def _last_lines(lines: Iterable[str]) -> str:
    return " | ".join([line.strip() for line in lines if line.strip()][-_SHOWN_ERROR_LINES:])
