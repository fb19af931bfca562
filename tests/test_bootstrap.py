"""scripts/bootstrap.py: when it has nothing to do, what it installs from where, and what it says when it cannot."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = ("pyproject.toml", "setup.py", "scripts/bootstrap.py", "scripts/wheel_layout.py")
RUN_BUDGET_S = 240.0


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
    shutil.copytree(ROOT / "locks", tmp_path / "locks")
    (tmp_path / "kernels" / "cpu").mkdir(parents=True)
    (tmp_path / "kernels" / "cpu" / "a.cpp").write_text("int a;")
    (tmp_path / ".venv").mkdir()
    return tmp_path


def run(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(checkout / "scripts" / "bootstrap.py"), *arguments],
        env={**os.environ, **environment},
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


@pytest.mark.parametrize("name", [*FILES, "kernels/cpu/a.cpp", "locks/cuda-3.13.txt"])
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
    monkeypatch.setattr(module, "find_python", lambda: str(poor))
    with pytest.raises(SystemExit):
        module.make_environment(checkout / ".venv", module.Log(checkout / "log"))
    assert "python3-venv" in capsys.readouterr().err


def test_without_a_new_enough_python_it_says_so(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load(checkout)
    monkeypatch.setattr(module, "OLDEST_PYTHON", (99, 0))
    monkeypatch.setattr(module, "locked_pythons", set)
    with pytest.raises(SystemExit):
        module.find_python()
    assert "needs Python 99.0 or newer" in capsys.readouterr().err


def test_a_python_with_locks_goes_before_one_without(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load(checkout)
    assert module.locked_pythons() == {(3, 11), (3, 12), (3, 13)}
    versions = {"python3.14": (3, 14), "python3.12": (3, 12), "python3": (3, 9)}
    monkeypatch.setattr(module, "python_version", versions.get)
    monkeypatch.setattr(module.sys, "version_info", (3, 14, 0))
    assert module.find_python() == "python3.12"
    del versions["python3.12"]
    assert module.find_python() == "python3.14"


def test_a_failed_step_shows_its_last_lines(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = load(checkout)
    log = module.Log(checkout / "log")
    with pytest.raises(module.StepFailed, match=r"(?s)doing it: failed with exit status 3\n.*  the reason"):
        log.run("doing it", [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"], dict(os.environ))
    assert "doing it: failed in" in capsys.readouterr().out


class FakeInstaller:
    """Stands in for pip: takes what is installed, and can have what lies at its sources."""

    name, at_hand = "pip", "--no-index"

    def __init__(self, *sources: str) -> None:
        """`sources`: where the CPU build of torch lies, of `at hand`, `index` and `PyTorch's`; `index` answers too."""
        self.installed: list[list[str]] = []
        self._sources = sources

    def install(self, label: str, *arguments: str) -> None:
        del label
        self.installed.append([item for item in arguments if not item.endswith("constraints.txt") and item != "-c"])

    def can_have(self, *arguments: str) -> bool:
        if self.at_hand in arguments:
            return "at hand" in self._sources
        if any("msgpack" in item for item in arguments):
            return "index" in self._sources or "answers" in self._sources
        return ("PyTorch's" if "--extra-index-url" in arguments else "index") in self._sources


def torch_of(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, installer: FakeInstaller, driver: bool
) -> tuple[str, list[list[str]]]:
    """Return the build of torch that bootstrap takes, and what it installed."""
    module = load(checkout)
    monkeypatch.setattr(module, "has_nvidia_driver", lambda: driver)
    monkeypatch.setattr(module, "torch_version", lambda python: None)
    monkeypatch.setattr(module, "python_version", lambda python: (3, 12))
    python = checkout / ".venv" / "bin" / "python"
    return module.install_torch(installer, python, module.Log(checkout / "log")), installer.installed


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the default build is the CPU build")
@pytest.mark.parametrize(
    ("sources", "driver", "build", "source"),
    [
        (("at hand",), False, "cpu", ["--no-index", "--no-deps", "torch==2.13.0+cpu"]),
        (("index",), False, "cpu", ["--no-deps", "torch==2.13.0+cpu"]),
        (
            ("answers", "PyTorch's"),
            False,
            "cpu",
            ["--extra-index-url", "https://download.pytorch.org/whl/cpu", "--no-deps", "torch==2.13.0+cpu"],
        ),
        (("answers",), False, "cuda", ["torch==2.13.0"]),
        (("index", "PyTorch's"), True, "cuda", ["torch==2.13.0"]),
    ],
)
def test_which_torch_is_taken_from_where(
    checkout: Path,
    monkeypatch: pytest.MonkeyPatch,
    sources: tuple[str, ...],
    driver: bool,
    build: str,
    source: list[str],
) -> None:
    assert torch_of(checkout, monkeypatch, FakeInstaller(*sources), driver) == (build, [source])


@pytest.mark.parametrize("driver", [False, True])
def test_without_an_index_nothing_is_tried(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], driver: bool
) -> None:
    installer = FakeInstaller()
    with pytest.raises(SystemExit):
        torch_of(checkout, monkeypatch, installer, driver)
    assert installer.installed == []
    said = capsys.readouterr().err.strip()
    assert said.startswith("bootstrap: no package index gives msgpack==") and "\n" not in said


@pytest.mark.parametrize("silent", [False, True], ids=["refused", "silent"])
def test_offline_it_ends_soon_with_one_sentence(checkout: Path, tmp_path: Path, silent: bool) -> None:
    (tmp_path / "wheels").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        if not silent:
            listener.close()
        # No file of settings, no other index, no uv: only an index that does not answer.
        environment = {
            **{"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": str(tmp_path / "wheels"), "PIP_EXTRA_INDEX_URL": ""},
            **{"PIP_INDEX_URL": f"http://127.0.0.1:{port}/simple", "PIP_RETRIES": "5", "PIP_DEFAULT_TIMEOUT": "180"},
            "PATH": "/usr/bin:/bin",
        }
        done = run(checkout, "--venv", str(tmp_path / "venv"), **environment)
    assert done.returncode == 1
    assert done.stderr.startswith("bootstrap: no package index gives msgpack==") and done.stderr.count("\n") == 1
    log = (tmp_path / "venv" / "bootstrap.log").read_text()
    assert "Retrying" not in log


def test_a_suitable_torch_stays_and_so_does_its_triton(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load(checkout)
    versions = {"torch": "2.11.0+cu130", "triton": "3.6.0"}
    monkeypatch.setattr(module, "installed_version", lambda python, package: versions.get(package))
    monkeypatch.setattr(module, "python_version", lambda python: (3, 12))
    python = checkout / ".venv" / "bin" / "python"
    installer = FakeInstaller()
    assert module.install_torch(installer, python, module.Log(checkout / "log")) == "cuda"
    assert installer.installed == []
    lines = module.write_constraints(python.parent.parent / "bin" / "python", module.lock_of(python, "cuda"))
    text = lines.read_text()
    assert "torch==2.11.0+cu130\n" in text and "triton==3.6.0\n" in text
    assert "torch==2.13.0\n" not in text and "nvidia-cublas" not in text and "cuda-toolkit" not in text
    assert "\naiohttp==" in text and "nvidia-ml-py==" in text


def test_the_requirements_of_the_tools_are_those_of_the_project_too(checkout: Path) -> None:
    module = load(checkout)
    plain, dev = (module.requirements(Path(sys.executable), flag) for flag in (False, True))
    assert "torch>=2.11" in plain and not any(line.startswith(("pytest", "grpcio", "baton")) for line in plain)
    assert set(plain) < set(dev) and {"pytest>=8.3", "grpcio>=1.85.1"} < set(dev)
    assert not any(line.startswith("baton") for line in dev)


def test_uv_gets_the_sources_that_pip_is_configured_with(checkout: Path) -> None:
    module = load(checkout)
    settings = {"index-url": "https://a/simple", "extra-index-url": "https://b/s\nhttps://c/s", "find-links": "/w /v"}
    assert module.uv_sources({**settings, "timeout": "3"}) == {
        "UV_DEFAULT_INDEX": "https://a/simple",
        "UV_INDEX": "https://b/s https://c/s",
        "UV_FIND_LINKS": "/w,/v",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }


def test_pip_is_asked_for_its_settings_and_the_environment_wins(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "pip.conf"
    file.write_text("[global]\nfind-links = /from-file\nindex-url = https://file/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    monkeypatch.setenv("PIP_FIND_LINKS", "/from-environment")
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    settings = load(checkout).pip_settings()
    assert settings["find-links"] == "/from-environment"
    assert settings["index-url"] == "https://file/simple"


@pytest.mark.parametrize("on_system", [False, True])
def test_uv_is_used_where_it_is_there(checkout: Path, monkeypatch: pytest.MonkeyPatch, on_system: bool) -> None:
    module = load(checkout)
    monkeypatch.setattr(module.shutil, "which", lambda name: "/somewhere/uv" if name == "uv" else None)
    monkeypatch.setattr(module, "pip_settings", lambda: {"find-links": "/w"})
    settings = checkout / ".venv" / "pyvenv.cfg"
    settings.write_text(f"include-system-site-packages = {'true' if on_system else 'false'}\n")
    python = checkout / ".venv" / "bin" / "python"
    seen: list[tuple[list[str], dict[str, str]]] = []
    log = module.Log(checkout / "log")
    monkeypatch.setattr(log, "run", lambda label, command, environment: seen.append((command, environment)))
    module.Installer(python, log).install("it", "msgpack")
    [(command, environment)] = seen
    # uv does not see the torch of the system, and would install another over it.
    expected = [str(python), "-m", "pip"] if on_system else ["/somewhere/uv", "pip", "install"]
    assert command[:3] == expected and command[-1] == "msgpack"
    assert environment.get("UV_FIND_LINKS") == (None if on_system else "/w")
