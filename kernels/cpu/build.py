"""How the native CPU kernels are compiled: read by setup.py at install time, and by the tests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from setuptools import Extension

FOLDER = "kernels/cpu/native"
NAMES = ("dispatch", "isa_avx2", "isa_avx512", "isa_portable", "pack", "pool")
SOURCES = tuple(f"{FOLDER}/{name}.cpp" for name in NAMES)
COMPILE_ARGS = (
    "-O3",
    "-std=c++17",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
    # Fused multiply-adds stand where the source says so: a result must not depend on what a compiler contracts.
    # No -ffast-math either: linked into a shared library it would switch denormals off for the whole process.
    # No -march: the instruction set is chosen at run time.
    "-ffp-contract=off",
    "-Wno-psabi",
)


def extension() -> Extension:
    """Describe the optional extension `kernels.cpu._native` (paths relative to the repository's root).

    Optional: where no compiler is found the package installs without it and runs on the reference kernels.
    """
    from setuptools import Extension

    return Extension(
        "kernels.cpu._native",
        sources=list(SOURCES),
        depends=[str(path) for path in sorted(Path(FOLDER).glob("*.h"))],
        extra_compile_args=list(COMPILE_ARGS),
        extra_link_args=["-pthread"],
        language="c++",
        optional=True,
    )


def compile_command(compiler: str, root: Path, output: Path) -> list[str]:
    """Give the one command that builds the library by hand: `root` is the repository, `output` the .so to write."""
    return [compiler, *COMPILE_ARGS, "-shared", "-fPIC", *(str(root / source) for source in SOURCES), "-o", str(output)]
