"""Tests of baton/."""
