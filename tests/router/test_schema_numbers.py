"""Numbers of a schema: whatever is let through obeys, to the last digit; what cannot be held is refused by its name."""

from __future__ import annotations

import json
import random
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

from protocol.errors import GrammarError, InvalidRequest
from protocol.request import Grammar, GrammarKind
from router import exact_json
from router.api import ChatRequest, parse
from router.structured import structured_output
from tests.router.guided import Guide, asked, forced

BIG = 9007199254740993
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Guide:
    """The small vocabulary."""
    return Guide(tmp_path_factory.mktemp("guide"))


# schema as JSON, what obeys it, what does not
CASES: list[tuple[str, list[str], list[str]]] = [
    ('{"type":"number","exclusiveMinimum":0,"maximum":0.5}', ["0.1", "0.5", "0.01"], ["0", "-0", "0.0", "0.51"]),
    ('{"type":"number","exclusiveMaximum":0,"minimum":-0.5}', ["-0.1", "-0.5"], ["0", "-0", "-0.0", "-0.51"]),
    ('{"type":"number","exclusiveMinimum":3,"exclusiveMaximum":3.2}', ["3.1", "3.19"], ["3", "3.0", "3.2"]),
    ('{"type":"number","exclusiveMaximum":-3,"minimum":-3.5}', ["-3.1", "-3.5"], ["-3", "-3.0"]),
    ('{"type":"number","exclusiveMinimum":-3,"maximum":-2.5}', ["-2.5", "-2.9"], ["-3", "-2.4"]),
    ('{"type":"number","exclusiveMinimum":0,"maximum":1}', ["0.1", "1"], ["0", "0.0"]),
    ('{"type":"number","exclusiveMinimum":0}', ["0.1", "7", "1000"], ["0", "-1"]),
    ('{"type":"number","exclusiveMinimum":0,"exclusiveMaximum":1e-12}', ["0.0000000000005"], ["0", "0.000000000001"]),
    ('{"type":"number","minimum":0,"exclusiveMinimum":true,"maximum":0.5}', ["0.1"], ["0"]),
    ('{"allOf":[{"type":"number"},{"exclusiveMinimum":0},{"maximum":0.5}]}', ["0.1"], ["0", "0.6"]),
    ('{"type":"number","minimum":0.25,"maximum":0.357}', ["0.25", "0.3", "0.35", "0.357"], ["0.2", "0.36"]),
    ('{"type":"number","multipleOf":0.1,"minimum":0.25,"maximum":0.35}', ["0.3"], ["0.31", "0.2", "0.4"]),
    ('{"type":"number","multipleOf":0.1,"minimum":0.3,"maximum":0.3}', ["0.3"], ["0.2"]),
    ('{"type":"number","multipleOf":0.07}', ["0", "0.07", "0.14", "-0.07"], ["0.1", "0.08"]),
    ('{"type":"number","multipleOf":0.1,"maximum":10000.35,"minimum":0.25}', ["10000.3", "0.3"], ["0.2", "10000.4"]),
    ('{"type":"integer","multipleOf":2.5,"minimum":1,"maximum":12}', ["5", "10"], ["2", "3", "7"]),
    ('{"type":"integer","multipleOf":0.5,"minimum":1}', ["1", "7"], ["0", "0.5"]),
    ('{"type":["integer","null"],"exclusiveMinimum":5,"exclusiveMaximum":7}', ["6", "null"], ["5", "7", "6.5"]),
    ('{"type":["number","string"],"exclusiveMinimum":5,"maximum":5.5}', ["5.1", '"x"'], ["5"]),
    ('{"exclusiveMinimum":5,"maximum":5.25}', ["5.2", '"x"', "null", "[1]"], ["5", "4"]),
    ('{"enum":[0.3,0.4,1,"x"],"multipleOf":0.1,"maximum":0.35}', ["0.3", '"x"'], ["0.4", "1"]),
    ('{"enum":[0,0.5],"exclusiveMinimum":0,"maximum":0.5}', ["0.5"], ["0"]),
    ('{"const":1.0,"type":"integer"}', ["1"], ["2"]),
    ('{"const":-0.0}', ["0"], ["1"]),
    ('{"const":1e2}', ["100"], ["10"]),
    ('{"const":{"a":[1152921504606846976]}}', ['{"a":[1152921504606846976]}'], ['{"a":[1152921504606846977]}']),
    ('{"enum":[9007199254740992,-9007199254740992]}', ["9007199254740992", "-9007199254740992"], ["9007199254740993"]),
    (f'{{"type":"integer","minimum":{BIG},"maximum":{BIG + 3}}}', [str(BIG + 1)], [str(BIG - 1), str(BIG + 4)]),
    (f'{{"type":"integer","exclusiveMinimum":{BIG - 1}}}', [str(BIG + 1)], [str(BIG - 1), str(BIG - 2)]),
    (f'{{"allOf":[{{"type":"integer"}},{{"exclusiveMinimum":{BIG - 1}}}]}}', [str(BIG + 1)], [str(BIG - 1)]),
    ('{"type":"integer","minimum":0,"maximum":9223372036854775807}', ["0", str(2**63 - 1)], ["-1", str(2**63)]),
    ('{"type":"integer","minimum":-9223372036854775808}', ["0", "-5"], [str(-(2**63) - 1)]),
    ('{"type":"integer","maximum":123456789012345678901234567890}', ["0", "-5"], ["0.5"]),
    ('{"type":"number","minimum":-1.7976931348623157e308,"maximum":1.7976931348623157e308}', ["0", "-7.5"], ['"x"']),
    ('{"type":"number","minimum":1e-300,"maximum":0.5}', ["0.1"], ["0", "0.6"]),
    ('{"type":"string","minLength":1.0,"maxLength":2e0}', ['"a"', '"ab"'], ['""', '"abc"']),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "good", "bad"), CASES)
