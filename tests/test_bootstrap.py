"""scripts/bootstrap.py: when it has nothing to do, and what it says when it cannot go on."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = ("pyproject.toml", "constraints.txt", "setup.py", "scripts/bootstrap.py")
RUN_BUDGET_S = 60.0


def load(root: Path) -> ModuleType:
    """Import a checkout's bootstrap script as a module."""
    spec = importlib.util.spec_from_file_location("bootstrap_under_test", root / "scripts" / "bootstrap.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a folder with the files that decide what gets installed."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "kernels" / "cpu").mkdir(parents=True)
    (tmp_path / "kernels" / "cpu" / "a.cpp").write_text("int a;")
    (tmp_path / ".venv").mkdir()
    return tmp_path


def run(checkout: Path, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(checkout / "scripts" / "bootstrap.py"), *arguments],
        env={**os.environ, **({} if path is None else {"PATH": path})},
        capture_output=True,
        text=True,
        timeout=RUN_BUDGET_S,
        check=False,
    )


def test_a_fitting_stamp_ends_at_once(checkout: Path) -> None:
    (checkout / ".venv" / ".baton-stamp").write_text(f"{load(checkout).fingerprint()} dev\n")
    started_s = time.monotonic()
    done = run(checkout, "--dev")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert time.monotonic() - started_s < 5.0


@pytest.mark.parametrize("name", [*FILES[:3], "kernels/cpu/a.cpp"])
def test_the_fingerprint_follows_what_decides_the_install(checkout: Path, name: str) -> None:
    module = load(checkout)
    before = module.fingerprint()
    assert module.fingerprint() == before
    with (checkout / name).open("a") as file:
        file.write("\n")
    assert module.fingerprint() != before


def test_development_tools_satisfy_a_plain_request_but_not_the_reverse(checkout: Path) -> None:
    module, stamp = load(checkout), checkout / "stamp"
    assert not module.is_current(stamp, "x", False)
    stamp.write_text("x run\n")
    assert module.is_current(stamp, "x", False)
    assert not module.is_current(stamp, "x", True)
    stamp.write_text("x dev\n")
    assert module.is_current(stamp, "x", False)
    assert not module.is_current(stamp, "y", False)
    stamp.write_text("damaged")
    assert not module.is_current(stamp, "damaged", False)


def test_a_python_without_ensurepip_is_told_what_to_install(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load(checkout)
    poor = checkout / "python3"
    poor.write_text("#!/bin/sh\necho 'Error: ensurepip is not available.'\nexit 1\n")
    poor.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(poor))
    with pytest.raises(SystemExit):
        module.make_environment(checkout / ".venv", module.Log(checkout / "log"))
    assert "python3-venv" in capsys.readouterr().err


def test_without_a_new_enough_python_it_says_so(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load(checkout)
    monkeypatch.setattr(module, "OLDEST_PYTHON", (99, 0))
    with pytest.raises(SystemExit):
        module.find_python()
    assert "needs Python 99.0 or newer" in capsys.readouterr().err


def test_a_failed_step_shows_its_last_lines(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = load(checkout)
    log = module.Log(checkout / "log")
    with pytest.raises(module.StepFailed, match=r"(?s)doing it: failed with exit status 3\n.*  the reason"):
        log.run("doing it", [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"])
    assert "doing it: failed in" in capsys.readouterr().out


class RecordedLog:
    """Stands in for the log: takes the commands and fails the first ones with the given outputs."""

    def __init__(self, module: ModuleType, *failures: str) -> None:
        self.commands: list[list[str]] = []
        self._failures = [module.StepFailed(text) for text in failures]

    def run(self, label: str, command: list[str]) -> None:
        del label
        self.commands.append(command)
        if self._failures:
            raise self._failures.pop(0)


@pytest.mark.parametrize("driver", [False, True])
def test_cuda_builds_come_only_with_a_driver(checkout: Path, monkeypatch: pytest.MonkeyPatch, driver: bool) -> None:
    module = load(checkout)
    monkeypatch.setattr(module, "has_nvidia_driver", lambda: driver)
    monkeypatch.setattr(module, "torch_version", lambda python: None)
    log = RecordedLog(module)
    module.install_torch(["pip"], checkout / "python", log)
    version = module.pinned_torch()
    wanted = f"torch=={version}" if driver or sys.platform != "linux" else f"torch=={version}+cpu"
    assert log.commands == [["pip", "install", wanted]]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the default build is the CPU build")
def test_the_default_build_is_the_last_resort_and_announced(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load(checkout)
    monkeypatch.setattr(module, "has_nvidia_driver", lambda: False)
    monkeypatch.setattr(module, "torch_version", lambda python: None)
    log = RecordedLog(module, "ERROR: No matching distribution found for torch")
    module.install_torch(["pip"], checkout / "python", log)
    assert [command[-1] for command in log.commands] == [
        f"torch=={module.pinned_torch()}{tail}" for tail in ("+cpu", "")
    ]
    assert "PIP_EXTRA_INDEX_URL" in capsys.readouterr().out
    with pytest.raises(module.StepFailed, match="network"):  # any other failure is no reason to fetch gigabytes
        module.install_torch(["pip"], checkout / "python", RecordedLog(module, "the network is down"))


def test_a_suitable_torch_stays_and_the_constraints_follow_it(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load(checkout)
    monkeypatch.setattr(module, "torch_version", lambda python: "2.11.0+cu126")
    log = RecordedLog(module)
    module.install_torch(["pip"], checkout / "python", log)
    assert log.commands == []
    text = module.write_constraints(checkout / ".venv", checkout / "python").read_text()
    assert "torch==2.11.0+cu126\n" in text
    assert f"torch=={module.pinned_torch()}\n" not in text
