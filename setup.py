"""Add the optional native extension to what pyproject.toml declares.

The build must never fail the install: a machine without a C toolchain runs the plain-torch kernels instead. So every
error met while describing the extension drops it with a warning, and `optional=True` lets its compilation fail too.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup

BUILD_SCRIPT = Path(__file__).resolve().parent / "kernels" / "cpu" / "build.py"


def native_extensions() -> list[Extension]:
    """Return the extension that kernels/cpu/build.py describes, or none when there is no such file or it fails."""
    if not BUILD_SCRIPT.is_file():
        return []
    spec = importlib.util.spec_from_file_location("baton_native_build", BUILD_SCRIPT)
    if spec is None or spec.loader is None:
        return []
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        extension = module.extension()
    except Exception as error:  # noqa: BLE001 - whatever it is, the install goes on without the native kernels
        print(f"warning: native kernels left out: {error}", file=sys.stderr)
        return []
    if extension is None:
        return []
    extension.optional = True
    return [extension]


setup(ext_modules=native_extensions())
