"""The `baton` command as a user meets it: a process, its output and its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from baton.options import ROLES, options_of

ROOT = Path(__file__).resolve().parent.parent.parent
RUN_BUDGET_S = 60.0


def baton(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command with only the given BATON_ variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
    return subprocess.run(
        [sys.executable, "-P", "-m", "baton", *arguments],
        env={**kept, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **environment},
        capture_output=True,
        text=True,
        timeout=RUN_BUDGET_S,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve"], "MODEL"),
        (["serve", "m", "--port", "x"], "--port: expected a whole number, got 'x'"),
        (["serve", "m", "--prefill", "0"], "--prefill: must be at least 1"),
        (["serve", "m", "--mode", "both"], "--mode: expected one of disaggregated, colocated"),
        (["serve", "m", "--config", "/nonexistent.yaml"], "cannot read /nonexistent.yaml"),
        (["serve", "/nonexistent/model", "--port", "0"], "/nonexistent/model"),
        (["router", "m", "--secret-file", "/nonexistent"], "m"),
        (["serve", "m", "--no-such-option"], "--no-such-option"),
        (["serve", "m", "--por", "1"], "--por"),
        (["dance"], "dance"),
        ([], "COMMAND"),
    ],
)
def test_what_cannot_be_used_is_one_clear_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    done = baton(*arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback() -> None:
    done = baton("serve", "m", "--port", "x", "--log-level", "debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_the_environment_is_read() -> None:
    assert "BATON_PORT: expected a whole number" in baton("serve", "m", BATON_PORT="x").stderr


def test_a_config_file_may_come_from_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("prot: 1\n")
    assert "unknown option 'prot'; did you mean port?" in baton("serve", "m", BATON_CONFIG=str(file)).stderr


def test_the_version_is_told() -> None:
    done = baton("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("baton ")


@pytest.mark.parametrize("role", ROLES)
def test_help_lists_every_option_under_its_group(role: str) -> None:
    done = baton(role, "--help")
    assert done.returncode == 0
    for option in options_of(role):
        assert (f"--{option.name} " in done.stdout) is not option.is_hidden
        assert option.is_hidden or f"\n{option.group}:\n" in done.stdout


def test_a_working_folder_with_our_names_does_not_get_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "protocol.py").write_text("raise SystemExit('imported the wrong module')")
    code = "from baton.config import child_environment; import json; print(json.dumps(child_environment()))"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "baton", "--version"],
        cwd=tmp_path,
        env=json.loads(told.stdout),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
