"""What the documents say is held against the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from baton.options import BY_KEY

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_configuration_page_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, "scripts/configuration_doc.py", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, "run: python scripts/configuration_doc.py"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_option_a_document_names_exists(path: Path) -> None:
    commands = re.findall(r"^.*\bbaton (?:serve|router|prefill|decode)\b.*$", path.read_text(), re.MULTILINE)
    named = {name for line in commands for name in re.findall(r"(?<!\S)--([a-z-]+)", line)} - {"help", "config"}
    assert {name for name in named if name.replace("-", "_") not in BY_KEY} == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_of_a_document_leads_to_a_file(path: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_every_make_target_the_readme_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert {first or second for first, second in named} <= targets


def test_the_picture_of_the_house_shows_every_folder() -> None:
    readme = (ROOT / "README.md").read_text()
    for folder in sorted(path.parent.name for path in ROOT.glob("*/__init__.py")):
        assert f"{folder}/" in readme, f"README does not show {folder}/"
