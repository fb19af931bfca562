"""Start a server with mutations (mutations/README.md), and count what it says of bits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.e2e.server import Server

FOLDER = Path(__file__).parent / "mutations"
_NAMES = ("PYTHONPATH", "BATON_TEST_MUTATION")


@contextmanager
def mutations(*names: str) -> Iterator[None]:
    """Let servers that are started inside have these mutations."""
    before = {name: os.environ.get(name) for name in _NAMES}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(FOLDER), *filter(None, [before["PYTHONPATH"]])])
    os.environ["BATON_TEST_MUTATION"] = ",".join(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def flips(server: Server) -> tuple[int, int]:
    """Return how many bits were flipped, and how many pieces were found damaged."""
    log = server.log.read_bytes()
    return log.count(b"FLIPPED a bit"), log.count(b"arrived damaged (from")
