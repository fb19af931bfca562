#!/usr/bin/env python3
"""The locks: exact versions of everything Baton installs, one file for each Python and each build of torch.

`locks/cuda-3.12.txt` is what Python 3.12 gets with torch's default build for Linux, which brings CUDA along;
`locks/cpu-3.12.txt` what it gets with the CPU build. Both carry the development tools, and all carry the Triton that
the pinned torch asks for, so that no build of torch contradicts a lock. scripts/bootstrap.py passes one as constraints.

    python scripts/locks.py make [--upgrade]    resolve anew, for Linux on x86-64; keeps versions that still fit
    python scripts/locks.py check               install every lock by a dry run, with and without a folder of wheels

1. Both ask the package index what the pinned torch requires (pip's report says it as JSON). The CPU build requires the
   same without what is marked for Linux; its own index is not asked.
2. `make` has uv resolve both builds for each Python.
3. `check` has uv install what pyproject.toml asks for under each lock, by a dry run: the default build from the index
   alone, the CPU build beside a folder of wheels, where a stand-in lies that has its name and its requirements. What
   would be installed must be the lock, no more and no less.

Both need uv, which the development tools bring. `check` exits with 3 when no package index is reachable.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13")
BUILDS = ("cpu", "cuda")
# Moved by hand: every golden output and every kernel is checked against it.
TORCH = "2.13.0"
EXTRA = "dev"
# The oldest C library that all wheels run on: Debian 11 and Ubuntu 20.04.
UV_PLATFORM = "x86_64-manylinux_2_31"
LINUX_ONLY = 'platform_system == "Linux"'
PROBE_BUDGET_S = 5
BUDGET_S = 300.0
NO_INDEX = 3


class LockError(Exception):
    """A lock cannot be made, or does not hold; the message says why."""


def path_of(build: str, python: str) -> Path:
    """Return where the lock of a build of torch and a Python lies."""
    return ROOT / "locks" / f"{build}-{python}.txt"


def pins(text: str) -> dict[str, str]:
    """Return the version of each package that the lines of a lock, or of uv's list, name."""
    return dict(re.findall(r"^(?: \+ )?([A-Za-z0-9._-]+)==(\S+)$", text, re.MULTILINE))


