"""The judge of schema-bound answers: random schemas are sound, and what does not obey is found."""

from __future__ import annotations

import random

import jsonschema
import pytest

from bench.random_schemas import random_schema
from bench.schemas import Verdicts, fault_of


def test_random_schemas_are_valid_and_follow_from_their_seed() -> None:
    for seed in range(200):
        schema = random_schema(random.Random(seed))
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema == random_schema(random.Random(seed)) and schema["type"] == "object"
    assert len({str(random_schema(random.Random(seed))) for seed in range(50)}) > 45


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("time", "12:34:56.648183418685452-11:49", "12:34:56"),
        ("time", "23:59:60Z", "24:00:00Z"),
        ("date-time", "2024-02-29T00:00:00+01:00", "2023-02-29T00:00:00Z"),
        ("date", "2024-02-29", "2024-13-01"),
        ("ipv4", "127.0.0.1", "256.1.1.1"),
        ("uuid", "00000000-0000-0000-0000-00000000000a", "0"),
    ],
)
def test_formats_are_those_of_today_s_drafts(kind: str, good: str, bad: str) -> None:
    schema = {"type": "string", "format": kind}
    assert fault_of(f'"{good}"', schema) is None
    assert fault_of(f'"{bad}"', schema) is not None


def test_what_is_no_json_or_disobeys_is_a_fault() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
    assert fault_of('{"a": 1}', schema) is None
    assert all(fault_of(text, schema) for text in ("", "{", '{"a": 1.5}', '{"b": 1}', "[]"))


def test_the_summary_counts_cut_answers_apart() -> None:
    verdicts = Verdicts(num_valid=3, num_cut=2, num_tokens=9, wall_s=1.0, faults=["seed 1: no"])
    assert str(verdicts).startswith("3 of 4 whole answers are valid (75.0 %); 2 were cut") and "seed 1" in str(verdicts)
