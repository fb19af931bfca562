"""`python -m bench`: the same as `baton bench`."""

from __future__ import annotations

import sys

from bench.cli import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m bench"))