def test_numbers_are_exact(guide: Guide, schema: str, good: list[str], bad: list[str]) -> None:
    assert guide.accepted(asked(guided_json=schema), *good, *bad) == good
    wrapped = '{"type":"object","properties":{"x":' + schema + '},"required":["x"],"additionalProperties":false}'
    grammar = forced(exact_json.decoder(Any).decode(wrapped))
    texts = [f'[{{"name":"f","arguments":{{"x":{text}}}}}]' for text in (*good, *bad)]
    assert guide.accepted(grammar, *texts) == texts[: len(good)]


REFUSED: list[tuple[str, str]] = [
    (f'{{"const":{BIG}}}', f"const: {BIG} cannot be held exactly"),
    ('{"enum":[1,1234567890123456789]}', "enum: 1234567890123456789 cannot be held exactly"),
    (f'{{"const":{{"a":[{BIG}]}}}}', "const"),
    (f'{{"enum":["x",{{"a":{BIG}}}]}}', "enum"),
    ('{"const":0.1000000000000000055511151231257827}', "const: 0.1000000000000000055511151231257827 cannot"),
    ('{"const":18446744073709551615}', "const"),
    ('{"const":-123456789012345678901234567890}', "const"),
    (f'{{"type":"integer","minimum":{BIG},"maximum":{BIG}}}', "minimum"),
    ('{"type":"integer","minimum":10000000000000000000}', "minimum"),
    ('{"type":"number","maximum":-1e30}', "maximum"),
    ('{"type":"number","multipleOf":0}', "multipleOf"),
    ('{"type":"number","multipleOf":-1}', "multipleOf"),
    ('{"type":"number","multipleOf":0.12345678901234}', "multipleOf"),
    ('{"type":"integer","multipleOf":10000000000}', "multipleOf"),
    ('{"allOf":[{"multipleOf":0.000001},{"multipleOf":4294967291}]}', "multipleOf"),
    ('{"type":"number","minimum":2,"maximum":1}', "minimum"),
    ('{"type":"object","minProperties":2}', "minProperties"),
]


@pytest.mark.parametrize(("schema", "reason"), REFUSED)
def test_what_cannot_be_held_is_refused_by_its_name(guide: Guide, schema: str, reason: str) -> None:
    with pytest.raises(GrammarError, match=reason):
        guide.held(asked(guided_json=schema))


