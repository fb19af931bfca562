"""Keywords of a schema: what asks for nothing is ignored, as JSON Schema says; the rest is obeyed, or refused."""

from __future__ import annotations

from typing import Any

import pytest

from protocol.errors import GrammarError, InvalidRequest
from protocol.request import Grammar, GrammarKind
from tests.router.guided import Guide, asked

BASE: dict[str, Any] = {"type": ["object", "array", "string", "number"]}
TEXTS = ['"x"', "[1,1]", '{"a":1}', "5"]


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Guide:
    """The small vocabulary."""
    return Guide(tmp_path_factory.mktemp("guide"))


IDLE: list[dict[str, Any]] = [
    *({"format": name} for name in ("foo", "double", "int64", "regex", "uri-reference", "idn-email", "unknown")),
    {"uniqueItems": False},
    {"title": "t", "description": "d", "$comment": "c", "default": 1, "examples": [1], "deprecated": True},
    {"readOnly": True, "writeOnly": False, "contentMediaType": "text/html", "contentEncoding": "base64"},
    {"contentSchema": {"type": "string"}},
    {"minContains": 1, "maxContains": 2},
    {"contains": {"type": "string"}, "minContains": 0},
    {"then": {"const": 1}, "else": {"const": 2}},
    {"if": {"const": 1}},
    {"not": False},
    {"propertyNames": True},
    {"unevaluatedProperties": True, "unevaluatedItems": {}},
    {"dependentRequired": {}, "dependentSchemas": {}, "dependencies": {}},
    {"additionalItems": False},
    {"nullable": True, "discriminator": {"propertyName": "a"}, "x-order": 5, "xml": {}, "example": 1},
    {"$anchor": "a", "$dynamicAnchor": "b", "$vocabulary": {}, "$id": "https://example.org/s"},
    {"minItems": 0.0, "maxLength": 5.0},
]  # fmt: skip


@pytest.mark.parametrize("fields", IDLE)
def test_what_asks_for_nothing_is_ignored(guide: Guide, fields: dict[str, Any]) -> None:
    assert guide.by_schema({**BASE, **fields}, *TEXTS) == TEXTS
    inner = {"type": "object", "properties": {"a": {**BASE, **fields}}}
    assert guide.by_schema(inner, '{"a":"x"}') == guide.by_tool(inner, '{"a":"x"}') == ['{"a":"x"}']


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"uniqueItems": True}, "uniqueItems"),
    ({"contains": {"type": "string"}}, "contains"),
    ({"contains": {"type": "string"}, "minContains": 0, "maxContains": 1}, "contains"),
    ({"if": {"type": "string"}, "then": {"const": "x"}}, "if"),
    ({"not": {"type": "string"}}, "not"),
    ({"propertyNames": {"pattern": "^a"}}, "propertyNames"),
    ({"unevaluatedProperties": False}, "unevaluatedProperties"),
    ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ({"minProperties": 2}, "minProperties"),
    ({"type": "strange"}, "Invalid type"),
]


@pytest.mark.parametrize(("fields", "name"), REFUSED)
def test_what_cannot_be_obeyed_is_refused_by_its_name(guide: Guide, fields: dict[str, Any], name: str) -> None:
    with pytest.raises(GrammarError, match=name):
        guide.by_schema({**BASE, **fields})


ARRAY, OBJECT = {"type": "array"}, {"type": "object"}
OBEYED: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"type": "string", "format": "ipv4"}, ['"1.2.3.4"'], ['"x"']),
    ({**ARRAY, "uniqueItems": True, "maxItems": 1}, ["[]", "[1]"], ["[1,1]"]),
    ({**ARRAY, "prefixItems": [{"const": 1}], "items": False, "additionalItems": {}}, ["[1]"], ["[2]", "[1,1]"]),
    ({**ARRAY, "items": [{"const": 1}], "additionalItems": {"const": 2}}, ["[1]", "[1,2]"], ["[2]", "[1,1]"]),
    ({**OBJECT, "minProperties": 1, "maxProperties": 2}, ['{"a":1}'], ["{}", '{"a":1,"b":1,"c":1}']),
    ({**OBJECT, "properties": {"a": {}}, "required": ["a"], "minProperties": 2}, ['{"a":1,"b":1}'], ['{"a":1}']),
    ({"$schema": "https://example.com/mine", "const": 1}, ["1"], ["2"]),
    ({"$schema": "https://json-schema.org/draft-07/schema#", "items": [{"const": 1}], **ARRAY}, ["[1]"], ["[2]"]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "good", "bad"), OBEYED)
