"""Tests of prefill/."""
