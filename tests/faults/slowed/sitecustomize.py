"""Lets prefill workers notice LANDED late, in every process that starts with this folder on PYTHONPATH.

The time between COMMIT and release is a fraction of a millisecond: no kill from outside hits it often enough to count.
Nothing else changes: blocks stay leased, and the transfer open, until LANDED is taken. The product knows nothing of it.
"""

from __future__ import annotations

import asyncio
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

TARGET = "kvtransfer.sending"
LATE_S = 0.15


class _Loader(importlib.abc.Loader):
    """Loads the module as ever, then wraps one method of it."""

    def __init__(self, inner: importlib.abc.Loader) -> None:
        self._inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        side = module.SendSide
        take = side._take_landed

        def take_late(self: Any, peer: Any, transfer_id: int) -> None:
            asyncio.get_running_loop().call_later(LATE_S, take, self, peer, transfer_id)

        side._take_landed = take_late


class _Finder(importlib.abc.MetaPathFinder):
    """Stands before the ordinary finders for one module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != TARGET:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


sys.meta_path.insert(0, _Finder())
