"""How a checkout becomes a wheel that owns one name: everything but `baton/` moves into `baton/_house/`.

In a checkout the folders are top-level packages (`router`, `model`, ...). Installed beside other distributions such
names would meet theirs, so the build moves the packages and rewrites the imports of them: docs/adr/0001 says why.

1. setuptools has built everything as it lies in the checkout, the native extension too.
2. The folders of our packages move, `baton` stays.
3. In every module `import router.core` and `from router.core import X` get the new name in front; lines stay where they
   are. What names a module in a string must derive it from `__package__`: tests/test_distribution.py looks for others.

Read by setup.py, so only the standard library.
"""

from __future__ import annotations

import ast
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

KEPT = "baton"
HOUSE = "baton._house"
HOUSE_FOLDER = "baton/_house"
HOUSE_DOCSTRING = (
    '"""The rest of Baton, which lies in top-level folders of its repository: moved here by the build."""\n'
)


class LayoutError(Exception):
    """A module cannot be moved; the message says which and why."""


def move_house(built: Path, packages: Collection[str]) -> None:
    """Give the tree of `built` packages the layout of a wheel. Raises LayoutError."""
    moved = sorted({name.partition(".")[0] for name in packages} - {KEPT})
    house = built / HOUSE_FOLDER
    house.mkdir()
    (house / "__init__.py").write_text(HOUSE_DOCSTRING)
    for name in moved:
        shutil.move(built / name, house / name)
    for path in sorted((built / KEPT).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        try:
            path.write_text(rewritten(source, moved), encoding="utf-8")
        except LayoutError as error:
            raise LayoutError(f"{path.relative_to(built)}: {error}") from None


def rewritten(source: str, moved: Collection[str]) -> str:
    """Return a module's source with its imports of moved packages leading into the house. Raises LayoutError."""
    # Offsets of the syntax tree count bytes.
    lines = source.encode().splitlines(keepends=True)
    tree = ast.parse(source)
    loaded = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    edits = sorted({edit for node in ast.walk(tree) for edit in _edits(node, lines, moved, loaded)}, reverse=True)
    for line, column, length, text in edits:
        whole = lines[line]
        lines[line] = whole[:column] + text.encode() + whole[column + length :]
    return b"".join(lines).decode()


def _edits(
    node: ast.AST, lines: list[bytes], moved: Collection[str], loaded: Collection[str]
) -> Iterator[tuple[int, int, int, str]]:
    """Yield (line, byte column, number of bytes that go, what comes in their place)."""
    if (
        isinstance(node, ast.ImportFrom)
        and node.level == 0
        and node.module is not None
        and _is_ours(node.module, moved)
    ):
        line, column = node.lineno - 1, node.col_offset + len("from ")
        if not lines[line].startswith(node.module.encode(), column):
            raise LayoutError(f"line {node.lineno}: `from {node.module}` is not written on one line with one space")
        yield line, column, 0, HOUSE + "."
    elif isinstance(node, ast.Import):
        for alias in node.names:
            if not _is_ours(alias.name, moved):
                continue
            top, _, rest = alias.name.partition(".")
            line, column = alias.lineno - 1, alias.col_offset
            if alias.asname is not None or (rest and top not in loaded):
                yield line, column, 0, HOUSE + "."
            elif not rest:
                yield line, column, len(top), f"{HOUSE}.{top} as {top}"
            else:
                raise LayoutError(
                    f"line {node.lineno}: import {alias.name} binds {top}, which is used: import it from {top}"
                )


def _is_ours(module: str, moved: Collection[str]) -> bool:
    return module.partition(".")[0] in moved
