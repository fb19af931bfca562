"""Let `python -m baton` do what the `baton` command does."""

import sys

from baton.cli import main

if __name__ == "__main__":
    sys.exit(main())
