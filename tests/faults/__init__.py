"""Faults on purpose: real processes, real signals, real UCX, and a ledger of every token of every stream."""
