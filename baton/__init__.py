"""Command line, configuration and launching."""
