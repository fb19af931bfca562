#!/usr/bin/env python3
"""Make the environment that the Makefile's targets run in: .venv, torch, and this project installed editable.

1. Fast path: a stamp in .venv names the hash of all that decides what gets installed; when it fits, nothing runs.
2. Find a Python that there are locks for and make .venv with it (on top of the system's packages where those hold a
   suitable torch).
3. Install with uv where it is on PATH, with the sources that pip is configured with; else with pip. (uv does not see
   the system's packages from within an environment: pip where that lies on top of them.)
4. torch comes first and alone, because its default Linux build pulls gigabytes of CUDA packages: with an NVIDIA driver
   that build, without one the CPU build, from what is at hand, the configured indexes or PyTorch's own, else the
   default build after all. A suitable torch that is already there stays, and so does the Triton beside it.
5. Install what Baton requires at the versions of the lock for this Python and this build of torch (locks/, made by
   scripts/locks.py), then compile the native kernels and install Baton itself. Write the stamp.

Whether something can be had is asked by a dry run, with short time limits, whose exit status decides: first of what is
at hand (then no index is asked at all), then of the index; without one this ends at once.

Only the standard library, and syntax old enough for any python3 to reach the message that asks for a newer one.
The commands' own output goes to .venv/bootstrap.log; its last lines are shown when a step fails.
"""

from __future__ import annotations

