"""Add the optional native extension to what pyproject.toml declares, and give wheels a layout of their own.

The build must never fail the install: a machine without a C toolchain runs the plain-torch kernels instead. So every
error met while describing the extension drops it with a warning, and `optional=True` lets its compilation fail too.

An editable install leaves everything where it lies; a wheel owns the name `baton` alone (scripts/wheel_layout.py).
"""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).resolve().parent
BUILD_SCRIPT = ROOT / "kernels" / "cpu" / "build.py"
LAYOUT_SCRIPT = ROOT / "scripts" / "wheel_layout.py"


def load(path: Path) -> ModuleType:
    """Import a script by its path: the folder of this file is not on the import path of a build."""
    spec = importlib.util.spec_from_file_location(f"baton_build_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildHouse(build):  # type: ignore[misc]
    """The build, whose result is moved into the layout of a wheel."""

    def run(self) -> None:
        """Build from nothing, and move: what an earlier build left would come along."""
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        if not self.get_finalized_command("build_py").editable_mode:
            load(LAYOUT_SCRIPT).move_house(Path(self.build_lib), self.distribution.packages or [])


class OneName(egg_info):  # type: ignore[misc]
    """The metadata, which name the one top-level package of a wheel."""

    def run(self) -> None:
        """Write them, then say again what is at the top."""
        super().run()
        (Path(self.egg_info) / "top_level.txt").write_text("baton\n")


def native_extensions() -> list[Extension]:
    """Return the extension that kernels/cpu/build.py describes, or none when there is no such file or it fails."""
    if not BUILD_SCRIPT.is_file():
        return []
    try:
        extension = load(BUILD_SCRIPT).extension()
    except Exception as error:  # noqa: BLE001 - whatever it is, the install goes on without the native kernels
        print(f"warning: native kernels left out: {error}", file=sys.stderr)
        return []
    if extension is None:
        return []
    extension.optional = True
    return [extension]


setup(ext_modules=native_extensions(), cmdclass={"build": BuildHouse, "egg_info": OneName})
