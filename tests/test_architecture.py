"""The house rules of this repository, read off its syntax trees: who may import whom, and what may stand nowhere.

Every rule is a function from a `Tree` to a list of violations. The repository must yield none; below, each rule is also
shown a small tree that breaks it, because a rule that cannot fail guards nothing.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# DESIGN section 1: what each folder may import of ours, besides itself.
ALLOWED: dict[str, frozenset[str]] = {
    "protocol": frozenset(),
    "kernels": frozenset(),
    "model": frozenset({"kernels"}),
    "kvtransfer": frozenset({"protocol"}),
    "router": frozenset({"protocol"}),
    "engine": frozenset({"protocol", "model", "kernels"}),
    "prefill": frozenset({"protocol", "kvtransfer", "engine"}),
    "decode": frozenset({"protocol", "kvtransfer", "engine"}),
    "baton": frozenset(
        {"protocol", "kernels", "model", "kvtransfer", "router", "engine", "prefill", "decode", "bench"}
    ),
    "bench": frozenset({"protocol"}),
    # They speak HTTP, as anyone's client does.
    "examples": frozenset(),
}
# Parts of a folder that may import more than the rest of it.
ALSO_ALLOWED: dict[str, frozenset[str]] = {
    "bench.simulation": frozenset({"router"}),
    "bench.grammar": frozenset({"engine", "model"}),
    "bench.kernels": frozenset({"kernels"}),
    "bench.gpu": frozenset({"kernels", "model", "kvtransfer", "engine", "prefill", "decode"}),
}
# What of the outside a folder never touches, also not through what it imports of ours.
NEVER: dict[str, frozenset[str]] = {
    "protocol": frozenset({"torch"}),
    "router": frozenset({"torch"}),
    "kernels": frozenset({"socket", "aiohttp", "ucxx", "asyncio"}),
}
ENVIRONMENT_READERS = frozenset({"baton/config.py", "kvtransfer/ucx.py"})
FREE_OF_ENVIRONMENT_RULE = frozenset({"tests", "scripts"})
# Wall clocks jump: durations and deadlines are on the monotonic one. Allowed are the API's stamp "created", and the
# date that chat templates ask for.
WALL_CLOCKS = frozenset({"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.datetime.now"})
WALL_CLOCK_READERS = frozenset(
    {"router/stream.py", "router/server.py", "router/template_child.py", "router/response_shape.py"}
)
FREE_OF_WALL_CLOCK_RULE = frozenset({"tests", "scripts", "bench"})
UNSAFE_MODULES = frozenset({"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve"})
UNSAFE_CALLS = frozenset({"eval", "exec"})
BAD_NAMES = frozenset({"util", "utils", "common", "helper", "helpers", "misc"})
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80


@dataclass(frozen=True)
class Module:
    """One parsed file."""

    path: str
    name: str
    source: str
    syntax: ast.Module

    @property
    def folder(self) -> str:
        """Give the top-level folder, which is the import package."""
        return self.path.split("/", 1)[0]


@dataclass(frozen=True)
class Tree:
    """All Python files of a checkout by their module name."""

    modules: dict[str, Module] = field(default_factory=dict)

    @classmethod
    def of(cls, files: Iterable[tuple[str, str]]) -> Tree:
        """Parse (path, source) pairs."""
        modules = {}
        for path, source in files:
            name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            modules[name] = Module(path, name, source, ast.parse(source, path))
        return cls(modules)

    @classmethod
    def of_repository(cls) -> Tree:
        """Parse every Python file of this repository outside hidden and built folders."""
        paths = [path for top in (*ALLOWED, "tests", "scripts") for path in sorted((ROOT / top).rglob("*.py"))]
        return cls.of((path.relative_to(ROOT).as_posix(), path.read_text()) for path in [*paths, ROOT / "setup.py"])

    def ours(self, dotted: str) -> str | None:
        """Give the longest prefix of a dotted name that is one of our modules."""
        parts = dotted.split(".")
        for length in range(len(parts), 0, -1):
            if (name := ".".join(parts[:length])) in self.modules:
                return name
        return None


def imported_names(module: Module) -> Iterator[str]:
    """Yield every dotted name that a module imports anywhere: at its top, lazily, or for type checking."""
    package = module.name if module.path.endswith("__init__.py") else module.name.rpartition(".")[0]
    for node in ast.walk(module.syntax):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                above = ".".join(parts[: len(parts) - node.level + 1])
                base = f"{above}.{base}".strip(".")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def edges(tree: Tree) -> dict[str, set[str]]:
    """Map each of our modules to those of ours that it imports."""
    graph: dict[str, set[str]] = {}
    for module in tree.modules.values():
        targets = (tree.ours(name) for name in imported_names(module))
        graph[module.name] = {target for target in targets if target is not None and target != module.name}
    return graph


def upward_imports(tree: Tree) -> list[str]:
    """Find imports that the table of floors does not allow."""
    found = []
    for module in tree.modules.values():
        if module.folder not in ALLOWED:
            continue
        allowed = ALLOWED[module.folder] | {module.folder}
        for part, more in ALSO_ALLOWED.items():
            if module.name == part or module.name.startswith(part + "."):
                allowed |= more
        for name in imported_names(module):
            top = name.split(".", 1)[0]
            if top in {*ALLOWED, "tests", "scripts"} - allowed:
                found.append(f"{module.path}: {module.folder} may not import {top}")
    return found


def import_cycles(tree: Tree) -> list[str]:
    """Find modules that import each other: those left once every module without importers or imports is taken away."""
    graph = edges(tree)
    while graph:
        imported = set().union(*graph.values())
        idle = {name for name, targets in graph.items() if not targets or name not in imported}
        if not idle:
            return [f"import cycle among: {', '.join(sorted(graph))}"]
        graph = {name: targets - idle for name, targets in graph.items() if name not in idle}
    return []


def forbidden_dependencies(tree: Tree) -> list[str]:
    """Find modules that import, or reach through ours, an outside package their folder must never touch."""
    graph, found = edges(tree), []
    for module in tree.modules.values():
        banned = NEVER.get(module.folder, frozenset())
        reached, waiting = {module.name}, [module.name]
        while banned and waiting:
            for target in graph[waiting.pop()] - reached:
                reached.add(target)
                waiting.append(target)
        for name in sorted(reached) if banned else ():
            for outside in imported_names(tree.modules[name]):
                if (top := outside.split(".", 1)[0]) in banned and top not in ALLOWED:
                    found.append(f"{module.path}: {module.folder} must not reach {top} (imported by {name})")
    return found


def environment_reads(tree: Tree) -> list[str]:
    """Find uses of the process environment outside the two files that may read it."""
    attributes, found = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}, []
    for module in tree.modules.values():
        if module.path in ENVIRONMENT_READERS or module.folder in FREE_OF_ENVIRONMENT_RULE:
            continue
        for node in ast.walk(module.syntax):
            if isinstance(node, ast.Attribute) and node.attr in attributes and ast.unparse(node.value) == "os":
                found.append(f"{module.path}:{node.lineno}: reads os.{node.attr}")
        names = {name for name in imported_names(module) if name.startswith("os.")}
        found += [f"{module.path}: imports {name}" for name in names if name.removeprefix("os.") in attributes]
    return found


def wall_clock_reads(tree: Tree) -> list[str]:
    """Find looks at the wall clock that make no `created` stamp."""
    found = []
    for module in tree.modules.values():
        if module.path in WALL_CLOCK_READERS or module.folder in FREE_OF_WALL_CLOCK_RULE:
            continue
        lines = module.source.splitlines()
        for node in ast.walk(module.syntax):
            if not isinstance(node, ast.Attribute) or ast.unparse(node) not in WALL_CLOCKS:
                continue
            if "created" not in lines[node.lineno - 1]:
                found.append(f"{module.path}:{node.lineno}: looks at the wall clock")
        if "time.time" in imported_names(module):
            found.append(f"{module.path}: imports time.time")
    return found


def unsafe_loading(tree: Tree) -> list[str]:
    """Find what runs code out of data: pickle and its kin, torch.load, eval and exec."""
    found = []
    for module in tree.modules.values():
        for name in imported_names(module):
            if name.split(".", 1)[0] in UNSAFE_MODULES or name == "torch.load":
                found.append(f"{module.path}: imports {name}")
        for node in ast.walk(module.syntax):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
                found.append(f"{module.path}:{node.lineno}: uses torch.load")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in UNSAFE_CALLS:
                found.append(f"{module.path}:{node.lineno}: calls {node.func.id}")
    return found


def bad_names(tree: Tree) -> list[str]:
    """Find files and folders whose name says nothing."""
    return [
        f"{module.path}: a folder or file is called {word}"
        for module in tree.modules.values()
        for word in sorted(BAD_NAMES & set(re.split(r"[/._]", module.path.removesuffix(".py"))))
    ]


def oversized(tree: Tree) -> list[str]:
    """Find files and functions that are too long to be read at once."""
    found = []
    for module in tree.modules.values():
        if (lines := len(module.source.splitlines())) > MAX_FILE_LINES:
            found.append(f"{module.path}: {lines} lines, more than {MAX_FILE_LINES}")
        for node in ast.walk(module.syntax):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    found.append(f"{module.path}: {node.name} has {length} lines, more than {MAX_FUNCTION_LINES}")
    return found


def busy_package_files(tree: Tree) -> list[str]:
    """Find `__init__.py` files that hold anything but one docstring; baton's hands out the public names, lazily."""
    return [
        f"{module.path}: holds more than a docstring, or none"
        for module in tree.modules.values()
        if module.path.endswith("/__init__.py")
        and module.path != "baton/__init__.py"
        and (len(module.syntax.body) != 1 or ast.get_docstring(module.syntax) is None)
    ]


