"""The histogram of tokens shows what prometheus_client's own would."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics, generate_latest

from router.histogram import PlainHistogram

BOUNDS = (0.001, 0.0025, 0.1, 1, 10)
VALUES = st.lists(st.one_of(st.floats(0, 20), st.sampled_from([0.0, *map(float, BOUNDS)])), max_size=40)


@given(VALUES)
def test_every_sample_is_the_same(values: list[float]) -> None:
    disable_created_metrics()  # type: ignore[no-untyped-call]
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    reference = Histogram("gap_seconds", "A gap.", ("model_name",), buckets=BOUNDS, registry=theirs).labels("m")
    histogram = PlainHistogram("gap_seconds", "A gap.", {"model_name": "m"}, BOUNDS)
    ours.register(histogram)
    for value in values:
        reference.observe(value)
        histogram.observe(value)
    assert generate_latest(ours) == generate_latest(theirs)


def test_it_keeps_counting_between_two_reads() -> None:
    histogram = PlainHistogram("gap_seconds", "A gap.", {"model_name": "m"}, BOUNDS)
    registry = CollectorRegistry()
    registry.register(histogram)
    for expected in (1.0, 2.0):
        histogram.observe(0.05)
        assert registry.get_sample_value("gap_seconds_count", {"model_name": "m"}) == expected
        assert registry.get_sample_value("gap_seconds_bucket", {"model_name": "m", "le": "0.1"}) == expected
        assert registry.get_sample_value("gap_seconds_bucket", {"model_name": "m", "le": "0.0025"}) == 0
