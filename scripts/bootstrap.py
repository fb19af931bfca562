#!/usr/bin/env python3
"""Make the environment that the Makefile's targets run in: .venv, torch, and this project installed editable.

1. Fast path: a stamp in .venv names the hash of all that decides what gets installed; when it fits, nothing runs.
2. Find a Python >= 3.11 and make .venv with it (on top of the system's packages where those hold a suitable torch).
3. torch comes first and alone, because its default Linux build pulls gigabytes of CUDA packages: with an NVIDIA driver
   that build, without one the CPU build. A suitable torch that is already there stays.
4. Install the project with the versions of constraints.txt, then write the stamp.

Only the standard library, and syntax old enough for any python3 to reach the message that asks for a newer one.
pip's own output goes to .venv/bootstrap.log; its last lines are shown when a step fails.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
PYTHON_NAMES = ("python3.13", "python3.12", "python3.11", "python3.14", "python3")
OLDEST_TORCH = (2, 11)
NATIVE_SUFFIXES = {".c", ".cc", ".cpp", ".h", ".hpp", ".py"}
LOG_TAIL_LINES = 25
PLAIN_REPORT_EVERY_S = 15.0
ASK_BUDGET_S = 60.0
CPU_BUILD_MISSING = """\
No CPU build of torch {version} in the package indexes that pip is configured with, and there is no NVIDIA driver here.
The default build is about to be installed instead: it works on a CPU but brings gigabytes of CUDA packages.
To get the small build, stop now (Ctrl-C) and point pip at PyTorch's CPU wheel index (see pytorch.org, "Get Started"):
    PIP_EXTRA_INDEX_URL=<that index> make ..."""


class StepFailed(Exception):
    """A command of the bootstrap exited with an error; the message says which and shows its last lines."""


def say(text: str) -> None:
    """Print one plain line at once."""
    print(text, flush=True)


def fail(text: str) -> NoReturn:
    """End with one clear message."""
    print("bootstrap: " + text, file=sys.stderr, flush=True)
    raise SystemExit(1)


# --- the stamp ---------------------------------------------------------------------------------------------------


def fingerprint() -> str:
    """Hash all that decides what gets installed and built."""
    digest = hashlib.sha256()
    native = ROOT / "kernels" / "cpu"
    sources = sorted(path for path in native.rglob("*") if path.suffix in NATIVE_SUFFIXES) if native.is_dir() else []
    for path in [ROOT / "pyproject.toml", ROOT / "constraints.txt", ROOT / "setup.py", Path(__file__), *sources]:
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(str(ROOT).encode())  # an editable install names this folder: a moved checkout needs a new one
    return digest.hexdigest()


def is_current(stamp: Path, wanted: str, dev: bool) -> bool:
    """Tell whether the stamp names this fingerprint with at least the tools asked for."""
    try:
        found, level = stamp.read_text().split()
    except (OSError, ValueError):
        return False
    return found == wanted and (level == "dev" or not dev)


# --- running commands --------------------------------------------------------------------------------------------


class Log:
    """The file that takes the output of every command, and the line on screen that says how long one has run."""

    def __init__(self, path: Path) -> None:
        """Open the log at `path` anew; each command's output is appended."""
        self.path = path
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("")

    def run(self, label: str, command: list[str]) -> None:
        """Run `command`, showing progress; raise StepFailed with its last lines when it exits with an error."""
        started = time.monotonic()
        start_bytes = self.path.stat().st_size
        with self.path.open("ab") as sink:
            sink.write(("$ " + " ".join(command) + "\n").encode())
            sink.flush()
            child = subprocess.Popen(command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, cwd=ROOT)
            try:
                self._watch(label, child, started)
            finally:
                if child.poll() is None:
                    child.terminate()
                    child.wait()
        if child.returncode != 0:
            with self.path.open("rb") as source:
                source.seek(start_bytes)
                lines = source.read().decode(errors="replace").splitlines()
            tail = "\n".join("    " + line for line in lines[-LOG_TAIL_LINES:])
            raise StepFailed(f"{label}: failed with exit status {child.returncode}\n{tail}\n  whole log: {self.path}")

    def _watch(self, label: str, child: subprocess.Popen[bytes], started: float) -> None:
        on_terminal = sys.stdout.isatty()
        if not on_terminal:
            say(f"{label} ...")
        frames, turn, reported = "|/-\\", 0, started
        while child.poll() is None:
            time.sleep(0.1)
            now = time.monotonic()
            if on_terminal:
                turn += 1
                print(f"\r{frames[turn % len(frames)]} {label} ({now - started:.0f} s)", end="", flush=True)
            elif now - reported >= PLAIN_REPORT_EVERY_S:
                reported = now
                say(f"  still at it after {now - started:.0f} s")
        end = "done" if child.returncode == 0 else "failed"
        line = f"{label}: {end} in {time.monotonic() - started:.1f} s"
        say("\r" + line + " " * 12 if on_terminal else line)