def unlisted_packages(tree: Tree, listed: Iterable[str]) -> list[str]:
    """Compare the packages that pyproject.toml installs with the folders that hold one."""
    on_disk = {
        module.name
        for module in tree.modules.values()
        if module.path.endswith("/__init__.py") and module.folder in ALLOWED
    }
    wanted = set(listed)
    missing = [f"pyproject.toml does not list {name}" for name in sorted(on_disk - wanted)]
    return missing + [f"pyproject.toml lists {name}, which is not there" for name in sorted(wanted - on_disk)]


Rule = Callable[[Tree], list[str]]
RULES: tuple[Rule, ...] = (
    upward_imports,
    import_cycles,
    forbidden_dependencies,
    environment_reads,
    wall_clock_reads,
    unsafe_loading,
    bad_names,
    oversized,
    busy_package_files,
)


@pytest.fixture(scope="module")
def repository() -> Tree:
    """Return this repository, parsed once."""
    return Tree.of_repository()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_repository_keeps_every_rule(rule: Rule, repository: Tree) -> None:
    assert rule(repository) == []


def test_every_package_is_installed(repository: Tree) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert unlisted_packages(repository, project["tool"]["setuptools"]["packages"]) == []


def test_every_folder_of_code_is_on_a_floor() -> None:
    code = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert code - {"tests"} <= set(ALLOWED)


