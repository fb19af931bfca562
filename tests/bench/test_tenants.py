"""What `bench.tenants` makes of its times."""

from __future__ import annotations

import pytest

from bench.tenants import Times


def test_the_area_is_one_where_times_tell_all_and_a_half_where_they_tell_nothing() -> None:
    assert Times([1.0, 2.0], [3.0, 4.0]).area == 1.0
    assert Times([3.0, 4.0], [1.0, 2.0]).area == 0.0
    assert Times([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]).area == 0.5, "ties count half"


def test_the_error_shrinks_with_the_number_of_trials() -> None:
    few, many = (Times([0.0] * number, [0.0] * number) for number in (100, 400))
    assert few.error == pytest.approx(1.96 * (201 / 120_000) ** 0.5)
    assert many.error == pytest.approx(few.error / 2, rel=0.01)
