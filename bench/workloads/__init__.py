"""Workloads: what is sent, and when."""