import argparse
import ast
import fcntl
import hashlib
import os
import re
import shutil
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
# Packages that come with torch and fit only the one they came with.
TORCH_STACK = re.compile(r"(?:torch|triton|cuda-toolkit|nvidia-(?!ml-py)[a-z0-9-]+)==")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LOG_TAIL_LINES = 25
PLAIN_REPORT_EVERY_S = 15.0
ASK_BUDGET_S = 60.0
PROBE_TIMEOUT_S = 5
PROBE_BUDGET_S = 60.0
# What pip calls a source, and uv's variable for the same.
UV_SOURCES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
}
CPU_BUILD_MISSING = f"""\
No CPU build of torch can be had, neither where pip or uv is configured to look nor at {CPU_INDEX}.
The default build is installed instead: it works on a CPU but brings gigabytes of CUDA packages (Ctrl-C stops it)."""
OFFLINE = (
    "no package index gives {probe} within {timeout} s: connect this machine to the network, or name a mirror "
    "(PIP_INDEX_URL=...) or a folder of wheels (PIP_FIND_LINKS=...), and run it again (details: {log})"
)
NO_COMPILER = (
    "note: the native kernels were not compiled, for want of a C++ compiler (apt-get install g++, then make clean): "
    "Baton works, but on a CPU it is many times slower"
)
# Prints what pyproject.toml asks for, one requirement a line, with the extra that is named and what that contains.
REQUIREMENTS = """
import sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
left, name = list(project["dependencies"]), project["name"]
left += [f"{name}[{extra}]" for extra in sys.argv[2:]]
while left:
    requirement = left.pop(0)
    if requirement.startswith(name + "["):
        for extra in requirement[len(name) + 1 : requirement.index("]")].split(","):
            left += project["optional-dependencies"][extra.strip()]
    else:
        print(requirement)
"""


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
    locks = sorted((ROOT / "locks").glob("*.txt"))
    build = [ROOT / "setup.py", ROOT / "scripts" / "wheel_layout.py"]
    for path in [ROOT / "pyproject.toml", *build, Path(__file__), *locks, *sources]:
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

    def run(self, label: str, command: list[str], environment: dict[str, str]) -> None:
        """Run `command`, showing progress; raise StepFailed with its last lines when it exits with an error."""
        started = time.monotonic()
        start_bytes = self.path.stat().st_size
        with self.path.open("ab") as sink:
            sink.write(("$ " + " ".join(command) + "\n").encode())
            sink.flush()
            child = subprocess.Popen(
                command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, cwd=ROOT, env=environment
            )
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

    def probe(self, command: list[str], environment: dict[str, str]) -> bool:
        """Return whether `command` exits without an error, in its time; nothing is shown."""
        with self.path.open("ab") as sink:
            sink.write(("$ " + " ".join(command) + "\n").encode())
            sink.flush()
            try:
                done = subprocess.run(
                    command,
                    stdout=sink,
                    stderr=sink,
                    stdin=subprocess.DEVNULL,
                    cwd=ROOT,
                    env=environment,
                    timeout=PROBE_BUDGET_S,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return False
        return done.returncode == 0

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


def ask(python: Path | str, code: str, *arguments: str) -> str | None:
    """Return what `python -c code` prints, or None when it cannot run or exits with an error."""
    try:
        done = subprocess.run(
            [str(python), "-c", code, *arguments], capture_output=True, text=True, timeout=ASK_BUDGET_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


class Installer:
    """uv or pip, for one environment."""

    def __init__(self, python: Path, log: Log) -> None:
        """Take uv where it is on PATH and sees all that is there, else pip."""
        self._python, self._log = str(python), log
        self._uv = None if stands_on_system(python) else shutil.which("uv")
        self._environment = dict(os.environ)
        if self._uv is not None:
            self._environment = {**uv_sources(pip_settings()), **os.environ}
        self.name = "pip" if self._uv is None else "uv"
        # What needs no index: folders of wheels, and with uv what it has kept of earlier installations.
        self.at_hand = "--no-index" if self._uv is None else "--offline"

    def install(self, label: str, *arguments: str) -> None:
        """Install, showing progress. Raises StepFailed."""
        self._log.run(label, [*self._command(), *arguments], self._environment)

    def can_have(self, *arguments: str) -> bool:
        """Return whether a dry run of an installation ends well, without waiting for a network that is not there."""
        if self._uv is not None:
            quick = {"UV_HTTP_TIMEOUT": str(PROBE_TIMEOUT_S), "UV_HTTP_RETRIES": "0"}
            return self._log.probe([*self._command(), "--dry-run", *arguments], {**self._environment, **quick})
        patience = ["--retries", "0", "--timeout", str(PROBE_TIMEOUT_S)]
        return self._log.probe([*self._command(), "--dry-run", *patience, *arguments], self._environment)

    def _command(self) -> list[str]:
        if self._uv is not None:
            return [self._uv, "pip", "install", "--python", self._python]
        return [self._python, "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]


def stands_on_system(python: Path) -> bool:
    """Return whether an environment shows the packages of the Python that it was made with."""
    settings = python.parent.parent / "pyvenv.cfg"
    return settings.exists() and "include-system-site-packages = true" in settings.read_text().lower()


def pip_settings() -> dict[str, str]:
    """Return what pip is configured with for an installation, by the long names of its options."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"],
            capture_output=True,
            text=True,
            timeout=ASK_BUDGET_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    found: dict[str, tuple[int, str]] = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        rank = {"global": 0, "install": 1, ":env:": 2}.get(section, -1)
        if rank >= 0 and rank >= found.get(key, (0, ""))[0]:
            found[key] = (rank, str(ast.literal_eval(value)))
    return {key: value for key, (_, value) in found.items()}


def uv_sources(settings: dict[str, str]) -> dict[str, str]:
    """Return uv's variables for the sources that pip is configured with, under pip's rule that all are equal."""
    found = {UV_SOURCES[key]: value for key, value in settings.items() if key in UV_SOURCES and value}
    if "UV_FIND_LINKS" in found:
        found["UV_FIND_LINKS"] = ",".join(found["UV_FIND_LINKS"].split())
    if "UV_INDEX" in found:
        found["UV_INDEX"] = " ".join(found["UV_INDEX"].split())
    return {**found, "UV_INDEX_STRATEGY": "unsafe-best-match"}


# --- the steps ---------------------------------------------------------------------------------------------------


def python_version(python: Path | str) -> tuple[int, ...] | None:
    """Return (major, minor) of an interpreter, or None when it does not run."""
    text = ask(python, "import sys; print(sys.version_info[0], sys.version_info[1])")
    return tuple(int(part) for part in text.split()) if text else None


def locked_pythons() -> set[tuple[int, ...]]:
    """Return the (major, minor) versions of Python that there are locks for."""
    names = (path.stem.partition("-")[2] for path in (ROOT / "locks").glob("*.txt"))
    return {tuple(int(part) for part in name.split(".")) for name in names}


def find_python() -> str:
    """Return an interpreter that is new enough, one with locks before one without: this one, or of PYTHON_NAMES."""
    locked = locked_pythons()
    if sys.version_info[:2] in locked:
        return sys.executable
    found = {name: python_version(name) or (0, 0) for name in PYTHON_NAMES}
    if sys.version_info >= OLDEST_PYTHON:
        found[sys.executable] = sys.version_info[:2]
    fit = [name for name, version in found.items() if version >= OLDEST_PYTHON]
    if fit:
        return min(fit, key=lambda name: found[name] not in locked)
    wanted = ".".join(map(str, OLDEST_PYTHON))
    fail(f"Baton needs Python {wanted} or newer; found none on PATH. Install one, or say where: make PYTHON=... TARGET")


def torch_version(python: Path | str) -> str | None:
    """Return the version of the torch installed for `python` when it is new enough, else None."""
    text = installed_version(python, "torch")
    parts = re.match(r"(\d+)\.(\d+)", text or "")
    if text is None or parts is None or (int(parts[1]), int(parts[2])) < OLDEST_TORCH:
        return None
    return text


def installed_version(python: Path | str, package: str) -> str | None:
    """Return the version of a package that is installed for `python`, or None."""
    return ask(python, "import sys\nfrom importlib.metadata import version\nprint(version(sys.argv[1]))", package)


def make_environment(venv: Path, log: Log) -> Path:
    """Make .venv unless it is there and runs; return its interpreter."""
    python = venv / "bin" / "python"
    version = python_version(python) if python.exists() else None
    if version is not None and version >= OLDEST_PYTHON and installed_version(python, "pip") is not None:
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


def lock_of(python: Path, build: str) -> dict[str, str]:
    """Return the lines of the lock for an interpreter and a build of torch, by package; none for another Python."""
    version = ".".join(map(str, python_version(python) or ()))
    path = ROOT / "locks" / f"{build}-{version}.txt"
    if not path.exists():
        return {}
    return {line.partition("==")[0]: line for line in path.read_text().splitlines() if "==" in line}


def require_index(installer: Installer, lock: dict[str, str], log: Log) -> None:
    """End with one sentence when no package index answers, asked for one small package of the lock."""
    probe = lock.get("msgpack", "msgpack")
    fresh = ["--reinstall"] if installer.name == "uv" else ["--ignore-installed"]
    if not installer.can_have("--no-deps", *fresh, probe):
        fail(OFFLINE.format(probe=probe, timeout=PROBE_TIMEOUT_S, log=log.path))


def install_torch(installer: Installer, python: Path, log: Log) -> str:
    """Install torch unless a suitable one is there; return which build it is: `cpu` or `cuda`."""
    driver = has_nvidia_driver()
    present = torch_version(python)
    if present is not None:
        if driver and present.endswith("+cpu"):
            say(f"note: torch {present} is a CPU build although there is an NVIDIA driver; `make clean` lets go of it")
        return "cpu" if present.endswith("+cpu") else "cuda"
    lock = lock_of(python, "cuda")
    wanted = lock.get("torch", f"torch>={'.'.join(map(str, OLDEST_TORCH))}")
    if not driver and sys.platform == "linux" and "torch" in lock:
        cpu = f"{wanted}+cpu"
        if installer.can_have(installer.at_hand, "--no-deps", cpu):
            # Its few dependencies come with the other packages.
            installer.install(f"installing {cpu}", installer.at_hand, "--no-deps", cpu)
            return "cpu"
        require_index(installer, lock, log)
        for source in ([], ["--extra-index-url", CPU_INDEX]):
            if installer.can_have("--no-deps", *source, cpu):
                installer.install(f"installing {cpu}", *source, "--no-deps", cpu)
                return "cpu"
        say(CPU_BUILD_MISSING)
    else:
        require_index(installer, lock, log)
    constraints = write_constraints(python, lock)
    installer.install(f"installing {wanted}", "-c", str(constraints), wanted)
    return "cuda" if sys.platform == "linux" else "cpu"


def write_constraints(python: Path, lock: dict[str, str]) -> Path:
    """Write a lock into the environment, its torch and what came with that as they are there; return its path."""
    lines = dict(lock)
    present = torch_version(python)
    if present is not None:
        lines = {name: line for name, line in lines.items() if not TORCH_STACK.match(line)}
        lines["torch"] = f"torch=={present}"
        triton = installed_version(python, "triton")
        if triton is not None:
            lines["triton"] = f"triton=={triton}"
        elif "triton" in lock and present.partition("+")[0] == lock["torch"].partition("==")[2]:
            lines["triton"] = lock["triton"]
    path = python.parent.parent / "constraints.txt"
    path.write_text("".join(line + "\n" for line in lines.values()))
    return path


def requirements(python: Path, dev: bool) -> list[str]:
    """Return what pyproject.toml asks for, the build backend first."""
    text = ask(python, REQUIREMENTS, str(ROOT / "pyproject.toml"), *(["dev"] if dev else []))
    if text is None:
        fail("pyproject.toml cannot be read")
    # The backend lives in .venv, so that a second install without a network finds everything there.
    return ["setuptools>=77", *text.splitlines()]


def install(venv: Path, dev: bool) -> None:
    """Carry out steps 2 to 5 of this module's life cycle, without the stamp."""
    log = Log(venv / "bootstrap.log")
    python = make_environment(venv, log)
    installer = Installer(python, log)
    build = install_torch(installer, python, log)
    lock = lock_of(python, build)
    if not lock:
        say("note: there is no lock for this Python; the newest versions that pyproject.toml admits are taken")
    constraints = ["-c", str(write_constraints(python, lock))]
    wanted = requirements(python, dev)
    source = [installer.at_hand] if installer.can_have(installer.at_hand, *constraints, *wanted) else []
    if not source:
        require_index(installer, lock, log)
    what = "what Baton and its development tools require" if dev else "what Baton requires"
    installer.install(f"installing {what} (with {installer.name})", *source, *constraints, *wanted)
    own = [installer.at_hand, "--no-deps", "--no-build-isolation", "--editable", "."]
    installer.install("compiling the native kernels (C++) and installing Baton", *own)
    suffix = ask(python, "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))")
    if not (ROOT / "kernels" / "cpu" / f"_native{suffix}").exists():
        say(NO_COMPILER)


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
