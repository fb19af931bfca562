"""What lies in deploy/ is held against the repository, and against systemd where that is installed."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from baton.cli import build_parser, settings_of
from baton.options import BY_KEY
from router.endpoints import ENDPOINTS

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
UNIT = (DEPLOY / "baton.service").read_text()
DOCKERFILE = re.sub(r"\\\n\s*", "", (DEPLOY / "Dockerfile").read_text())


def settings(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", UNIT, re.MULTILINE)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    # It looks whether the program is there, too: any will do.
    unit = tmp_path / "baton.service"
    unit.write_text(UNIT.replace("/opt/baton/bin/baton", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60, check=False
    )
    complaints = [line for line in done.stderr.splitlines() if "baton.service" in line]
    assert (done.returncode, complaints) == (0, []), done.stderr


def test_the_unit_starts_a_command_that_baton_understands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [command] = settings("ExecStart")
    words = shlex.split(command)
    assert words[0] == "/opt/baton/bin/baton"
    (tmp_path / "baton.yaml").write_text("model: smollm2\n")
    (tmp_path / "api-keys").write_text("some-key\n")
    words = [word.replace("%d", str(tmp_path)).replace("/etc/baton", str(tmp_path)) for word in words[1:]]
    found = settings_of(vars(build_parser().parse_args(words)))
    assert found.model == "smollm2"
    # systemd may kill what is left only when the streams have had their time.
    assert float(settings("TimeoutStopSec")[0]) >= float(found["drain_s"]) + 10


def test_every_credential_the_unit_names_is_loaded() -> None:
    loaded = {line.partition(":")[0] for line in settings("LoadCredential")}
    assert set(re.findall(r"%d/([\w-]+)", UNIT)) == loaded == {"api-keys"}


def test_reload_is_a_hangup_and_a_bad_configuration_is_not_tried_again() -> None:
    assert settings("ExecReload") == ["/bin/kill -HUP $MAINPID"]
    assert settings("RestartPreventExitStatus") == ["2"]


def test_every_source_of_the_image_exists_and_every_package_is_in_it() -> None:
    copied: set[str] = set()
    for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE):
        *sources, _ = line.split()
        copied |= set(sources)
    assert [name for name in sorted(copied) if not (ROOT / name).exists()] == []
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "examples"}
    built_from = {
        "pyproject.toml",
        "setup.py",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "scripts/wheel_layout.py",
        "locks",
    }
    assert copied == packages | built_from
    admitted = re.findall(r"^!([^*\n]+?)(?:/\*\*)?$", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    assert set(admitted) == copied


def test_the_image_takes_locks_that_are_there() -> None:
    [python] = set(re.findall(r"^ARG PYTHON=(.*)$", DOCKERFILE, re.MULTILINE))
    assert set(re.findall(r"^ARG BUILD=(.*)$", DOCKERFILE, re.MULTILINE)) == {"cpu"}
    assert "locks/${BUILD}-${PYTHON}.txt" in DOCKERFILE
    assert all((ROOT / "locks" / f"{build}-{python}.txt").is_file() for build in ("cpu", "cuda"))


def test_the_image_runs_as_nobody_special_and_asks_for_its_life() -> None:
    last = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    assert re.search(r"^USER baton$", last, re.MULTILINE)
    [path] = re.findall(r"'(/\w+)', timeout", last)
    assert path == "/livez" and path in {endpoint.path for endpoint in ENDPOINTS}


@pytest.mark.parametrize("name", ["baton.service", "Dockerfile", "README.md"])
def test_every_variable_and_option_that_is_named_exists(name: str) -> None:
    text = (DEPLOY / name).read_text()
    variables = {option.variable for option in BY_KEY.values()}
    assert set(re.findall(r"\bBATON_[A-Z_]*[A-Z]\b", text)) <= variables
    lines = re.findall(r"^.*\bbaton (?:serve|router|prefill|decode)\b.*$", text, re.MULTILINE)
    named = {option for line in lines for option in re.findall(r"\s--([a-z-]+)", line[line.index("baton ") :])}
    docker = {"rm", "init", "shm-size", "gpus"}
    assert {option for option in named - docker - {"config"} if option.replace("-", "_") not in BY_KEY} == set()


def test_every_link_of_the_page_leads_to_a_file() -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", (DEPLOY / "README.md").read_text())
    assert targets and [target for target in targets if not (DEPLOY / target).exists()] == []
