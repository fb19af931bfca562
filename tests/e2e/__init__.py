"""End to end: `baton serve` as a user starts it, driven over HTTP."""
