"""Tests of the examples, as their readers run them."""