def ask(python: Path | str, code: str) -> str | None:
    """Return what `python -c code` prints, or None when it cannot run or exits with an error."""
    try:
        done = subprocess.run(
            [str(python), "-c", code], capture_output=True, text=True, timeout=ASK_BUDGET_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# --- the steps ---------------------------------------------------------------------------------------------------


def python_version(python: Path | str) -> tuple[int, ...] | None:
    """Return (major, minor) of an interpreter, or None when it does not run."""
    text = ask(python, "import sys; print(sys.version_info[0], sys.version_info[1])")
    return tuple(int(part) for part in text.split()) if text else None


def find_python() -> str:
    """Return an interpreter that is new enough: the one running this if it is, else the first of PYTHON_NAMES."""
    if sys.version_info >= OLDEST_PYTHON:
        return sys.executable
    for name in PYTHON_NAMES:
        version = python_version(name)
        if version is not None and version >= OLDEST_PYTHON:
            return name
    wanted = ".".join(map(str, OLDEST_PYTHON))
    fail(f"Baton needs Python {wanted} or newer; found none on PATH. Install one, or say where: make PYTHON=... TARGET")


def torch_version(python: Path | str) -> str | None:
    """Return the version of the torch installed for `python` when it is new enough, else None."""
    text = ask(python, "from importlib.metadata import version; print(version('torch'))")
    parts = re.match(r"(\d+)\.(\d+)", text or "")
    if text is None or parts is None or (int(parts[1]), int(parts[2])) < OLDEST_TORCH:
        return None
    return text


def make_environment(venv: Path, log: Log) -> Path:
    """Make .venv unless it is there and runs; return its interpreter."""
    python = venv / "bin" / "python"
    version = python_version(python) if python.exists() else None
    if version is not None and version >= OLDEST_PYTHON:
        return python
    base = find_python()
    command = [base, "-m", "venv", "--clear", str(venv)]
    if torch_version(base) is not None:
        command.insert(-1, "--system-site-packages")
    # Its own log: `--clear` empties the folder that the usual one lies in.
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    if outcome.returncode != 0:
        output = (outcome.stdout + outcome.stderr).strip()
        if "ensurepip" in output:
            fail(
                f"{base} cannot make virtual environments because its ensurepip is missing.\n"
                "  On Debian and Ubuntu: apt-get install python3-venv; or name another Python: make PYTHON=... TARGET"
            )
        fail(f"making {venv} with {base} failed:\n{output}")
    log.path.write_text("")
    say(f"made {venv.name} with {base}")
    return python


def has_nvidia_driver() -> bool:
    """Tell whether this machine runs NVIDIA's kernel driver."""
    if Path("/proc/driver/nvidia/version").exists():
        return True
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=ASK_BUDGET_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def pinned_torch() -> str:
    """Return the version of torch that constraints.txt names."""
    found = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if found is None:
        fail("constraints.txt has no line torch==VERSION")
    return found[1]


def install_torch(pip: list[str], python: Path, log: Log) -> None:
    """Install torch: the ordinary build beside an NVIDIA driver, else the CPU build wherever one can be had."""
    driver = has_nvidia_driver()
    present = torch_version(python)
    if present is not None:
        if driver and present.endswith("+cpu"):
            say(f"note: torch {present} is a CPU build although there is an NVIDIA driver; `make clean` lets go of it")
        return
    version = pinned_torch()
    if not driver and sys.platform == "linux":
        try:
            log.run(f"installing torch {version} (CPU build)", [*pip, "install", f"torch=={version}+cpu"])
            return
        except StepFailed as error:
            if "No matching distribution" not in str(error):
                raise
            say(CPU_BUILD_MISSING.format(version=version))
    log.run(f"installing torch {version}", [*pip, "install", f"torch=={version}"])


def write_constraints(venv: Path, python: Path) -> Path:
    """Write constraints.txt into .venv, its torch line naming the torch that is there; return its path."""
    line = f"torch=={torch_version(python) or pinned_torch()}"
    text = re.sub(r"^torch==\S+$", line, (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    path = venv / "constraints.txt"
    path.write_text(text)
    return path


def install(venv: Path, dev: bool) -> None:
    """Carry out steps 2 to 4 of this module's life cycle, without the stamp."""
    log = Log(venv / "bootstrap.log")
    python = make_environment(venv, log)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    install_torch(pip, python, log)
    constraints = write_constraints(venv, python)
    # The build backend lives in .venv, so that a second install without a network finds everything there.
    log.run("installing the build backend", [*pip, "install", "-c", str(constraints), "setuptools>=77"])
    target = ".[dev]" if dev else "."
    what = "baton and its development tools" if dev else "baton"
    log.run(
        f"installing {what}", [*pip, "install", "--no-build-isolation", "-c", str(constraints), "--editable", target]
    )


def main() -> int:
    """Bring .venv up to date and return the exit status."""
    parser = argparse.ArgumentParser(description="Make the environment that Baton runs in.")
    parser.add_argument("--dev", action="store_true", help="also install what tests and checks need")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where (default: .venv in this checkout)")
    options = parser.parse_args()
    stamp = options.venv / ".baton-stamp"
    wanted = fingerprint()
    if is_current(stamp, wanted, options.dev):
        return 0
    lock = os.open(ROOT, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # two `make` at once: the second waits, then finds the stamp
    if is_current(stamp, wanted, options.dev):
        return 0
    dev = options.dev or _had_dev(stamp)
    try:
        install(options.venv, dev)
    except StepFailed as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted; run it again to go on")
    stamp.write_text(f"{wanted} {'dev' if dev else 'run'}\n")
    return 0


def _had_dev(stamp: Path) -> bool:
    """Tell whether the last install held the development tools: they stay when a source changed."""
    return stamp.exists() and stamp.read_text().endswith(" dev\n")


if __name__ == "__main__":
    sys.exit(main())
