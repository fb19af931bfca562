"""`python -m bench.gpu`: the GPU path beside its floors, within ten minutes and without network.

1. Choose device, kernels and sections; with --rehearse tiny models on the CPU take the place of the real ones.
2. Run the sections in order of importance, each within its share of --budget-s.
3. After every point write gpu.json and gpu.md into --out: a run that is killed keeps what it has, and --resume goes on.
4. Where a point makes the GPU unusable for this process, a new one takes its place and resumes.

Exit codes: 0 something was measured, 1 nothing was, 2 there is no GPU or no such kernels.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

from bench.gpu import (
    decoding,
    handoff,
    interference,
    kernel_cases,
    peer,
    piecewise,
    prefilling,
    profiling,
    serving,
)
from bench.gpu.points import DeviceLost, Figures, Outcome, Point, Runner, Section
from bench.gpu.report import TITLES, markdown
from bench.gpu.rig import REHEARSAL, Scale, Stage
from bench.gpu.shapes import MODELS
from bench.machine import machine
from kernels.table import REFERENCE, KernelTable

FORMAT: Final = 1
JSON, MARKDOWN = "gpu.json", "gpu.md"
BUDGET_S: Final = 540.0
# A point that began in time may end later than the budget.
OVERRUN_S: Final = 45.0
_SMI: Final = ("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw", "--format=csv,noheader")
_SMI_BUDGET_S: Final = 10.0

Maker = Callable[[Stage, str, float], Section]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = _parser().parse_args(arguments)
    if not args.rehearse and not torch.cuda.is_available():
        print("bench.gpu: torch sees no GPU (--rehearse runs every part on the CPU, tiny)", file=sys.stderr)
        return 2
    begin_s = time.monotonic()
    device = torch.device("cpu" if args.rehearse else "cuda")
    if args.rehearse:
        torch.set_num_threads(1)
    else:
        # What hangs on a GPU hangs for good: end before whoever lent it does, with what is written already.
        faulthandler.dump_traceback_later(args.budget_s + OVERRUN_S, exit=True)
    try:
        table, kernels = _kernels(args.kernels, device)
    except ImportError as error:
        print(f"bench.gpu: --kernels {args.kernels}: {error}", file=sys.stderr)
        return 2
    models = {name: model.tiny() if args.rehearse else model for name, model in MODELS.items()}
    stage = Stage(device, models, REHEARSAL if args.rehearse else Scale(), table, _say)
    args.out.mkdir(parents=True, exist_ok=True)
    keeper = Keeper(args.out, _about(device, kernels, is_rehearsal=args.rehearse))
    runner = Runner(_say, keeper.keep, lambda: _is_lost(device), keeper.earlier() if args.resume else ())
    wanted = [s for s in plan(stage, args.models, args.peer_python) if args.only is None or s.name in args.only]
    try:
        runner.run(wanted, args.budget_s)
    except DeviceLost as error:
        left_s = args.budget_s - (time.monotonic() - begin_s)
        _say(f"the device is lost to this process ({error}): a new one takes its place")
        left = ("--resume", f"--budget-s={max(left_s, 0.0):.0f}")
        # Not a child: only with the process does its memory on the GPU go.
        os.execv(sys.executable, [sys.executable, "-m", f"{__package__}", *arguments, *left])
    stage.drop_rig()
    faulthandler.cancel_dump_traceback_later()
    print((args.out / MARKDOWN).read_text(encoding="utf-8"))
    return 0 if any(outcome.status == "measured" for outcome in runner.outcomes) else 1


def plan(stage: Stage, names: Sequence[str], peer_python: str) -> list[Section]:
    """Give the sections, the most important first but those of one model together, since changing it takes time."""
    by_model: dict[str, tuple[tuple[Maker, float], ...]] = {
        "8b": (
            (decoding.section, 135.0),
            (interference.section, 48.0),
            (prefilling.section, 13.0),
            (kernel_cases.section, 30.0),
            (handoff.section, 37.0),
            (profiling.section, 9.0),
        ),
        "1.7b": (
            (decoding.section, 97.0),
            (piecewise.section, 15.0),
            (prefilling.section, 13.0),
            (kernel_cases.section, 25.0),
            (profiling.section, 9.0),
        ),
    }
    sections = [Section("ceilings", "", 8.0, (Point("ceilings", {}, 0.0, lambda: _ceilings(stage)),))]
    for name, makers in by_model.items():
        if name in names:
            sections += [make(stage, name, share_s) for make, share_s in makers]
    sections += [peer.section(stage, name, 28.0, peer_python) for name in by_model if name in names]
    if "1.7b" in names:
        sections.append(serving.section(stage, "1.7b", 53.0))
    return sections


class _Said(msgspec.Struct):
    points: list[Outcome]


class Keeper:
    """Writes what there is, as JSON and as Markdown, and reads the GPU's clocks at the end of each section.

    Args:
        folder: there.
        about: machine, versions and what was asked for.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self._folder, self._about = folder, about
        self._clocks: list[dict[str, str]] = []

    def keep(self, outcomes: Sequence[Outcome]) -> None:
        """Write both files anew."""
        last = outcomes[-1]
        after = f"{last.section} {last.model}".strip()
        if not self._clocks or self._clocks[-1]["section"] != after:
            self._clocks.append({"section": after, "reading": gpu_reading()})
        said = {"format": FORMAT, **self._about, "clocks": self._clocks, "points": [asdict(o) for o in outcomes]}
        self._write(JSON, json.dumps(said, indent=1) + "\n")
        self._write(MARKDOWN, markdown(outcomes, self._about))

    def earlier(self) -> list[Outcome]:
        """Return what an earlier run left there, but for what it skipped."""
        try:
            said = msgspec.json.decode((self._folder / JSON).read_bytes(), type=_Said)
        except FileNotFoundError:
            return []
        return [outcome for outcome in said.points if outcome.status != "skipped"]

    def _write(self, name: str, text: str) -> None:
        half = self._folder / f"{name}.half"
        half.write_text(text, encoding="utf-8")
        half.replace(self._folder / name)


