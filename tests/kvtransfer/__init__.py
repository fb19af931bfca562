"""Tests of block transfers."""