def torch_requirements() -> list[str]:
    """Return what the default build of the pinned torch requires on Linux. Raises LockError."""
    with tempfile.TemporaryDirectory() as empty:
        # No folder of wheels, which may hold another build.
        environment = {**os.environ, "PIP_FIND_LINKS": empty, "PIP_CONSTRAINT": os.devnull}
        command = [
            *(sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--dry-run"),
            *("--ignore-installed", "--no-deps", "--only-binary", ":all:", "--report", "-", f"torch=={TORCH}"),
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=BUDGET_S, check=False)
    if done.returncode != 0:
        raise LockError(f"the package index does not give torch {TORCH}:\n{done.stderr}")
    requires: list[str] = json.loads(done.stdout)["install"][0]["metadata"]["requires_dist"]
    return requires


def of_cpu_build(requires: Iterable[str]) -> list[str]:
    """Return the requirements that the CPU build has in common with the default one."""
    return [text for text in requires if LINUX_ONLY not in text]


# --- make --------------------------------------------------------------------------------------------------------


def make(uv: str, upgrade: bool) -> None:
    """Write every lock. Raises LockError."""
    requires = torch_requirements()
    triton = next(text.partition(";")[0].strip() for text in requires if text.startswith("triton"))
    with tempfile.TemporaryDirectory() as scratch:
        constraints, settings = Path(scratch) / "constraints.txt", Path(scratch) / "uv.toml"
        constraints.write_text(f"torch=={TORCH}\n{triton}\n")
        for build in BUILDS:
            stated = f'[[dependency-metadata]]\nname = "torch"\nversion = "{TORCH}"\nrequires-dist = '
            settings.write_text(stated + json.dumps(of_cpu_build(requires)) + "\n" if build == "cpu" else "")
            for python in PYTHONS:
                print(f"resolving {build}, Python {python}", flush=True)
                _compile(uv, path_of(build, python), python, (settings, constraints), upgrade)


def _compile(uv: str, path: Path, python: str, inputs: tuple[Path, Path], upgrade: bool) -> None:
    settings, constraints = inputs
    command = [
        *(uv, "pip", "compile", "--quiet", "--config-file", str(settings), "pyproject.toml", "--extra", EXTRA),
        *("--constraint", str(constraints), "--python-version", python, "--python-platform", UV_PLATFORM),
        *("--only-binary", ":all:", "--no-annotate", "--output-file", str(path.relative_to(ROOT))),
        *(["--upgrade"] if upgrade else []),
    ]
    # uv writes this into the head of the file, in place of a command line that names temporary files.
    environment = {**os.environ, "UV_CUSTOM_COMPILE_COMMAND": "python scripts/locks.py make"}
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode != 0:
        raise LockError(f"uv finds no versions for {path.name}")


# --- check -------------------------------------------------------------------------------------------------------


def stand_in(folder: Path, python: str, requires: Iterable[str]) -> None:
    """Put a wheel into `folder` that is called as the CPU build of torch, requires the same, and holds nothing."""
    tag = f"cp{python.replace('.', '')}-cp{python.replace('.', '')}-manylinux_2_28_x86_64"
    info = f"torch-{TORCH}+cpu.dist-info"
    head = f"Metadata-Version: 2.1\nName: torch\nVersion: {TORCH}+cpu\n"
    with zipfile.ZipFile(folder / f"torch-{TORCH}+cpu-{tag}.whl", "w") as archive:
        archive.writestr(f"{info}/METADATA", head + "".join(f"Requires-Dist: {text}\n" for text in requires))
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")


def dry_run(uv: str, python: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Let uv say what it would install into an empty folder, for a Python that need not be there."""
    with tempfile.TemporaryDirectory() as target:
        command = [
            *(uv, "pip", "install", "--dry-run", "--color", "never", "--target", target, "--only-binary", ":all:"),
            *("--python", sys.executable, "--python-version", python, "--python-platform", UV_PLATFORM, *arguments),
        ]
        env = {**os.environ, **environment}
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=BUDGET_S, check=False)


def check_lock(uv: str, build: str, python: str, wheels: Path | None = None) -> str:
    """Return what a dry run under a lock comes to, in one line. Raises LockError when it is not the lock.

    Args:
        uv: the program.
        build: of torch.
        python: major and minor version.
        wheels: a folder of wheels that is looked at beside the index.
    """
    path = path_of(build, python)
    locked = pins(path.read_text())
    beside = () if wheels is None else ("--find-links", str(wheels))
    wanted = ("--constraint", str(path), "-r", "pyproject.toml", "--extra", EXTRA)
    done = dry_run(uv, python, *beside, *wanted)
    if done.returncode != 0:
        raise LockError(f"{path.name}: cannot be installed:\n{done.stderr}")
    found = pins(done.stderr)
    torch = found.get("torch", "none")
    if {**found, "torch": torch.partition("+")[0]} != locked:
        raise LockError(f"{path.name}: differs from what is installed: {set(found.items()) ^ set(locked.items())}")
    if wheels is not None and torch != f"{TORCH}+cpu":
        raise LockError(f"{path.name}: torch {torch} is installed, although a CPU build lies beside the index")
    source = "the index" if wheels is None else "the index and a folder of wheels"
    return f"Python {python}, {build:4}: {len(found)} packages, torch {torch}, from {source}"


def index_answers(uv: str) -> bool:
    """Tell whether one small package of a lock can be had within seconds."""
    probe = f"msgpack=={pins(path_of('cpu', PYTHONS[0]).read_text())['msgpack']}"
    quick = {"UV_HTTP_TIMEOUT": str(PROBE_BUDGET_S), "UV_HTTP_RETRIES": "0"}
    return dry_run(uv, PYTHONS[0], "--no-deps", "--refresh", probe, **quick).returncode == 0


def check(uv: str) -> int:
    """Check every lock and return the exit status. Raises LockError at the first that does not hold."""
    if not index_answers(uv):
        print("locks: no package index is reachable, so nothing was checked", file=sys.stderr)
        return NO_INDEX
    requires = of_cpu_build(torch_requirements())
    with tempfile.TemporaryDirectory() as scratch:
        for python in PYTHONS:
            stand_in(Path(scratch), python, requires)
            print(check_lock(uv, "cpu", python, Path(scratch)), flush=True)
            print(check_lock(uv, "cuda", python), flush=True)
    return 0


def find_uv() -> str | None:
    """Return the uv beside this Python, else the one on PATH, else None."""
    return shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--uv", default=find_uv(), help="the uv to run (default: the one beside this Python)")
    commands = parser.add_subparsers(dest="command", required=True)
    maker = commands.add_parser("make", help="resolve every lock anew")
    maker.add_argument("--upgrade", action="store_true", help="take the newest versions instead of those locked")
    commands.add_parser("check", help="install every lock by a dry run")
    options: Any = parser.parse_args(arguments)
    try:
        if options.uv is None:
            raise LockError("there is no uv: make env-dev, or name one with --uv")
        if options.command == "check":
            return check(options.uv)
        make(options.uv, options.upgrade)
    except LockError as error:
        print(f"locks: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