@pytest.mark.parametrize("number", ["1e400", "-1e400", "1e-400", "1e99999999999999999999"])
def test_numbers_that_no_double_holds_are_no_json_here(number: str) -> None:
    for body in (f'{{"guided_json":{{"const":{number}}}}}', json.dumps({"guided_json": f'{{"const":{number}}}'})):
        with pytest.raises(InvalidRequest, match="out of range"):
            structured_output(
                parse(('{"model":"m","messages":[{"role":"user","content":"x"}],' + body[1:]).encode(), ChatRequest)
            )


# --- drawn at random ---


def _number(dice: random.Random) -> Decimal:
    kind = dice.random()
    if kind < 0.3:
        return Decimal(dice.randint(-12, 12))
    if kind < 0.6:
        return Decimal(dice.randint(-1200, 1200)).scaleb(-dice.randint(1, 3))
    if kind < 0.75:
        return dice.choice([1, -1]) * Decimal(dice.choice([2**53, 2**63, 10**18, 2**60, 10**16])) + dice.randint(-2, 2)
    return Decimal(dice.randint(-(10**17), 10**17)).scaleb(-dice.randint(0, 25))


def _schema(dice: random.Random) -> dict[str, Any]:
    kinds = ["number", "integer", ["number", "null"], ["integer", "string"]]
    low, width = _number(dice), abs(_number(dice)) * Decimal(dice.choice(["1", "0.1", "0.001"]))
    schema: dict[str, Any] = {"type": dice.choice(kinds)}
    if dice.random() < 0.75:
        schema[dice.choice(["minimum", "exclusiveMinimum"])] = low
    if dice.random() < 0.75:
        schema[dice.choice(["maximum", "exclusiveMaximum"])] = low + width
    if dice.random() < 0.3:
        schema["multipleOf"] = Decimal(dice.choice(["1", "2", "3", "0.1", "0.01", "0.07", "0.25", "7", "1.5", "100"]))
    return schema


def _obeys(schema: dict[str, Any], value: Fraction) -> bool:
    if "number" not in schema["type"] and value.denominator != 1:
        return False
    low, high, open_low, open_high = (Fraction(schema[key]) if key in schema else None for key in BOUNDS)
    return not (
        (low is not None and value < low)
        or (high is not None and value > high)
        or (open_low is not None and value <= open_low)
        or (open_high is not None and value >= open_high)
        or ("multipleOf" in schema and (value / Fraction(schema["multipleOf"])).denominator != 1)
    )


def _near(schema: dict[str, Any]) -> set[str]:
    """Return numbers at the bounds of a schema and around them, written in several ways."""
    found = {"0", "-0", "0.0", "1"}
    step = schema.get("multipleOf", Decimal(1))
    for bound in (schema[key] for key in BOUNDS if key in schema):
        shifts = (0, 1, "0.1", "0.01", "1e-9", "1e-17", "0.5", 2, 512, bound / 2)
        values = {bound + sign * Decimal(shift) for shift in shifts for sign in (1, -1)}
        values |= {(bound // step + i) * step for i in range(-2, 3)}
        for value in values:
            written = format(value, "f")
            found |= {written, written.rstrip("0").rstrip(".") if "." in written else written, str(int(value))}
    return {text for text in found if text not in ("", "-")}


@pytest.mark.parametrize("seed", range(6))
def test_nothing_that_is_let_through_is_out_of_bounds(guide: Guide, seed: int) -> None:
    dice = random.Random(seed)
    num_held = num_accepted = 0
    for number in range(40):
        schema = _schema(dice)
        parts: dict[str, Any] = schema
        if number % 3 == 0:
            parts = {"type": schema["type"], "allOf": [{key: schema[key]} for key in schema if key != "type"]}
        grammar = Grammar(kind=GrammarKind.JSON_SCHEMA, text=exact_json.encode(parts).decode())
        try:
            accepted = guide.accepted(grammar, *_near(schema))
        except GrammarError:
            continue
        num_held, num_accepted = num_held + 1, num_accepted + len(accepted)
        wrong = [text for text in accepted if not _obeys(schema, Fraction(text))]
        assert not wrong, (schema, wrong)
    assert num_held > 25 and num_accepted > 200
