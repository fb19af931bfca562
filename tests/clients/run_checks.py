"""Run inside a client's own environment: call every `check_*` of a file against a running server.

    <environment's python> -P run_checks.py FILE BASE_URL MODEL

1. The file is loaded by its path; it may import what its environment has, and nothing of ours.
2. Each `check_*(target)` is called in the order of the file, awaited where it is a coroutine, and named when it ends.
3. A check that leaves a stream half read returns 1: the caller then expects the server to have seen it go.
4. The exit code is 1 if any check failed; the others still ran.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Target:
    """The server as clients are told of it.

    Attributes:
        url: ends in /v1.
        model: name that is served.
    """

    url: str
    model: str


def main(file: str, url: str, model: str) -> int:
    """Run the checks of one file; returns the exit code."""
    spec = importlib.util.spec_from_file_location("checks", Path(file))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["checks"] = module  # pydantic looks annotations up there
    spec.loader.exec_module(module)
    target, failed, aborted = Target(url, model), 0, 0
    with asyncio.Runner() as runner:  # one loop: clients keep connections that belong to it
        for name, check in list(vars(module).items()):
            if not name.startswith("check_"):
                continue
            started_s = time.monotonic()
            try:
                found = check(target)
                aborted += (runner.run(found) if inspect.iscoroutine(found) else found) or 0
            except Exception:  # noqa: BLE001 - whatever a client raises is a failed check
                failed += 1
                print(f"failed {name}\n{traceback.format_exc()}", flush=True)
            else:
                print(f"ok {name} {time.monotonic() - started_s:.1f} s", flush=True)
    print(f"aborted {aborted}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