def test_what_is_obeyed(guide: Guide, schema: dict[str, Any], good: list[str], bad: list[str]) -> None:
    assert guide.by_schema(schema, *good, *bad) == good


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_a_schema_beside_the_type_is_obeyed(kind: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    grammar = asked(response_format={"type": kind, "schema": schema})
    assert grammar == asked(guided_json=schema) and grammar.kind == GrammarKind.JSON_SCHEMA
    assert asked(response_format={"type": kind, "json_schema": {"name": "n", "schema": schema}}) == grammar


@pytest.mark.parametrize("fields", [
    {"type": "text", "schema": {}},
    {"type": "text", "json_schema": {"name": "n", "schema": {}}},
    {"type": "json_object", "schema": {}, "json_schema": {"name": "n", "schema": {}}},
    {"type": "json_object", "schema": "x"},
])  # fmt: skip
def test_a_schema_is_never_dropped(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        asked(response_format=fields)
    assert caught.value.param == "response_format"


NINE = {"const": 9}
REACHED: list[tuple[dict[str, Any], str]] = [
    ({"then": NINE}, "then"),
    ({"if": {"properties": {"x": NINE}}}, "if/properties/x"),
    ({"contains": NINE, "minContains": 0}, "contains"),
    ({"additionalItems": {"$defs": {"n": NINE}}}, "additionalItems/$defs/n"),
    ({"then": {"$ref": "#/properties/b/else"}, "else": NINE}, "then"),
]


@pytest.mark.parametrize(("fields", "path"), REACHED)
def test_what_asks_for_nothing_may_be_referred_to(guide: Guide, fields: dict[str, Any], path: str) -> None:
    properties = {"a": {"$ref": f"#/properties/b/{path}"}, "b": {**BASE, **fields}}
    for defs in ({}, {"$defs": {"reached_0": {"const": 1}, "reached_1": {"const": 2}}}):
        schema = {"type": "object", "properties": properties, "required": ["a"], **defs}
        assert (
            guide.by_schema(schema, '{"a":9}', '{"a":1}') == guide.by_tool(schema, '{"a":9}', '{"a":1}') == ['{"a":9}']
        )


def test_an_idle_schema_that_is_referred_to_allows_anything(guide: Guide) -> None:
    schema = {"type": "object", "propertyNames": {}, "properties": {"a": {"$ref": "#/propertyNames"}}}
    assert guide.by_schema(schema, '{"a":[1]}') == ['{"a":[1]}']


@pytest.mark.parametrize("value", [["date"], {"a": 1}, 1, None])
def test_a_format_that_is_no_name_is_refused(guide: Guide, value: Any) -> None:
    with pytest.raises(GrammarError, match="format"):
        guide.by_schema({"type": "string", "format": value})


def test_a_boolean_is_a_schema(guide: Guide) -> None:
    assert guide.by_schema("true", *TEXTS) == TEXTS
    with pytest.raises(GrammarError, match="no output obeys it"):
        guide.by_schema("false", *TEXTS)


def _lark(guide: Guide, grammar: str, *texts: str) -> list[str]:
    return guide.accepted(Grammar(kind=GrammarKind.LARK, text=grammar), *texts)


def test_a_schema_within_lark_is_held_as_any_other(guide: Guide) -> None:
    inner = '{"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}'
    assert _lark(guide, f'start: "a" %json {inner}', "a0", "a0.5", "a0.25") == ["a0.5", "a0.25"]
    assert _lark(guide, 'start: %json {"enum": ["}{", "b"]} "c"', '"}{"c', '"b"c', '"b"') == ['"}{"c', '"b"c']
    assert _lark(guide, 'start: x\nx: %json\n{"type": "string", "format": "phone"}', '"q"') == ['"q"']
    assert _lark(guide, 'start: "%json {" /%json {2}x/ // %json {', "%json {%json  x") == ["%json {%json  x"]


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ('{"const": 9007199254740993}', "cannot be held exactly"),
        ('{"const": 1, "const": 2}', "twice"),
        ('{"uniqueItems": true}', "uniqueItems"),
        ('{"const": 1', "%json"),
        ('{"a":' * 100_000, "nested"),
    ],
)
def test_a_schema_within_lark_is_refused_as_any_other(guide: Guide, schema: str, reason: str) -> None:
    with pytest.raises(GrammarError, match=reason):
        _lark(guide, f"start: %json {schema}", "x")


def test_lark_and_gbnf_as_they_are_written(guide: Guide) -> None:
    for start in ('?start: "ab"', 'start[lazy]: "ab"', 'start[capture]: "ab"', '\nstart : "ab"'):
        assert _lark(guide, start, "ab", "a") == ["ab"], start
    assert _lark(guide, r'root ::= "\u0041\u00e9\\u" [\u00c0-\u024f]', "Aé\\uÀ", "Aé\\uA") == ["Aé\\uÀ"]
