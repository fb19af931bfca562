"""How the native CPU kernels are compiled: read by setup.py at install time, and by the tests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from setuptools import Extension

SOURCES = ("kernels/cpu/attention.cpp",)
# No -ffast-math: linked into a shared library it would switch denormals off for the whole process.
# No -march: the instruction set is chosen at run time.
COMPILE_ARGS = ("-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi")


def extension() -> Extension:
    """Describe the optional extension `kernels.cpu._native` (paths relative to the repository's root).

    Optional: where no compiler is found the package installs without it and runs on the reference kernels.
    """
    from setuptools import Extension

    return Extension(
        "kernels.cpu._native",
        sources=list(SOURCES),
        extra_compile_args=list(COMPILE_ARGS),
        language="c++",
        optional=True,
    )


def compile_command(compiler: str, root: Path, output: Path) -> list[str]:
    """Give the one command that builds the library by hand: `root` is the repository, `output` the .so to write."""
    return [compiler, *COMPILE_ARGS, "-shared", "-fPIC", *(str(root / source) for source in SOURCES), "-o", str(output)]