def test_the_router_starts_without_torch() -> None:
    code = "import sys, baton, baton.cli, router.app, model.source; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or "torch was imported"


LONG_FUNCTION = "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES
BREACHES: tuple[tuple[Rule, dict[str, str], str], ...] = (
    (upward_imports, {"model/a.py": "import engine.pool"}, "model may not import engine"),
    (upward_imports, {"decode/a.py": "from prefill import worker"}, "decode may not import prefill"),
    (upward_imports, {"router/a.py": "def f():\n    import engine"}, "router may not import engine"),
    (upward_imports, {"bench/load.py": "import router.policy"}, "bench may not import router"),
    (upward_imports, {"baton/a.py": "import tests.conftest"}, "baton may not import tests"),
    (import_cycles, {"model/a.py": "import model.b", "model/b.py": "from model import a"}, "model.a, model.b"),
    (import_cycles, {"model/a.py": "from . import b", "model/b.py": "def f():\n    from .a import x"}, "import cycle"),
    (
        import_cycles,
        {"model/a.py": "import model.b", "model/b.py": "if TYPE_CHECKING:\n    from model.a import A"},
        "import cycle",
    ),
    (forbidden_dependencies, {"router/a.py": "import torch"}, "must not reach torch"),
    (
        forbidden_dependencies,
        {"router/a.py": "import protocol.b", "protocol/b.py": "def f():\n    from torch import nn"},
        "router/a.py: router must not reach torch (imported by protocol.b)",
    ),
    (forbidden_dependencies, {"kernels/a.py": "import socket"}, "must not reach socket"),
    (environment_reads, {"router/a.py": "import os\nx = os.environ['A']"}, "reads os.environ"),
    (environment_reads, {"engine/a.py": "from os import getenv"}, "imports os.getenv"),
    (wall_clock_reads, {"engine/a.py": "import time\nlate = time.time() > 5"}, "looks at the wall clock"),
    (wall_clock_reads, {"router/a.py": "from time import time\nx = time()"}, "imports time.time"),
    (unsafe_loading, {"tests/a.py": "import pickle"}, "imports pickle"),
    (unsafe_loading, {"model/a.py": "import torch\nx = torch.load('f')"}, "uses torch.load"),
    (unsafe_loading, {"model/a.py": "eval('1')"}, "calls eval"),
    (bad_names, {"router/utils.py": ""}, "called utils"),
    (bad_names, {"engine/helpers/a.py": ""}, "called helpers"),
    (bad_names, {"engine/string_utils.py": ""}, "called utils"),
    (oversized, {"engine/a.py": "x = 1\n" * (MAX_FILE_LINES + 1)}, "601 lines"),
    (oversized, {"engine/a.py": LONG_FUNCTION}, "f has 81 lines"),
    (busy_package_files, {"engine/__init__.py": '"""Doc."""\nimport os'}, "more than a docstring"),
    (busy_package_files, {"engine/__init__.py": ""}, "or none"),
)


@pytest.mark.parametrize(("rule", "files", "message"), BREACHES)
def test_a_breach_is_found(rule: Rule, files: dict[str, str], message: str) -> None:
    assert any(message in violation for violation in rule(Tree.of(files.items())))


GOOD_TREE = {
    "protocol/__init__.py": '"""Doc."""',
    "protocol/a.py": "import json",
    "kernels/a.py": "import torch",
    "model/a.py": "import torch\nimport kernels.a\nmodel.eval()",
    "router/a.py": "from protocol import a",
    "router/b.py": "from . import a",
    "bench/simulation.py": "import router.b",
    "baton/config.py": "import os\nx = os.environ\nimport engine, router.a",
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_tree_in_order_yields_nothing(rule: Rule) -> None:
    assert rule(Tree.of(GOOD_TREE.items())) == []


def test_packages_missing_on_either_side_are_found() -> None:
    tree = Tree.of({"engine/__init__.py": '"""Doc."""', "model/__init__.py": '"""Doc."""'}.items())
    assert unlisted_packages(tree, ["engine", "router"]) == [
        "pyproject.toml does not list model",
        "pyproject.toml lists router, which is not there",
    ]
