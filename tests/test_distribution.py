"""What a wheel is made of: the layout of scripts/wheel_layout.py, and sources that can be moved by it."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES: list[str] = PROJECT["tool"]["setuptools"]["packages"]
MOVED = sorted({name.partition(".")[0] for name in PACKAGES} - {"baton"})


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wheel_layout_under_test", ROOT / "scripts" / "wheel_layout.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


layout = load()
# Its program runs in a checkout, where alone the golden tests are that it imports too.
CHECKOUT_ONLY = {ROOT / "bench" / "peers" / "hugging_face.py"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from router.core import Core", "from baton._house.router.core import Core"),
        ("from router import core, app", "from baton._house.router import core, app"),
        ("import router.core", "import baton._house.router.core"),
        ("import router.core as core, os", "import baton._house.router.core as core, os"),
        ("import router\nrouter.x()", "import baton._house.router as router\nrouter.x()"),
        ("import os, model.a, model.b", "import os, baton._house.model.a, baton._house.model.b"),
        ("é = 1; from model.a import b  # from model", "é = 1; from baton._house.model.a import b  # from model"),
        ("def f():\n    from model.a import (\n        b,\n    )", None),
        ("from baton.cli import main\nfrom .model import x\nimport modelling, os", ""),
    ],
)
def test_imports_of_moved_packages_lead_into_the_house(source: str, expected: str | None) -> None:
    found = layout.rewritten(source, ["router", "model"])
    if expected is None:
        expected = source.replace("from model", "from baton._house.model")
    assert found == (expected or source)


@pytest.mark.parametrize("source", ["import router.core\nrouter.core.x()", "from  router.core import x"])
def test_what_cannot_be_rewritten_ends_the_build(source: str) -> None:
    with pytest.raises(layout.LayoutError, match="line 1"):
        layout.rewritten(source, ["router"])


def shipped() -> list[Path]:
    tops = ["baton", *MOVED]
    # Generated code names its own module for messages' `__module__` only.
    return [path for top in tops for path in sorted((ROOT / top).rglob("*.py")) if "_pb2" not in path.name]


def test_every_module_can_be_moved() -> None:
    for path in shipped():
        source = path.read_text()
        found = layout.rewritten(source, MOVED)
        assert len(found.splitlines()) == len(source.splitlines())
        nodes = list(ast.walk(ast.parse(found)))
        names = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert [name for name in names if name and name.partition(".")[0] in MOVED] == [], path


def is_module(dotted: str) -> bool:
    path = ROOT / dotted.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def test_no_string_names_a_module_that_moves() -> None:
    named = re.compile(rf"^(?:{'|'.join(MOVED)})(?:\.\w+)+$")
    imported = re.compile(rf"\b(?:from|import) (?:{'|'.join(MOVED)})(?:\.\w+)+\b")
    found = []
    for path in sorted({*shipped()} - CHECKOUT_ONLY):
        tree = ast.parse(path.read_text())
        documents = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in documents:
                continue
            if imported.search(node.value) or (named.match(node.value) and is_module(node.value)):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.value!r}: derive it from __package__")
    assert found == []


def test_every_file_that_is_read_at_run_time_is_shipped() -> None:
    data: dict[str, list[str]] = PROJECT["tool"]["setuptools"]["package-data"]
    tracked = subprocess.run(
        ["git", "ls-files", *("baton", *MOVED)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    left = []
    for name in tracked.stdout.splitlines():
        path = ROOT / name
        is_source = path.suffix == ".py" or name.startswith("kernels/cpu/native/")
        fits = any(path in (ROOT / package.replace(".", "/")).glob(p) for package, ps in data.items() for p in ps)
        if path.exists() and not is_source and not fits:
            left.append(name)
    assert left == []


def test_nothing_says_to_install_what_is_not_published() -> None:
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *shipped()]:
        assert re.findall(r"pip install[^\n`]*\bbaton-serve\b", path.read_text()) == [], path
