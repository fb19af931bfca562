"""Bodies that are dear to look at: each is looked at once, however it is made."""

from __future__ import annotations

import json
import random
import time
from contextlib import suppress

import pytest

from protocol.errors import InvalidRequest
from router.api import CompletionRequest, parse
from router.json_bounds import HEAVY, MAX_WEIGHT, check_size, check_unique

BUDGET_S = 4.0  # looking twice at each pair of names would take minutes


def _body(field: str) -> bytes:
    return b'{"model": "m", "prompt": "x", "metadata": ' + field.encode() + b"}"


NUM_NAMES = MAX_WEIGHT // (HEAVY + 1) - 100
NAMES = ",".join(f'"{i:x}": 0' for i in range(NUM_NAMES))


@pytest.mark.parametrize(
    "field",
    [
        f'{{{NAMES}, "{NUM_NAMES - 1:x}": 0}}',
        f'[{{{NAMES}, "\\u0030": 0}}]',
        f'{{"a": {{{NAMES}}}, "b": [], "a": 1}}',
        '{"a": "' + '\\"' * 2_000_000 + '", "a": 1}',
        '{"' + "\\n" * 1_000_000 + '": 1, "' + "\\u000a" * 1_000_000 + '": 1}',
        '{"' + "x" * 3_000_000 + '": 1, "' + "x" * 3_000_000 + '": 1}',
    ],
    ids=["names", "escaped", "outer", "escapes", "escaped names", "long names"],
)
def test_a_name_that_stands_twice_is_found_in_one_pass(field: str) -> None:
    begin_s = time.monotonic()
    with pytest.raises(InvalidRequest, match="there twice in one object"):
        parse(_body(field), CompletionRequest)
    assert time.monotonic() - begin_s < BUDGET_S


@pytest.mark.parametrize(
    "field",
    [
        f"{{{NAMES}}}",
        json.dumps([{"a": {"a": 1}}, {"a": [1, {"b": 2, "a": "a"}]}] * 3000),
        json.dumps({"a": '"a":', "b": "\\", '"a"': "{", "c:": "}{"}),
        json.dumps("," * 3_000_000 + "[{:" * 100_000),
        json.dumps(["\\" * 5000, "é\u2028" * 5000, ""]),
    ],
    ids=["names", "levels", "marks in strings", "marks in one string", "escapes"],
)
def test_names_that_differ_or_lie_in_different_objects_are_taken(field: str) -> None:
    begin_s = time.monotonic()
    assert parse(_body(field), CompletionRequest).prompt == "x"
    assert time.monotonic() - begin_s < BUDGET_S


@pytest.mark.parametrize("part", ["[],", "{},", '"a":0,', '{"":[]},', "0,", '"",', "[[[[[[[[]]]]]]]],"])
def test_a_body_of_too_many_values_is_refused_before_it_is_decoded(part: str) -> None:
    many = part * (1 + MAX_WEIGHT // (part.count(",") + HEAVY * sum(map(part.count, "[{:")))) + "0"
    field = f'{{{many.removesuffix("0")}"a":0}}' if part.startswith('"a"') else f"[{many}]"
    for body in (_body(field), b'{"model": "m", "prompt": ' + field.encode() + b"}"):
        with pytest.raises(InvalidRequest, match="too many values"):
            parse(body, CompletionRequest)


def test_as_many_token_ids_as_prompts_can_have_are_taken() -> None:
    prompt = [[7] * 7000] * 128
    assert parse(json.dumps({"model": "m", "prompt": prompt}).encode(), CompletionRequest).prompt == prompt


@pytest.mark.parametrize("body", [b'"', b'["', b'{"a', b'{"a\\', b'{"a\\"', b'"' * 1001, b"[1", b"\\", b'"\\u00'])
def test_the_size_of_what_is_no_json_is_found_as_well(body: bytes) -> None:
    with suppress(InvalidRequest):
        check_size(body + b"," * (MAX_WEIGHT + 1))


def test_both_looks_agree_with_a_reader_of_json() -> None:
    dice = random.Random(12)
    names = [
        '"a"',
        '"\\u0061"',
        '"b"',
        '"é"',
        '"\\u00e9"',
        '"' + "y" * 1500 + '"',
        '"' + "\\t" * 700 + '"',
        '"d:"',
        '""',
    ]
    leaves = ["1", '"a"', '"\\""', '"\\\\"', '"{:"', "null", '"' + "x" * 2000 + '"', '"a\\u00e9é"', "-1.5e3", '"]}"']

    def value(depth: int) -> str:
        share = dice.random()
        if depth == 0 or share < 0.3:
            return dice.choice(leaves)
        inner = [value(depth - 1) for _ in range(dice.randint(0, 4))]
        if share < 0.6:
            return "[" + dice.choice([",", " ,\n"]).join(inner) + "]"
        return "{" + ",".join(dice.choice(names) + dice.choice([":", " :\t"]) + one for one in inner) + "}"

    found = {True: 0, False: 0}
    for _ in range(1500):
        body = value(4)
        is_unique = True

        def seen(pairs: list[tuple[str, object]]) -> None:
            nonlocal is_unique
            is_unique &= len({name for name, _ in pairs}) == len(pairs)

        json.loads(body, object_pairs_hook=seen)
        found[is_unique] += 1
        for padding in (0, 5000):  # small bodies and others are looked at in different ways
            try:
                check_unique(body.encode() + b" " * padding)
                assert is_unique, body
            except InvalidRequest:
                assert not is_unique, body
    assert min(found.values()) > 150
