"""The locks: one for each Python and build of torch, in step with pyproject.toml, and free of contradictions."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMBINATIONS = [(build, python) for build in ("cpu", "cuda") for python in ("3.11", "3.12", "3.13")]
THIS_PYTHON = ".".join(map(str, sys.version_info[:2]))


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("locks_under_test", ROOT / "scripts" / "locks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


locks = load()


@pytest.fixture(scope="module")
def uv() -> str:
    """Return the uv of the development tools, or skip where there is none or it reaches no index."""
    program: str | None = locks.find_uv()
    if program is None:
        pytest.skip("uv is not installed: make env-dev")
    if not locks.index_answers(program):
        pytest.skip("no package index is reachable")
    return program


@pytest.fixture(scope="module")
def torch_requires(uv: str) -> list[str]:
    del uv  # an index is reachable
    requires: list[str] = locks.torch_requirements()
    return requires


def test_there_is_a_lock_for_each_python_that_the_project_names() -> None:
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    named = {text.rpartition(" ")[2] for text in classifiers if text.startswith("Programming Language :: Python :: 3.")}
    assert named == set(locks.PYTHONS)
    found = {path.stem for path in (ROOT / "locks").glob("*.txt")}
    assert found == {f"{build}-{python}" for build, python in COMBINATIONS}


def test_only_the_default_build_brings_cuda_and_both_bring_one_triton() -> None:
    for python in locks.PYTHONS:
        cpu, cuda = (locks.pins(locks.path_of(build, python).read_text()) for build in ("cpu", "cuda"))
        assert cpu.items() < cuda.items()
        assert all(name.startswith(("nvidia-", "cuda-")) for name in cuda.keys() - cpu.keys())
        assert cpu["torch"] == locks.TORCH and cpu["triton"] == cuda["triton"]


def test_the_lines_of_a_lock_and_of_uv_are_read_alike() -> None:
    assert locks.pins("# made\nnumpy==2.4\ntorch==2.13.0\n") == {"numpy": "2.4", "torch": "2.13.0"}
    assert locks.pins("Would install 1 package\n + torch==2.13.0+cpu\n") == {"torch": "2.13.0+cpu"}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_a_dry_run_from_the_index_alone_installs_the_lock(uv: str, python: str) -> None:
    assert "torch 2.13.0, from the index" in locks.check_lock(uv, "cuda", python)


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_a_dry_run_beside_a_folder_of_wheels_takes_the_cpu_build(
    uv: str, torch_requires: list[str], tmp_path: Path, python: str
) -> None:
    locks.stand_in(tmp_path, python, locks.of_cpu_build(torch_requires))
    assert "torch 2.13.0+cpu" in locks.check_lock(uv, "cpu", python, tmp_path)


def test_a_lock_that_contradicts_its_torch_is_found(uv: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = locks.path_of("cuda", THIS_PYTHON).read_text()
    (tmp_path / "wrong.txt").write_text(
        "".join("triton==3.6.0\n" if line.startswith("triton==") else line for line in text.splitlines(keepends=True))
    )
    monkeypatch.setattr(locks, "path_of", lambda build, python: tmp_path / "wrong.txt")
    with pytest.raises(locks.LockError, match="cannot be installed"):
        locks.check_lock(uv, "cuda", THIS_PYTHON)


def test_pip_takes_the_default_build_of_torch_under_the_lock_of_the_other(uv: str, tmp_path: Path) -> None:
    del uv  # an index is reachable
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--dry-run"]
    target = ["--ignore-installed", "torch==2.13.0", "-c", str(locks.path_of("cpu", THIS_PYTHON))]
    environment = {**os.environ, "PIP_FIND_LINKS": str(tmp_path), "PIP_CONSTRAINT": os.devnull}
    done = subprocess.run(
        [*command, *target], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
