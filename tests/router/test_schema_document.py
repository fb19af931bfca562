"""Where schemas lie in a schema, and what its references mean: alike as a format and as a function's parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import InvalidRequest
from tests.router.guided import Guide, asked, forced

R = {"enum": ["r"]}
HERE = "https://example.com/s.json"
RECURSIVE = {"type": "object", "properties": {"v": {"const": 1}, "n": {"$ref": "#"}}, "additionalProperties": False}


def _object(prop: Any, more: dict[str, Any] | None = None, name: str = "a") -> dict[str, Any]:
    kept = {"type": "object", "properties": {name: prop}, "required": [name], "additionalProperties": False}
    return {**kept, **(more or {})}


def _one(value: str, name: str = "a") -> str:
    return f'{{"{name}":{value}}}'


GOOD, OTHER = _one('"r"'), _one('"x"')
# schema, what obeys it, what does not
CASES: list[tuple[dict[str, Any], list[str], list[str]]] = [
    (_object({"$ref": "#/$defs/c"}, {"$defs": {"c": R}}), [GOOD], [OTHER]),
    (_object({"$ref": "#/definitions/c"}, {"definitions": {"c": R}}), [GOOD], [OTHER]),
    (_object({"$ref": "#/$defs/c"}, {"$id": HERE, "$defs": {"c": R}}), [GOOD], [OTHER]),
    (_object({"$ref": "s.json#/$defs/c"}, {"$id": HERE, "$defs": {"c": R}}), [GOOD], [OTHER]),
    (_object({"$ref": f"{HERE}#/$defs/c"}, {"$id": HERE, "$defs": {"c": R}}), [GOOD], [OTHER]),
    (_object({"$ref": "#/$defs/c"}, {"$id": "urn:uuid:1", "$defs": {"c": R}}), [GOOD], [OTHER]),
    (_object({"$ref": "c.json"}, {"$id": "https://e.com/s", "$defs": {"k": {"$id": "c.json", **R}}}), [GOOD], [OTHER]),
    (_object({"$ref": "/y/c"}, {"$id": "https://e.com/x/s", "$defs": {"k": {"$id": "../y/c", **R}}}), [GOOD], [OTHER]),
    # An inner base URI holds for what lies in it.
    (_object({"$ref": "in"}, {"$defs": {"k": {"$id": "in", "$ref": "#/$defs/c", "$defs": {"c": R}}, "c": {}}}),
     [GOOD], [OTHER, _one("0")]),
    (_object({"$ref": "#c"}, {"$defs": {"k": {"$anchor": "c", **R}}}), [GOOD], [OTHER]),
    (_object({"$ref": "#c"}, {"$defs": {"k": {"$dynamicAnchor": "c", **R}}}), [GOOD], [OTHER]),
    (_object({"$dynamicRef": "#c"}, {"$defs": {"k": {"$dynamicAnchor": "c", **R}}}), [GOOD], [OTHER]),
    (_object({"$ref": "#c"}, {"$schema": "http://json-schema.org/draft-07/schema#",
     "definitions": {"k": {"$id": "#c", **R}}}), [GOOD], [OTHER]),
    (_object({"$ref": "#/definitions/c"}, {"$schema": "http://json-schema.org/draft-04/schema#",
     "id": "http://e.com/s", "definitions": {"c": R}}), [GOOD], [OTHER]),
    (_object({"$ref": "#/$defs/c"}, {"$schema": "https://e.com/mine", "$defs": {"c": R}}), [GOOD], [OTHER]),
    (_object({"$ref": "#/$defs/a~1b"}, {"$defs": {"a/b": R}}), [GOOD], [OTHER]),
    (_object({"$ref": "#/$defs/a~0b"}, {"$defs": {"a~b": R}}), [GOOD], [OTHER]),
    (_object({"$ref": "#/$defs/a%20b%25"}, {"$defs": {"a b%": R}}), [GOOD], [OTHER]),
    (_object({"$ref": "#/$defs/gr%C3%B6%C3%9Fe"}, {"$defs": {"größe": R}}), [GOOD], [OTHER]),
    (_object({"$ref": "#/$defs/größe"}, {"$defs": {"größe": R}}), [GOOD], [OTHER]),
    (_object({"$ref": "#/$defs/k/anyOf/1"}, {"$defs": {"k": {"anyOf": [{"const": 0}, R]}}}), [GOOD], [OTHER]),
    # What only a reference points to is a schema as well.
    (_object({"$ref": "#/components/c"}, {"components": {"c": {"$ref": "#/components/d"}, "d": R}}),
     [GOOD], [OTHER]),
    ({"type": "object", "properties": {"a": R, "b": {"$ref": "#/properties/a"}}, "required": ["b"]},
     [_one('"r"', "b")], [_one('"x"', "b")]),
    (RECURSIVE, ['{"v":1,"n":{"v":1,"n":{}}}', "{}"], ['{"v":1,"n":{"v":2}}']),
    ({**RECURSIVE, "properties": {"n": {"$recursiveRef": "#"}}, "$schema": "https://json-schema.org/draft/2019-09/schema",
      "$recursiveAnchor": True}, ['{"n":{"n":{}}}'], ['{"n":1}']),
    ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"x": {"$ref": "#/$defs/n"}},
      "additionalProperties": False}}}, ['{"x":{"x":{}}}'], ['{"x":{"y":1}}', "1"]),
    # Keywords' names are names of properties and definitions like any other.
    *((_object({"$ref": "#/$defs/c"}, {"$defs": {"c": R}}, name), [_one('"r"', name)], [_one('"x"', name)])
      for name in ("default", "enum", "const", "examples", "$ref", "properties", "items", "$id", "$defs", "required")),
    *((_object({"$ref": f"#/$defs/{name}"}, {"$defs": {name: {"$ref": "#/$defs/z"}, "z": R}}), [GOOD], [OTHER])
      for name in ("default", "enum", "const", "examples", "$anchor", "$defs")),
    # Data is what it is.
    (_object({"const": {"$ref": "#/$defs/c"}}, {"$defs": {"c": R}}), [_one('{"$ref":"#/$defs/c"}')], [GOOD]),
    (_object({"enum": [{"$ref": "#/nowhere", "$id": 5}]}), [_one('{"$ref":"#/nowhere","$id":5}')], [GOOD]),
    (_object({"default": {"$ref": 7}, "examples": [{"$ref": "#/x"}], **R}), [GOOD], [OTHER]),
]  # fmt: skip


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Guide:
    """The small vocabulary."""
    return Guide(tmp_path_factory.mktemp("guide"))


@pytest.mark.parametrize(("schema", "good", "bad"), CASES)
def test_references_mean_the_same_in_a_format_and_in_a_tool(
    guide: Guide, schema: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    assert guide.by_schema(schema, *good, *bad) == good
    assert guide.by_tool(schema, *good, *bad) == good


def test_two_tools_with_one_id_and_one_definition_stay_apart(guide: Guide) -> None:
    schemas = [
        _object({"$ref": "#/$defs/c"}, {"$id": "https://e.com/s", "$defs": {"c": {"$anchor": "x", "const": value}}})
        for value in (1, 2)
    ]
    texts = [f'[{{"name":"{name}","arguments":{{"a":{i}}}}}]' for name in ("f", "f1") for i in (1, 2)]
    assert guide.accepted(forced(*schemas), *texts) == [texts[0], texts[3]]


BAD: list[tuple[dict[str, Any], str]] = [
    (_object({"$ref": "#/$defs/c"}), "points to nothing"),
    (_object({"$ref": "#c"}), "points to nothing"),
    (_object({"$ref": "#/properties/a/enum/7"}), "points to nothing"),
    (_object({"$ref": "https://example.org/other.json"}), "not fetched"),
    (_object({"$ref": "other.json"}, {"$id": "https://e.com/s"}), "not fetched"),
    (_object({"$ref": 7}), "must be a string"),
    (_object({"$ref": "http://[x#/a"}), "no URI"),
    (_object({"$dynamicRef": "#c"}, {"$defs": {"k": {"$dynamicAnchor": "c"}, "l": {"$dynamicAnchor": "c"}}}),
     "more than one anchor"),
    (_object({"anyOf": [{"$ref": "#c"}] * 700}, {"$defs": {"k" * 1000: {"$anchor": "c"}}}), "too long"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "reason"), BAD)
def test_references_that_lead_nowhere_are_refused(schema: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        asked(structured_outputs={"json": schema})
    assert caught.value.param == "structured_outputs"
    with pytest.raises(InvalidRequest, match=reason) as caught:
        forced(schema)
    assert caught.value.param == "tools"


@pytest.mark.parametrize("member", [{"properties": {"x": 1}}, [{"properties": {}}]])
def test_closing_objects_leaves_data_as_it_is(guide: Guide, member: Any) -> None:
    told = json.dumps(member, separators=(",", ":"))
    for schema in ({"const": member}, {"enum": [member]}):
        found = guide.by_schema(_object(schema), _one(told), disable_additional_properties=True)
        assert found == [_one(told)]


def test_closing_reaches_what_names_properties_by_patterns(guide: Guide) -> None:
    schema = {"type": "object", "patternProperties": {"^z$": {"const": 1}}}
    assert guide.by_schema(schema, '{"z":1}', '{"a":1}') == ['{"z":1}', '{"a":1}']
    assert guide.by_schema(schema, '{"z":1}', '{"a":1}', disable_additional_properties=True) == ['{"z":1}']


def test_closing_reaches_every_schema_by_its_position(guide: Guide) -> None:
    inner = {"type": "object", "properties": {"x": {"const": 1}}}
    for schema in (
        _object(inner, name="const"),
        _object({"items": inner, "type": "array"}, name="enum"),
        _object({"$ref": "#/$defs/default"}, {"$defs": {"default": inner}}),
        _object({"$ref": "#/x-more/where"}, {"x-more": {"where": inner}}),
        _object({"anyOf": [inner]}, name="additionalProperties"),
    ):
        name = schema["required"][0]
        good = _one('[{"x":1}]' if name == "enum" else '{"x":1}', name)
        bad = good.replace('"x":1', '"x":1,"y":1')
        assert guide.by_schema(schema, good, bad, disable_additional_properties=True) == [good]
        assert guide.by_schema(schema, good, bad) == [good, bad]


def test_what_the_client_sent_is_not_changed(tmp_path: Path) -> None:
    schema = _object({"$ref": "#c"}, {"$defs": {"k": {"$anchor": "c", **R}}})
    before = json.dumps(schema)
    forced(schema)
    asked(structured_outputs={"json": schema, "disable_additional_properties": True})
    assert json.dumps(schema) == before