def gpu_reading() -> str:
    """Return the GPU's clocks, temperature and power as its own tool tells them, or nothing where there is none."""
    try:
        done = subprocess.run(_SMI, capture_output=True, text=True, timeout=_SMI_BUDGET_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _ceilings(stage: Stage) -> Figures:
    peaks = stage.ceilings
    return {
        "read_tb_per_s": peaks.read_bytes_per_s * 1e-12,
        "copy_tb_per_s": peaks.copy_bytes_per_s * 1e-12,
        "matmul_tflop_per_s": peaks.operations_per_s * 1e-12,
        **{f"read_by_{name.replace(' ', '_')}_tb_per_s": rate * 1e-12 for name, rate in peaks.reads.items()},
    }


def _is_lost(device: torch.device) -> bool:
    """Tell whether an earlier error has made this process's CUDA context useless."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return True
    return False


def _kernels(name: str, device: torch.device) -> tuple[KernelTable, str]:
    """Choose the kernels; also say which and why."""
    if name == "torch" or (name == "auto" and device.type == "cpu"):
        return REFERENCE, REFERENCE.name
    try:
        from kernels.gpu.table import is_interpreted, triton_table
    except ImportError as error:
        if name == "triton":
            raise
        return REFERENCE, f"{REFERENCE.name}: Triton's cannot be imported ({error})"
    if device.type == "cpu" and not is_interpreted():
        raise ImportError("on a CPU Triton's kernels run in its interpreter only (TRITON_INTERPRET=1)")
    table = triton_table()
    return table, table.name


def _about(device: torch.device, kernels: str, *, is_rehearsal: bool) -> dict[str, Any]:
    about: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "kernels": kernels,
        "is_rehearsal": is_rehearsal,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about["gpu"] = f"{properties.name}, {properties.multi_processor_count} multiprocessors"
        about["gpu_memory_gib"] = round(properties.total_memory / (1 << 30), 1)
        about["cuda"] = torch.version.cuda
    return about


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    help_text = f"of {', '.join(TITLES)}"
    parser.add_argument("--only", nargs="+", choices=list(TITLES), metavar="SECTION", help=help_text)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="shapes to measure")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help=f"time for everything ({BUDGET_S:.0f})")
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder for gpu.json and gpu.md")
    parser.add_argument("--kernels", choices=("auto", "triton", "torch"), default="auto", help="of Baton's decoder")
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that has transformers")
    parser.add_argument("--resume", action="store_true", help="keep what gpu.json in --out has; measure the rest")
    parser.add_argument("--rehearse", action="store_true", help="every part on the CPU, on tiny models")
    return parser


if __name__ == "__main__":
    sys.exit(main())
