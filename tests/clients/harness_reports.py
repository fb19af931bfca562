"""What harnesses report, read from the files that each writes, and the page that shows it.

1. A reader per harness turns its own JSON into `Figures`: requests, errors and what it calls TTFT and ITL.
2. `largest_difference` holds two sets of lm_eval's samples against each other, choice by choice.
3. `document` writes the page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

COMPARISON: Final = "lm_eval: Baton beside transformers"


@dataclass(frozen=True, slots=True)
class Figures:
    """What one harness counted and measured.

    Attributes:
        shown: names as the harness has them, values as text with their unit.
    """

    num_requests: int = 0
    num_errors: int = 0
    shown: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Run:
    """One harness's run.

    Attributes:
        problem: why it failed; empty if it did not.
        skipped: why it was not run; empty if it was.
    """

    name: str
    version: str
    command: str
    seconds: float
    figures: Figures = field(default_factory=Figures)
    problem: str = ""
    skipped: str = ""


def _only(folder: Path, pattern: str) -> Any:
    found = sorted(folder.rglob(pattern))
    if not found:
        raise FileNotFoundError(f"no {pattern}")
    return json.loads(found[-1].read_text(encoding="utf-8"))


def _aiperf(folder: Path) -> Figures:
    report = _only(folder, "profile_export_aiperf.json")
    errors = sum(int(entry["count"]) for entry in report.get("error_summary") or [])
    shown = {
        name: f"p50 {report[key]['p50']:.1f} ms, p99 {report[key]['p99']:.1f} ms"
        for name, key in (("TTFT", "time_to_first_token"), ("ITL", "inter_token_latency"))
    }
    return Figures(int(report["request_count"]["avg"]) + errors, errors, shown)


def _guidellm(folder: Path) -> Figures:
    metrics = _only(folder, "guidellm.json")["benchmarks"][0]["metrics"]
    totals = metrics["request_totals"]
    shown = {}
    for name, key in (("TTFT", "time_to_first_token_ms"), ("ITL", "inter_token_latency_ms")):
        found = metrics[key]["successful"]
        shown[name] = f"p50 {found['percentiles']['p50']:.1f} ms, p99 {found['percentiles']['p99']:.1f} ms"
    return Figures(int(totals["total"]), int(totals["errored"] + totals["incomplete"]), shown)


def _vllm(folder: Path) -> Figures:
    report = _only(folder, "vllm.json")
    shown = {
        name: f"median {report[f'median_{key}_ms']:.1f} ms, p99 {report[f'p99_{key}_ms']:.1f} ms"
        for name, key in (("TTFT", "ttft"), ("ITL", "itl"), ("TPOT", "tpot"))
    }
    failed = int(report.get("failed", 0))
    return Figures(int(report["completed"]) + failed, failed, shown)


def _evalscope(folder: Path) -> Figures:
    report = _only(folder, "*summary*.json")
    shown = {name: f"mean {report[f'Avg {name} (ms)']:.1f} ms" for name in ("TTFT", "ITL", "TPOT")}
    return Figures(int(report["Total Requests"]), int(report["Failed Requests"]), shown)


def _lm_eval(folder: Path) -> Figures:
    results = _only(folder, "results_*.json")
    shown = {
        f"{task} {name.partition(',')[0]}": f"{value:.2f}"
        for task, values in results["results"].items()
        for name, value in values.items()
        if isinstance(value, float) and "stderr" not in name
    }
    number = sum(len(doc["resps"]) for path in folder.rglob("samples_*.jsonl") for doc in _lines(path))
    return Figures(number, 0, shown)


READERS: Final[dict[str, Callable[[Path], Figures]]] = {
    "aiperf": _aiperf,
    "guidellm": _guidellm,
    "vllm": _vllm,
    "evalscope": _evalscope,
    "lm_eval": _lm_eval,
}


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _likelihoods(folder: Path) -> dict[tuple[int, int], float]:
    (path,) = folder.rglob("samples_baton_likelihood_*.jsonl")
    return {
        (doc["doc_id"], choice): float(response[0][0])
        for doc in _lines(path)
        for choice, response in enumerate(doc["resps"])
    }


def largest_difference(one: Path, other: Path) -> tuple[float, int]:
    """Return by how much the log probabilities of two runs differ at most, and how many were compared."""
    mine, theirs = _likelihoods(one), _likelihoods(other)
    if mine.keys() != theirs.keys():
        raise ValueError("the runs are not of the same task")
    return max(abs(mine[key] - theirs[key]) for key in mine), len(mine)


def document(runs: Iterable[Run], where: str, hidden: Mapping[str, str]) -> str:
    """Return the page: a table, and each command with this machine's folders replaced by names."""
    runs = list(runs)
    lines = ["# Harnesses against Baton", "", f"Written by `python -m tests.clients.harnesses`; {where}.", ""]
    lines += ["Their figures show that they run, not how fast Baton is: see [benchmarks](../benchmarks.md).", ""]
    lines += ["| harness | version | requests | errors | its figures | verdict |", "|---|---|---|---|---|---|"]
    for run in runs:
        shown = "; ".join(f"{name} {value}" for name, value in run.figures.shown.items())
        verdict = f"skipped: {run.skipped}" if run.skipped else f"failed: {run.problem}" if run.problem else "ok"
        counts = f"{run.figures.num_requests} | {run.figures.num_errors}"
        lines.append(f"| {run.name} | {run.version} | {counts} | {shown} | {verdict} |")
    lines += ["", "Commands; TOK is the model folder that `tests/clients/model_folder.py` writes:", "", "```"]
    lines += [run.command for run in runs if run.command]
    text = "\n".join([*lines, "```", ""])
    for path, name in hidden.items():
        text = text.replace(path, name)
    return re.sub(r"http://127\.0\.0\.1:\d+", "http://127.0.0.1:8000", text)
